"""The texts of a file to JSON lines, by any number of processes at once.

Each process takes a text by claiming it, and appends its row whole. A claim ends with its process,
so the texts of a process that was killed are taken by another one, or when the command is repeated.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from lightning_inversion.attribution.attribute import attribute
from lightning_inversion.attribution.config import Choices, Display
from lightning_inversion.attribution.result import AttributionResult, AttributionResults
from lightning_inversion.errors import InputError, ProcessLostError
from lightning_inversion.files import Record, append_records, claimed, read_records, sort_records
from lightning_inversion.transformer.loading import WHAT_IS_LOADED, TransformerSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
# A fork would share the threads and the CUDA context of this process, which torch forbids.
_SPAWN = multiprocessing.get_context("spawn")
_POLL_SECONDS = 0.2
"""Seconds between two checks of the texts that other processes have claimed."""


@dataclass(frozen=True)
class Request:
    """What a command asks for each of its texts.

    Args:
        choices: with what the preset sets.
        display: with what the preset sets.
        preset: its name, for the command in the output.
        spec: of the model.
    """

    choices: Choices
    display: Display
    preset: str | None
    spec: TransformerSpec

    @property
    def settings(self) -> Record:
        """What the scores depend on beside the text."""
        choices = asdict(self.choices)
        del choices["batch_size"]
        return {**choices, "model": self.spec.model, **self._model_options}

    @property
    def _model_options(self) -> dict[str, Any]:
        """The options that load the model, where they are not at their default; not its name."""
        return {
            field.name: value
            for field in fields(self.spec)
            if field.name in WHAT_IS_LOADED[1:]
            and (value := getattr(self.spec, field.name)) != field.default
        }

    def result(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str
    ) -> AttributionResult:
        """The attribution of one text by the model that `spec` loads."""
        return attribute(
            model,
            tokenizer,
            text,
            self.choices,
            preset=self.preset,
            display=self.display,
            name=self.spec.model,
            model_options=self._model_options,
        )

    def row(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        bad: str | None,
    ) -> Record:
        """The attribution of one text as a row; where it cannot be run, its row says why.

        Args:
            model: that `spec` loads.
            tokenizer: of the model.
            text: of a file of texts.
            bad: why it cannot be run; None if it can.
        """
        if bad is not None:
            return {"text": text, "error": bad}
        return self.result(model, tokenizer, text).to_dict()


class RowFile:
    """A file of JSON lines with one row per text, which several processes fill.

    Args:
        path: of the file, which may exist.
        texts: of the whole run, in order.
        settings: what the scores depend on beside the text.
        bad: why texts cannot be run, by their index; the row of such a text holds the error.

    Attributes:
        finished: the texts that have their row.

    Raises:
        InputError: the file holds rows of another run.
    """

    def __init__(
        self,
        path: Path,
        texts: Sequence[str],
        settings: Record,
        bad: Mapping[int, str] | None = None,
    ) -> None:
        self.path, self.texts, self.settings, self.bad = path, texts, settings, bad or {}
        self.finished: set[int] = set()
        for row in read_records(path):
            self._add(row)

    @property
    def missing(self) -> list[int]:
        """The texts without a row, in order."""
        return [index for index in range(len(self.texts)) if index not in self.finished]

    @property
    def standing(self) -> str:
        """How many texts have their row."""
        return f"{len(self.finished)} of {len(self.texts)}"

    def unclaimed(self) -> Iterator[int]:
        """Each text without a row, claimed by this process until the next one is asked for.

        Ends when every text has its row; waits for those that other processes have claimed.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        # The file is only replaced once it is complete, and then this handle sees all rows.
        with self.path.open("rb", buffering=0) as rows:
            self._read_new(rows)
            while missing := self.missing:
                idle = True
                for index in missing:
                    if index in self.finished:
                        continue
                    with claimed(self._claims / f"{index}.claim") as ours:
                        self._read_new(rows)
                        if ours and index not in self.finished:
                            idle = False
                            yield index
                if idle:
                    time.sleep(_POLL_SECONDS)

    def append(self, index: int, row: Record) -> None:
        """Append the row of text `index`; a torn last line is cut off first."""
        append_records(self.path, [{"index": index, "settings": self.settings, **row}])
        self.finished.add(index)

    def results(self, display: Display) -> AttributionResults:
        """The results of the texts that can be run, from their rows."""
        return AttributionResults(
            AttributionResult.from_dict(row, display=display)
            for row in read_records(self.path)
            if "error" not in row
        )

    def close(self) -> None:
        """Put the rows of a complete file in order and remove the claims."""
        if not self.missing:
            sort_records(self.path)
            shutil.rmtree(self._claims, ignore_errors=True)

    @property
    def _claims(self) -> Path:
        return self.path.with_name(f".{self.path.name}.claims")

    def _read_new(self, rows: BinaryIO) -> None:
        """Add the rows that were appended since the last call; a line may be incomplete."""
        new = rows.read()
        whole = new[: new.rfind(b"\n") + 1]
        rows.seek(len(whole) - len(new), os.SEEK_CUR)
        for line in whole.splitlines():
            self._add(json.loads(line))

    def _add(self, row: Record) -> None:
        index = int(row["index"])
        text = self.texts[index] if 0 <= index < len(self.texts) else None
        if text is None or row.get("text") != text or row.get("settings") != self.settings:
            raise InputError(
                f"--json {str(self.path)!r} holds rows of other texts or other options; "
                "give another file, or remove it."
            )
        self.finished.add(index)


