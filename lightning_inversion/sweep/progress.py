"""The live table of a sweep: which cells are done, what they read, how long it will take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from lightning_inversion.results import ResultRow
from lightning_inversion.sweep.estimate import in_words, total
from lightning_inversion.sweep.folder import Standing, SweepFolder
from lightning_inversion.sweep.grid import Cell

_SHOWN = 24
"""Cells of a live table, which must fit into a terminal."""
_STYLE = {"done": "green", "running": "yellow", "failed": "red", "waiting": "bright_black"}


class Progress:
    """A table of cells that refreshes itself from the sweep's files.

    Args:
        sweep: whose cells are shown.
        processes: that share its cells.
        console: where to; a live table on a terminal, a line for each finished cell elsewhere.
    """

    def __init__(self, sweep: SweepFolder, processes: int, console: Console) -> None:
        self.sweep, self.processes, self.console = sweep, processes, console
        self._ended: dict[str, tuple[Standing, dict[str, str]]] = {}
        self._said: set[str] = {
            cell.name for cell in sweep.cells if sweep.standing(cell).state == "done"
        }

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the table while the block runs."""
        if not self.console.is_terminal:
            yield
            return
        with Live(
            console=self.console,
            get_renderable=lambda: self.table(_SHOWN),
            refresh_per_second=2,
            redirect_stdout=False,
            redirect_stderr=False,
        ):
            yield

    def say(self) -> None:
        """Elsewhere than on a terminal: a line for each cell that has ended since the last call."""
        if self.console.is_terminal:
            return
        for cell in self.sweep.cells:
            standing = self.sweep.standing(cell)
            if cell.name in self._said or standing.state not in ("done", "failed"):
                continue
            self._said.add(cell.name)
            cells = [f"{name} {value}" for name, value in self._numbers(cell).items() if value]
            said = ", ".join([*cells, f"{standing.seconds or 0:.1f} s"])
            self.console.print(
                f"{len(self._said)}/{len(self.sweep.cells)} {cell.name}: {standing.state}, {said}"
                + (f" ({standing.message})" if standing.message else ""),
                soft_wrap=True,
                markup=False,
                highlight=False,
            )

    def table(self, most: int | None = None) -> Table:
        """The cells, at most so many around the first that is not done."""
        cells = self.sweep.cells
        known = {cell.name: self._known(cell) for cell in cells}
        undone = [i for i, cell in enumerate(cells) if known[cell.name][0].state != "done"]
        first = 0
        if most is not None and len(cells) > most:
            first = min(max(0, (undone[0] if undone else len(cells)) - 4), len(cells) - most)
        shown = cells[first : first + (most or len(cells))]
        axes = list(dict.fromkeys(name for cell in cells for name in cell.values))
        table = Table(box=None, header_style="bold", pad_edge=False)
        for name in (*axes, "", "prompts", "tokens right", "exact", "verified", "seconds"):
            table.add_column(name, justify="left" if name in axes or not name else "right")
        for cell in shown:
            standing, numbers = known[cell.name]
            table.add_row(
                *(escape(cell.values.get(name, "")) for name in axes),
                f"[{_STYLE[standing.state]}]{standing.state}",
                *numbers.values(),
                _seconds(standing),
            )
        table.caption = self._caption([cells[i] for i in undone])
        table.caption_justify = "left"
        return table

    def _known(self, cell: Cell) -> tuple[Standing, dict[str, str]]:
        """What is known of a cell; a finished one is read once."""
        if cell.name not in self._ended:
            standing = self.sweep.standing(cell)
            known = standing, self._numbers(cell)
            if standing.state != "done":
                return known
            self._ended[cell.name] = known
        return self._ended[cell.name]

    def _numbers(self, cell: Cell) -> dict[str, str]:
        rows = self.sweep.rows(cell)
        return {
            "prompts": str(len(rows) or ""),
            "tokens right": _mean(rows, "token_accuracy"),
            "exact": _mean(rows, "exact"),
            "verified": _mean(rows, "verified"),
        }

    def _caption(self, left: list[Cell]) -> str:
        if not left:
            return f"{len(self.sweep.cells)} cells done"
        time_left = in_words(total(left, self.sweep.finished(), self.processes))
        return f"{len(left)} of {len(self.sweep.cells)} cells left: {time_left}"


def _mean(rows: list[ResultRow], key: str) -> str:
    values: list[Any] = [getattr(row, key) for row in rows if getattr(row, key) is not None]
    return f"{sum(values) / len(values):.3f}" if values else ""


def _seconds(standing: Standing) -> str:
    if standing.state == "running" and standing.began is not None:
        return f"{time.time() - standing.began:.0f}"
    return "" if standing.seconds is None else f"{standing.seconds:.1f}"
