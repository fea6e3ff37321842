"""Success against the width of the channel: which share of the features is enough?"""

from __future__ import annotations

from typing import Any

from lightning_inversion.replication.claims import RECOVERED


def curve(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Mean token accuracy of each range of features, in the order of the rows' ranges."""
    by_range: dict[str, list[float]] = {}
    for row in rows:
        by_range.setdefault(row["range"], []).append(row["token_accuracy"])
    return {name: sum(values) / len(values) for name, values in by_range.items()}


def critical_widths(points: dict[str, float]) -> tuple[int | None, int | None]:
    """The first width of ``0:k`` that recovers, and the width from which on all do.

    The two differ where success is not monotone; a bisection finds either or anything between.
    None where no width does.
    """
    widths = sorted(
        (int(name.removeprefix("0:")), value)
        for name, value in points.items()
        if name.startswith("0:")
    )
    recovered = [width for width, value in widths if value >= RECOVERED]
    failed = [width for width, value in widths if value < RECOVERED]
    first = min(recovered, default=None)
    after = [width for width in recovered if width > max(failed, default=0)]
    return first, min(after, default=None)


def bars(points: dict[str, float]) -> list[str]:
    """Lines of a table: range, token accuracy, a bar of ten."""
    lines = ["| features | token accuracy | |", "|---|---|---|"]
    for name, value in points.items():
        filled = round(10 * value)
        lines.append(f"| [{name}] | {value:.2f} | `{'#' * filled}{'.' * (10 - filled)}` |")
    return lines