def run_texts(request: Request, rows: RowFile, processes: int) -> None:
    """Run every text that has no row yet.

    Args:
        request: what is asked for each text.
        rows: of the texts.
        processes: that share the texts, with a model and one thread each; 1 is this process.

    Raises:
        InputError: the model cannot be loaded.
        ProcessLostError: one of the processes died; the rows are kept.
    """
    if rows.missing and processes == 1:
        _fill(request, rows, lambda _: _log_standing(rows))
    elif rows.missing:
        _run_in_processes(request, rows, min(processes, len(rows.missing)))
    rows.close()


def _fill(request: Request, rows: RowFile, written: Callable[[int], None]) -> None:
    """Load the model and run the texts that no other process has claimed."""
    model, tokenizer = request.spec.load_causal_lm()
    for index in rows.unclaimed():
        bad = rows.bad.get(index)
        rows.append(index, request.row(model, tokenizer, rows.texts[index], bad))
        written(index)


def _log_standing(rows: RowFile) -> None:
    _log.info("%s: written to %s", rows.standing, rows.path)


def _run_in_processes(request: Request, rows: RowFile, count: int) -> None:
    """Start processes that fill the file, and log each row; none is left when this ends."""
    processes: dict[Connection, BaseProcess] = {}
    try:
        with _interrupts_ignored():
            for _ in range(count):
                ours, theirs = _SPAWN.Pipe(duplex=False)
                process = _SPAWN.Process(target=_work, args=(theirs, request, rows), daemon=True)
                process.start()
                theirs.close()  # now only the process has this end, which closes when it ends
                processes[ours] = process
        running = set(processes)
        while running:
            for connection in running.intersection(wait(list(running))):
                try:
                    report = connection.recv()
                except EOFError:
                    running.remove(connection)
                    _check_ended_well(processes[connection])
                    continue
                if isinstance(report, Exception):
                    raise report
                rows.finished.add(report)
                _log_standing(rows)
        rows.finished.update(range(len(rows.texts)))  # also those of other runs of the command
    finally:
        for child in processes.values():
            child.terminate()
        for child in processes.values():
            child.join()


def _check_ended_well(process: BaseProcess) -> None:
    process.join()
    if process.exitcode:
        raise ProcessLostError(f"a process ended with exit code {process.exitcode}")


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes started meanwhile ignore Ctrl-C, which a terminal sends to all of them.

    They inherit it: they cannot ask for it themselves before they have imported torch.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(connection: Connection, request: Request, rows: RowFile) -> None:
    """Fill the file in a started process; send each index, or the error that ends it."""
    torch.set_num_threads(1)
    logging.getLogger("lightning_inversion").setLevel(logging.ERROR)  # rows keep their notes
    try:
        _fill(request, rows, connection.send)
    except BrokenPipeError:  # the process that started this one has ended
        pass
    except InputError as error:
        connection.send(error)
    except OSError as error:  # a full disk, for example
        connection.send(OSError(error.errno, error.strerror, error.filename))
