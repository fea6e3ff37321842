"""A run's rows in short: their means, and a table of them in the terminal."""

import sys

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchmetrics import Metric, MetricCollection

from lightning_inversion.files import visible
from lightning_inversion.metrics import ExactMatch, Hamming, TokenAccuracy, TopKAccuracy
from lightning_inversion.results import ResultRow

_AT_A_TIME = 256
"""Rows that are averaged together: bounds the memory."""
_SHOWN = 50
"""Rows of the table at most."""


def mean(rows: list[ResultRow]) -> dict[str, float]:
    """The run's metrics over the rows that could be run, by torchmetrics; {} where none could.

    Those that compare with the prompt are over the rows whose prompt is known, if any.
    """
    rows = [row for row in rows if row.recovered_ids]
    if not rows:
        return {}
    averages = _accuracies(rows)
    if compared := [row for row in rows if row.token_states]:
        averages["verified"] = sum(row.verified for row in compared) / len(compared)
    for name in ("iterations", "distance_ratio"):
        numbers = [getattr(row, name) for row in rows if getattr(row, name) is not None]
        if numbers:
            averages[name] = sum(numbers) / len(numbers)
    tried = [number for row in rows for number in row.candidates]
    if tried:
        averages["candidates"] = sum(tried) / len(tried)
    return averages


def _accuracies(rows: list[ResultRow]) -> dict[str, float]:
    rows = [row for row in rows if row.ids]
    if not rows:
        return {}
    # A collection's groups join metrics that agree on the first row, for good: none of these may.
    first: dict[str, Metric | MetricCollection]
    first = {"token_accuracy": TokenAccuracy(), "exact_match": ExactMatch()}
    best: dict[str, Metric | MetricCollection]
    best = {"top_k_accuracy": TopKAccuracy(), "hamming": Hamming()}
    top_1 = MetricCollection(first, compute_groups=False)
    top_k = MetricCollection(best, compute_groups=False)
    for start in range(0, len(rows), _AT_A_TIME):
        some = rows[start : start + _AT_A_TIME]
        ids = _padded_column(some, "ids")
        mask = _padded_column(some, "ids", padding=-1) >= 0
        top_1.update(_padded_column(some, "recovered_ids"), ids, mask)
        if rows[0].top_k_ids:
            top_k.update(_padded_column(some, "top_k_ids"), ids, mask)
    values = {**top_1.compute(), **(top_k.compute() if rows[0].top_k_ids else {})}
    return {name: float(value) for name, value in values.items()}


def _padded_column(rows: list[ResultRow], key: str, padding: int = 0) -> Tensor:
    return pad_sequence([torch.tensor(getattr(row, key)) for row in rows], True, padding)


def print_rows(rows: list[ResultRow]) -> None:
    """The recovered prompts as a table on stdout; verified ones green, others red.

    Of many rows those are shown that were not verified, then the first ones.
    """
    doubtful_first = sorted(rows, key=lambda row: bool(row.verified))
    shown = sorted(doubtful_first[:_SHOWN], key=lambda row: int(row.index))
    left_out = doubtful_first[_SHOWN:]
    table = Table(box=None, header_style="bold", pad_edge=False)
    predicted = rows[0].command == "predict"
    effort = ("candidates", "seconds") if predicted else ("iterations", "ratio")
    for column in ("#", "recovered", "right", "verified", *effort):
        table.add_column(column, justify="left" if column == "recovered" else "right")
    for row in shown:
        count = len(row.recovered_ids)
        if row.error:
            table.add_row(str(row.index + 1), Text(f"(not run: {visible(row.error)})", style="red"))
            continue
        if predicted:
            spent = (str(sum(row.candidates)), f"{row.seconds:.1f}")
        else:
            ratio = row.distance_ratio
            spent = (str(row.iterations), "" if ratio is None else f"{ratio:.2g}")
        table.add_row(
            str(row.index + 1),
            Text(visible(row.recovered or ""), style="green" if row.verified else "red"),
            _count_of(row.token_accuracy, count),
            f"{row.verified_tokens}/{count}" if row.token_states else "not compared",
            *spent,
        )
    console = Console(file=sys.stdout)
    console.print(table)
    if left_out:
        doubtful = sum(not row.verified for row in left_out)
        which = f"{doubtful} of them not verified" if doubtful else "all of them verified"
        console.print(f"... and {len(left_out)} more, {which}")
    lost = sum(bool(row.exact) and row.same_text is False for row in rows)
    if lost:
        console.print(
            f"of {lost} prompts all tokens are right, and their text is not the prompt's: the "
            "tokenizer loses text"
        )
    averages = mean(rows)
    if not averages:
        return
    right = (
        f"token accuracy {averages['token_accuracy']:.3f}, exact {averages['exact_match']:.3f}, "
        if "token_accuracy" in averages
        else ""
    )
    outcome = f"verified {averages['verified']:.3f}" if "verified" in averages else "not compared"
    run = sum(bool(row.recovered_ids) for row in rows)
    left = f"; {len(rows) - run} not run" if run < len(rows) else ""
    console.print(f"{right}{outcome} of {run} prompt{'s' * (run != 1)}{left}")


def _count_of(share: float | None, count: int) -> str:
    return "not known" if share is None else f"{round(share * count)}/{count}"
