"""The cells of a sweep: where each stands on disk, and the processes that run them.

Each cell is a run of the command line's own class in a folder of its own. A process takes a cell up
by claiming a file in that folder; what is done is not run again, what was stopped is resumed.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal, get_type_hints

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lightning_inversion.cli.ending import ended_by_sigterm
from lightning_inversion.cli.lightning import InversionCLI
from lightning_inversion.cli.resume import deciding, differences, read_settings
from lightning_inversion.cli.trainer import quiet_lightning
from lightning_inversion.errors import InputError
from lightning_inversion.files import check_of, claimed, readable_time, write_whole
from lightning_inversion.module import InputInversion
from lightning_inversion.results import FILE, FITTED, PREDICTED, ResultRow, read_rows
from lightning_inversion.sweep.grid import SEED, Cell, check_count
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.shared import SharedModels
from lightning_inversion.untrusted import read_file, read_json

MODEL_KEYS = frozenset(inspect.signature(InputInversion.__init__).parameters) - {"self"}
"""The words that stand under ``model.`` in a config."""
SWEEP_FILE, CELL_FILE, MESSAGES = "sweep.json", "cell.json", "messages.txt"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Status:
    """Where a cell stands; one that runs is waiting until it has ended.

    Attributes:
        seconds: of the run.
        message: why it failed.
    """

    state: Literal["waiting", "done", "failed"] = "waiting"
    seconds: float = 0.0
    message: str = ""


@dataclass(frozen=True)
class Sweep:
    """The folder of a sweep; its cells are folders in it, and any process may take one up.

    Attributes:
        path: of the folder.
        cells: what is to be run, in order.
    """

    path: Path
    cells: tuple[Cell, ...]

    @classmethod
    def open(cls, path: Path) -> Sweep:
        """The sweep that a folder holds.

        Raises:
            InputError: it holds none.
        """
        stored = path / SWEEP_FILE
        if not stored.is_file():
            raise InputError(f"--join {str(path)!r} holds no {SWEEP_FILE}; name a sweep's folder.")
        try:
            record = read_json(read_file(stored))
            if not isinstance(record, dict) or not isinstance(record.get("cells"), list):
                raise ValueError("it has no list of cells")
            check_count(len(record["cells"]), f"the cells of {str(stored)!r}")
            return cls(path, tuple(Cell.from_record(cell) for cell in record["cells"]))
        except InputError:
            raise
        except (ValueError, OSError) as error:
            raise InputError(f"{str(stored)!r} is not a sweep's: {error}; remove it.") from error

    def save(self) -> None:
        """Write the sweep's file, or check that the folder holds the same sweep.

        Raises:
            InputError: the folder holds another sweep.
        """
        if (self.path / SWEEP_FILE).exists():
            if Sweep.open(self.path) != self:
                raise InputError(
                    f"{str(self.path)!r} holds a sweep with other options; "
                    "give this one another --name, or remove the folder."
                )
            return
        _write_json(self.path / SWEEP_FILE, {"cells": [asdict(cell) for cell in self.cells]})

    def folder(self, cell: Cell) -> Path:
        """The folder of a cell's run."""
        return self.path / cell.name

    def status(self, cell: Cell) -> Status:
        """Where a cell stands; without a whole file of it, it is run and keeps its rows."""
        try:
            status = Status(**read_json(read_file(self.folder(cell) / CELL_FILE)))
        except (OSError, ValueError, TypeError):
            return Status()
        types = get_type_hints(Status).items()
        return status if all(check_of(t)(getattr(status, key)) for key, t in types) else Status()

    def rows(self, cell: Cell) -> list[ResultRow]:
        """The finished rows of a cell."""
        return read_rows(self.folder(cell) / FILE)

    def unfinished(self) -> list[Cell]:
        """Cells that are not done, in order."""
        return [cell for cell in self.cells if self.status(cell).state != "done"]


def _write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all, as other processes may read it."""
    write_whole(path, json.dumps(value, ensure_ascii=False, indent=1))


# -- before the first cell runs --------------------------------------------------------------


class _Checked(InversionCLI):
    """A command that is parsed and checked as it would be run, and not run."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def spec_of(command: str, arguments: Sequence[str]) -> TransformerSpec:
    """The model that a command's options name.

    Raises:
        InputError: the options are wrong.
    """
    quiet_lightning()
    spec: TransformerSpec = _Checked([command, *arguments, "--trainer.logger=false"]).model.spec
    return spec


def check(sweep: Sweep) -> list[TransformerSpec]:
    """Check every cell before the first one runs; returns the specs of their models.

    Half a second is needed to check one, so cells that differ in a seed alone are checked once.

    Raises:
        InputError: a cell's options are wrong, or its folder holds a run with others.
    """
    quiet_lightning()
    alike: dict[Any, list[Cell]] = {}
    for cell in sweep.cells:
        alike.setdefault(cell.apart_from_seed(), []).append(cell)
    specs = []
    for cells in alike.values():
        run = _Checked(_arguments(sweep, cells[0]))
        specs.append(run.model.spec)
        settings = run.settings()
        for cell in cells:
            if sweep.folder(cell).exists():
                seed = settings[SEED] if cell.seed is None else cell.seed
                _check_folder(sweep.folder(cell), run, {**settings, SEED: seed})
    return specs


