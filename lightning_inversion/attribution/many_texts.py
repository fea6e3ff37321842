"""The texts of a file, in this process or in several; their rows end in the order of the texts."""

from __future__ import annotations

from lightning_inversion.attribution.attribute import to_stderr
from lightning_inversion.attribution.processes import run_in_processes
from lightning_inversion.attribution.request import Request
from lightning_inversion.attribution.rows import RowFile
from lightning_inversion.files import sort_records


def run_texts(request: Request, rows: RowFile, processes: int) -> None:
    """Run every text that has no row yet, and say so on stderr.

    Args:
        request: what is asked of each text.
        rows: of the texts.
        processes: that share the texts, with a model and one thread each; 1 runs them in this one.

    Raises:
        InputError: a text is too long for the model.
        ProcessLostError: one of the processes died.
    """
    if rows.missing and processes == 1:
        _run_here(request, rows)
    elif rows.missing:
        run_in_processes(request, rows, min(processes, len(rows.missing)), _say_written)
    sort_records(rows.path)


def _run_here(request: Request, rows: RowFile) -> None:
    model, tokenizer = request.spec.load_causal_lm()
    for index in rows.missing:
        rows.append(index, request.result(model, tokenizer, rows.texts[index]).to_dict())
        _say_written(rows)


def _say_written(rows: RowFile) -> None:
    to_stderr(f"{rows.standing}: written to {rows.path}.")
