"""How long the cells of a sweep will take, from those that have finished."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_inversion.files import readable_time
from lightning_inversion.sweep.grid import Cell


def estimate(cell: Cell, timed: Sequence[tuple[Cell, float]]) -> float | None:
    """Seconds of a cell: the mean of the timed cells that are most like it; None if there are none.

    Most like are those with the same command and the most equal values. One of another depth
    counts in proportion to its blocks, with one for what a run costs beside them.
    """
    same = [(other, seconds) for other, seconds in timed if other.command == cell.command]
    if not same:
        return None
    likeness = [_likeness(cell, other) for other, _ in same]
    nearest = [pair for pair, alike in zip(same, likeness, strict=True) if alike == max(likeness)]
    scaled = [seconds * (1 + depth_of(cell)) / (1 + depth_of(other)) for other, seconds in nearest]
    return sum(scaled) / len(scaled)


def total(
    cells: Sequence[Cell], timed: Sequence[tuple[Cell, float]], processes: int = 1
) -> float | None:
    """Seconds of all the cells, shared over processes; None while a cell has no estimate."""
    each = [estimate(cell, timed) for cell in cells]
    known = [seconds for seconds in each if seconds is not None]
    return sum(known) / max(1, min(processes, len(cells))) if len(known) == len(each) else None


def depth_of(cell: Cell) -> int:
    """The number of blocks a cell sets, 1 where it sets none."""
    text = cell.values.get("depth", "1")
    return int(text) if text.isdigit() else 1


def in_words(seconds: float | None) -> str:
    """'about 3 min', or that it is not known."""
    if seconds is None:
        return "not known before a cell has finished"
    return f"about {readable_time(seconds)}"


def _likeness(ours: Cell, theirs: Cell) -> int:
    return sum(
        value == theirs.values.get(name) for name, value in ours.values.items() if name != "depth"
    )