def _check_folder(folder: Path, run: InversionCLI, settings: dict[str, Any]) -> None:
    """Refuse the folder of a run that was made with other settings or prompts."""
    command = run.subcommand
    assert command is not None
    stored = folder / (PREDICTED if command == "predict" else FITTED)
    different = differences(read_settings(stored), settings) if stored.exists() else []
    if different:
        raise InputError(
            f"{str(folder)!r} was made with another --{different[0]}; "
            "give the sweep another --name, or remove the folder."
        )
    run.writer.asked = deciding(command, settings)
    run.check_folder(folder)


def _arguments(sweep: Sweep, cell: Cell) -> list[str]:
    """The command line of a cell, with the options that make its folder the run's."""
    return [
        cell.command,
        *cell.arguments,
        "--trainer.logger=lightning.pytorch.loggers.TensorBoardLogger",
        f"--trainer.logger.save_dir={sweep.path.parent}",
        f"--trainer.logger.name={sweep.path.name}",
        f"--trainer.logger.version={cell.name}",
    ]


# -- running ---------------------------------------------------------------------------------


def run_cells(sweep: Sweep, specs: Sequence[TransformerSpec], processes: int = 1) -> int:
    """Run what is not done yet; returns the exit code, 1 if a cell failed or the run was stopped.

    Cells that another sweep process holds are left to it.

    Args:
        sweep: whose cells.
        specs: of their models, from `check`.
        processes: that share them; this one if 1.
    """
    sweep.save()
    left = sweep.unfinished()
    for cell in left:
        if sweep.status(cell).state == "failed":  # in an earlier attempt
            (sweep.folder(cell) / CELL_FILE).unlink(missing_ok=True)
    _log.info("%s: %d of %d cells to run", sweep.path, len(left), len(sweep.cells))
    try:
        with ended_by_sigterm(), _cells_bar(sweep, left) as report:
            if processes == 1:
                _take_up(sweep, specs, report)
            else:
                _share(sweep, min(processes, len(left)), report)
    except (KeyboardInterrupt, SystemExit):
        _log.error("lightning-inversion: stopped; the same command resumes it.")
        return 1
    failed = False
    for cell in sweep.unfinished():
        status = sweep.status(cell)
        if status.state == "failed" or processes > 1:
            failed = True
            message = status.message or "its process ended"
            _log.error("lightning-inversion: %s failed: %s", cell.name, message)
    return int(failed)


def _take_up(sweep: Sweep, specs: Sequence[TransformerSpec], report: Callable[[], None]) -> None:
    """Run every cell that is neither done nor another process's.

    Args:
        sweep: whose cells to run.
        specs: of the cells' models, so that the deepest is loaded at once.
        report: is called after each cell.
    """
    models = SharedModels(specs)
    for cell in sweep.cells:
        with claimed(sweep.folder(cell) / ".claim") as ours:
            if not ours or sweep.status(cell).state == "done":
                continue
            began = time.monotonic()
            state: Literal["done", "failed"] = "failed"
            message = ""
            try:
                _run(sweep, cell, models)
                state = "done"
            except Exception as error:  # one cell's failure is not the others'
                message = f"{type(error).__name__}: {error}"
            status = Status(state, time.monotonic() - began, message)
            _write_json(sweep.folder(cell) / CELL_FILE, asdict(status))
        report()


def _run(sweep: Sweep, cell: Cell, models: SharedModels) -> None:
    """Run one cell as a command of its own; its output goes to a file in its folder."""
    folder = sweep.folder(cell)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    again = [f"--ckpt_path={checkpoint}"] if checkpoint.exists() and cell.command == "fit" else []
    with (
        (folder / MESSAGES).open("a", encoding="utf-8") as messages,
        contextlib.redirect_stdout(messages),
        contextlib.redirect_stderr(messages),
    ):
        try:
            InversionCLI([*_arguments(sweep, cell), *again], models)
        except Exception:
            messages.write(traceback.format_exc())
            raise
    if not sweep.rows(cell):
        raise RuntimeError(f"the run wrote no row; see {MESSAGES} in its folder")


def _share(sweep: Sweep, processes: int, report: Callable[[], None]) -> None:
    """Let so many processes take the cells up, with one thread each."""
    command = [sys.executable, "-m", "lightning_inversion", "sweep", "--join", str(sweep.path)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = subprocess.DEVNULL
    workers = [
        subprocess.Popen(command, env=one_thread, stdout=quiet, stderr=quiet)
        for _ in range(processes)
    ]
    try:
        while any(worker.poll() is None for worker in workers):
            time.sleep(0.2)
            report()
    finally:
        for worker in workers:
            worker.terminate()
            worker.wait()
    report()


@contextmanager
def _cells_bar(sweep: Sweep, left: list[Cell]) -> Iterator[Callable[[], None]]:
    """A bar on a terminal; what it yields writes a line for each cell that has ended since."""
    console = Console(file=sys.stderr)  # of now: a cell redirects it
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("cells"), TimeRemainingColumn()
    with Progress(
        *columns, console=console, transient=True, redirect_stdout=False,
        disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("cells", total=len(left))
        running = list(left)

        def report() -> None:
            for cell in list(running):
                status = sweep.status(cell)
                if status.state == "waiting":
                    continue
                running.remove(cell)
                bar.advance(task)
                _log.info("%s: %s in %s%s", cell.name, status.state,
                          readable_time(status.seconds), _summary(sweep, cell))  # fmt: skip

        yield report


def _summary(sweep: Sweep, cell: Cell) -> str:
    """The means of a cell's rows."""
    rows = sweep.rows(cell)
    means = {
        name: [float(value) for row in rows if (value := getattr(row, name)) is not None]
        for name in ("token_accuracy", "exact", "verified")
    }
    return "".join(f", {name} {mean(values):.3f}" for name, values in means.items() if values)
