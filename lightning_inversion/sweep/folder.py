"""A sweep on disk: what it was asked for, and where each of its cells stands."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lightning_inversion.errors import InputError
from lightning_inversion.files import claimed
from lightning_inversion.results import FILE, ResultRow, read_rows
from lightning_inversion.sweep.grid import Cell

State = Literal["waiting", "running", "done", "failed"]
SWEEP_FILE, CELL_FILE, MESSAGES = "sweep.json", "cell.json", "messages.txt"


@dataclass(frozen=True)
class Standing:
    """Where a cell stands.

    Attributes:
        state: a cell whose process was killed stays 'running' until another takes it up.
        began: wall clock, seconds since the epoch.
        seconds: of the run, None before its end.
        message: why it failed.
    """

    state: State = "waiting"
    began: float | None = None
    seconds: float | None = None
    message: str | None = None


@dataclass(frozen=True)
class SweepFolder:
    """The folder of a sweep; its cells are folders in it, and any process may take one up.

    Attributes:
        path: of the folder.
        cells: what is to be run, in order.
    """

    path: Path
    cells: tuple[Cell, ...]

    def save(self) -> None:
        """Write down what the sweep is, or see that the folder holds the same one.

        Raises:
            InputError: the folder holds another sweep.
        """
        stored = self.path / SWEEP_FILE
        asked = {"cells": [asdict(cell) for cell in self.cells]}
        if stored.exists():
            if _read(stored) != json.loads(json.dumps(asked)):
                raise InputError(
                    f"{str(self.path)!r} holds a sweep with other options; "
                    "give this one another --name, or remove the folder."
                )
            return
        self.path.mkdir(parents=True, exist_ok=True)
        _write(stored, asked)

    @classmethod
    def open(cls, path: Path) -> SweepFolder:
        """The sweep that a folder holds.

        Raises:
            InputError: it holds none.
        """
        stored = path / SWEEP_FILE
        if not stored.is_file():
            raise InputError(f"--join {str(path)!r} holds no {SWEEP_FILE}; name a sweep's folder.")
        asked = _read(stored)
        cells = tuple(
            Cell(**{**cell, "arguments": tuple(cell["arguments"])}) for cell in asked["cells"]
        )
        return cls(path, cells)

    def of(self, cell: Cell) -> Path:
        """The folder of a cell's run."""
        return self.path / cell.name

    def standing(self, cell: Cell) -> Standing:
        """Where a cell stands, as its file says."""
        file = self.of(cell) / CELL_FILE
        return Standing(**_read(file)) if file.exists() else Standing()

    def rows(self, cell: Cell) -> list[ResultRow]:
        """The finished rows of a cell."""
        return read_rows(self.of(cell) / FILE)

    def unfinished(self) -> list[Cell]:
        """Cells that are not done, in order."""
        return [cell for cell in self.cells if self.standing(cell).state != "done"]

    def finished(self) -> list[tuple[Cell, float]]:
        """Cells that are done, with their seconds."""
        stand = [(cell, self.standing(cell)) for cell in self.cells]
        return [(cell, s.seconds) for cell, s in stand if s.state == "done" and s.seconds]

    @contextmanager
    def claimed(self, cell: Cell) -> Iterator[bool]:
        """Whether this process has the cell to itself; the claim ends with the process."""
        with claimed(self.of(cell) / ".claim") as ours:
            yield ours and self.standing(cell).state != "done"

    @contextmanager
    def timed(self, cell: Cell) -> Iterator[None]:
        """Say that a cell is running, and how it ended: an exception is its failure."""
        began, clock = time.time(), time.monotonic()
        self._stands(cell, Standing("running", began))
        try:
            yield
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            self._stands(cell, Standing("failed", began, time.monotonic() - clock, message))
            raise
        self._stands(cell, Standing("done", began, time.monotonic() - clock))

    def _stands(self, cell: Cell, standing: Standing) -> None:
        _write(self.of(cell) / CELL_FILE, asdict(standing))


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, value: Any) -> None:
    """Whole or not at all, for those who read meanwhile."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
    part.replace(path)
