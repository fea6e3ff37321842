"""Which run a command goes on with, and from which of its checkpoints."""

import sys
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning import Trainer

from lightning_inversion import strategy
from lightning_inversion.errors import InputError
from lightning_inversion.result_files import read_rows

FITTED = "config.yaml"
"""The settings of a fit, in its run's folder."""
PREDICTED = "predict.yaml"
"""The settings of a predict, in its run's folder."""
RESUMING = ("ckpt_path", "logger", "devices", "num_nodes", "strategy")
"""Keys in which a run may differ from the one that it continues: they change no row."""


def unfinished_checkpoint(path: Path, trainer: Trainer) -> str | None:
    """This process's checkpoint of a run, unless its rows are on disk: then there is none.

    Checkpoints of processes that are no more are removed, and their batches begin again.
    """
    mine = strategy.checkpoint_of(str(path), strategy.rank_of(trainer))
    if strategy.rank_of(trainer) == 0:
        for rank in range(trainer.world_size, len(list(path.parent.glob("*"))) + 1):
            Path(strategy.checkpoint_of(str(path), rank)).unlink(missing_ok=True)
    if not Path(mine).exists():
        if mine == str(path) and not path.parent.parent.joinpath("config.yaml").exists():
            raise InputError(f"--ckpt_path {mine!r} does not exist; name a checkpoint, or last.")
        return None
    try:
        checkpoint = torch.load(mine, map_location="cpu", weights_only=True)
        running = set(checkpoint.get("batch", {}).get("index", ()))
    except (OSError, RuntimeError, ValueError, EOFError, UnpicklingError) as error:
        print(f"{mine} cannot be read ({' '.join(str(error).split())[:60]}); "
              "its batch begins again.", file=sys.stderr)  # fmt: skip
        return None
    rows = {row["index"] for row in read_rows(path.parent.parent / "results.jsonl")}
    return None if running <= rows else mine


def newest_run(root: Path, settings: str = FITTED) -> Path | None:
    """The ``version_N`` folder under ``root`` with the highest N that holds such a config."""
    runs = [run for run in root.glob("version_*") if (run / settings).exists()]
    return max(runs, key=lambda run: int(run.name.removeprefix("version_")), default=None)


def differences(
    ours: Any, theirs: Any, key: str = "", ignored: tuple[str, ...] = RESUMING
) -> list[str]:
    """The keys in which two configs differ, but for those that say how to resume."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [
            name
            for part in sorted({*ours, *theirs})
            if part not in ignored
            for name in differences(
                ours.get(part), theirs.get(part), f"{key}.{part}" if key else part, ignored
            )
        ]
    return [] if ours == theirs else [key]
