"""The cells of a sweep are run here: through the command line's own class, in this process."""

from __future__ import annotations

import contextlib
import inspect
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from lightning_inversion.cli.lightning import InversionCLI, quiet_lightning
from lightning_inversion.cli.resume import FITTED, PREDICTED, differences
from lightning_inversion.errors import InputError
from lightning_inversion.module import InputInversion
from lightning_inversion.results import FILE, read_rows
from lightning_inversion.sweep.folder import MESSAGES, SweepFolder
from lightning_inversion.sweep.grid import Cell
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.shared import SharedModels

MODEL_KEYS = frozenset(inspect.signature(InputInversion.__init__).parameters) - {"self"}
"""The words that stand under ``model.`` in a config."""
_PROBED = 10
"""Iterations after which the cost of one is known."""


class CheckedRun(InversionCLI):
    """A command that is parsed and checked as it would be run, and not run."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing more."""

    @property
    def settings(self) -> Any:
        """What the run's config.yaml would hold."""
        config = self.parser.dump(self.config, skip_none=False)
        return yaml.safe_load(config)[self.subcommand]


class TimedRun(InversionCLI):
    """A command whose iterations are timed."""

    def after_instantiate_classes(self) -> None:
        """Note when each iteration begins."""
        super().after_instantiate_classes()
        self.iterations: list[float] = []
        step = self.model.training_step

        def timed_step(*args: Any) -> Any:
            self.iterations.append(time.perf_counter())
            return step(*args)

        self.model.training_step = timed_step


def spec_of(command: str, arguments: Sequence[str]) -> TransformerSpec:
    """The model that a command's options name.

    Raises:
        InputError: the options are wrong.
    """
    quiet_lightning()
    with tempfile.TemporaryDirectory() as folder:
        run = CheckedRun([command, *arguments, *_logger(Path(folder), "checked", "only")])
    spec: TransformerSpec = run.model.spec
    return spec


def check(sweep: SweepFolder) -> list[TransformerSpec]:
    """Parse and check every cell before the first one runs; returns the specs of their models.

    Raises:
        InputError: a cell's options are wrong, or its folder holds a run with others.
    """
    quiet_lightning()
    specs = []
    for cell in sweep.cells:
        run = CheckedRun([cell.command, *cell.arguments, *_place(sweep, cell)])
        stored = sweep.of(cell) / (PREDICTED if cell.command == "predict" else FITTED)
        if stored.exists():
            different = differences(yaml.safe_load(stored.read_text("utf-8")), run.settings)
            if different:
                raise InputError(
                    f"{str(stored.parent)!r} was made with another {different[0]}; "
                    "give the sweep another --name, or remove the folder."
                )
        specs.append(run.model.spec)
    return specs


def work(
    sweep: SweepFolder, specs: Sequence[TransformerSpec], ended: Callable[[], None]
) -> dict[str, str]:
    """Run every cell that is neither done nor another process's.

    Args:
        sweep: whose cells to run.
        specs: of the cells' models, so that the deepest is loaded at once.
        ended: is called after each cell.

    Returns:
        The messages of the cells that failed, by name.
    """
    models = SharedModels(specs)
    failed = {}
    for cell in sweep.cells:
        with sweep.claimed(cell) as ours:
            if not ours:
                continue
            try:
                with sweep.timed(cell):
                    _run(sweep, cell, models)
            except Exception as error:  # one cell's failure is not the others'
                failed[cell.name] = f"{type(error).__name__}: {error}"
        ended()
    return failed


def probe(cell: Cell) -> float | None:
    """Seconds of a cell, from its first few iterations; its folder is not touched.

    Of a command without iterations: from its first batch of prompts; None where it is not known
    how many there are. A fit that stops early takes less, and other prompts may take more.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = _logger(Path(folder), "probe", "first")
        whole = CheckedRun([cell.command, *cell.arguments, *place])
        iterations = whole.model.iterations
        few = (
            ["--trainer.max_epochs=1", f"--model.iterations={min(_PROBED, iterations)}"]
            if cell.command == "fit"
            else ["--trainer.limit_predict_batches=1"]
        )
        began = time.perf_counter()
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
            run = TimedRun([cell.command, *cell.arguments, *place, *few])
        seconds = time.perf_counter() - began
        rows = len(read_rows(Path(folder) / "probe" / "first" / FILE))
    prompts = len(getattr(whole.datamodule, "texts", ()))
    if not rows or not prompts:
        return None
    batches = -(-prompts // rows)
    begun = run.iterations
    if len(begun) < 2:
        return seconds * batches
    each = statistics.median(b - a for a, b in pairwise(begun))
    return seconds + each * (int(iterations) * batches - len(begun))


def _run(sweep: SweepFolder, cell: Cell, models: SharedModels) -> None:
    """One cell as a command of its own would run it, what it says going to a file in its folder."""
    folder = sweep.of(cell)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    again = [f"--ckpt_path={checkpoint}"] if checkpoint.exists() and cell.command == "fit" else []
    with (
        (folder / MESSAGES).open("a", encoding="utf-8") as messages,
        contextlib.redirect_stdout(messages),
        contextlib.redirect_stderr(messages),
    ):
        try:
            InversionCLI([cell.command, *cell.arguments, *_place(sweep, cell), *again], models)
        except Exception:
            messages.write(_traceback())
            raise


def _place(sweep: SweepFolder, cell: Cell) -> list[str]:
    return _logger(sweep.path.parent, sweep.path.name, cell.name)


def _logger(root: Path, name: str, version: str) -> list[str]:
    """Options that make a run's folder ``root/name/version``."""
    return [
        "--trainer.logger=lightning.pytorch.loggers.TensorBoardLogger",
        f"--trainer.logger.save_dir={root}",
        f"--trainer.logger.name={name}",
        f"--trainer.logger.version={version}",
    ]


def _traceback() -> str:
    import traceback

    return traceback.format_exc()
