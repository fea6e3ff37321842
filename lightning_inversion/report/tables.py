"""Groups of results -> one table: markdown to read, CSV and JSON to go on with."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from lightning_inversion.report.statistics import Group, Mean, varying

MEASURES = {
    "tokens right": "token_accuracy",
    "exact": "exact",
    "in top k": "top_k_accuracy",
    "verified": "verified_share",
}
"""A column's name, and the attribute of a result whose mean it is."""
FIRST = ("command", "model", "depth", "features", "channel")
"""Settings that a reader looks for first; the others stand behind what came of them."""

Line = dict[str, Any]


def lines_of(groups: Sequence[Group]) -> list[Line]:
    """A line for each group: where it looks, what came of it, and what else sets it apart."""
    apart = varying(groups) or ["model", "depth"]
    return [_line(group, apart) for group in groups]


def _line(group: Group, apart: Sequence[str]) -> Line:
    candidates = sorted(group.candidates)
    settings = {name: _plain(group.settings.get(name)) for name in apart}
    seconds = group.median("seconds")
    # A fit's prompts run together, and each of its rows holds the time of them all.
    of_batch = group.settings.get("command") == "fit"
    return {
        **{name: value for name, value in settings.items() if name in FIRST},
        "prompts": group.prompts,
        **{name: group.mean(measure) for name, measure in MEASURES.items()},
        "verified and wrong": group.false_proofs,
        **{name: value for name, value in settings.items() if name not in FIRST},
        "seeds": group.seeds,
        "iterations (median)": group.median("iterations"),
        "candidates (median)": candidates[len(candidates) // 2] if candidates else None,
        "seconds (median)": None if of_batch else seconds,
        "seconds (batch, median)": seconds if of_batch else None,
    }


def without_empty(lines: Sequence[Line]) -> list[Line]:
    """The lines without columns that say nothing in any of them."""
    used = [key for key in lines[0] if any(line[key] is not None for line in lines)]
    return [{key: line[key] for key in used} for line in lines]


def markdown(lines: Sequence[Line]) -> str:
    """The table as markdown; means with their 95% interval."""
    lines = without_empty(lines)
    head = list(lines[0])
    rows = [head, ["---"] * len(head), *([cell_text(line[key]) for key in head] for line in lines)]
    return "\n".join(f"| {' | '.join(map(_escaped, row))} |" for row in rows) + "\n"


def comma_separated(lines: Sequence[Line]) -> str:
    """The table as CSV; a mean has three columns."""
    flat = [_flat(line) for line in lines]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def as_json(lines: Sequence[Line]) -> str:
    """The table as JSON: a list of flat objects, with every setting that differs anywhere."""
    return json.dumps([_flat(line) for line in lines], ensure_ascii=False, indent=1)


def cell_text(value: Any) -> str:
    """A value as the table shows it."""
    if value is None:
        return ""
    if isinstance(value, Mean):
        std = "" if value.low == value.high else f" [{value.low:.2f}, {value.high:.2f}]"
        return f"{value.value:.3f}{std}"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def _flat(line: Line) -> Line:
    flat: Line = {}
    for name, value in line.items():
        if name in MEASURES:
            for part in ("value", "low", "high"):
                key = name if part == "value" else f"{name} {part}"
                flat[key] = None if value is None else getattr(value, part)
        else:
            flat[name] = value
    return flat


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str) or value is None else str(value)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
