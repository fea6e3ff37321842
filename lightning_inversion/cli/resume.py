"""Which run a command continues, and from which of its checkpoints."""

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer

from lightning_inversion import strategy
from lightning_inversion.callbacks.checkpoint import ENDED
from lightning_inversion.data.prompts import PromptDataModule
from lightning_inversion.errors import InputError
from lightning_inversion.results import FILE, FITTED, read_rows
from lightning_inversion.state import BatchState
from lightning_inversion.untrusted import check_regular, read_file, read_yaml

RESUMING = ("name", "ckpt_path", "default_root_dir", "logger", "devices", "num_nodes", "strategy")
"""Keys in which a run may differ from the one that it continues: they change no row."""
HOW_IT_RUNS = ("device_map", "checkpointing", "compile")
"""Keys of model.transformer in which a fit and what reads its input may differ."""
_OF_LIGHTNING = {
    "pytorch-lightning_version": str, "state_dict": dict, "loops": dict, "callbacks": dict,
    "epoch": int, "global_step": int, "optimizer_states": list, "lr_schedulers": list,
}  # fmt: skip
"""Keys of a checkpoint that Lightning reads, and the types of their values."""
_OF_A_FIT = ("seed_everything", "learning_rate", "stopping", "results")
"""Parts of a config that decide the rows of a fit, beside its model."""
_log = logging.getLogger(__name__)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint of a fit holds, on the CPU.

    Raises:
        InputError: there is no whole checkpoint.
    """
    reason = "it is no whole checkpoint"
    try:
        check_regular(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        data = checkpoint.get(PromptDataModule.__qualname__, {})
        whole = all(isinstance(checkpoint[key], kind) for key, kind in _OF_LIGHTNING.items())
        if whole and isinstance(data.get("questions", {}), dict):
            if "state" in checkpoint:
                BatchState.from_checkpoint(checkpoint["state"], torch.device("cpu"))
            assert isinstance(checkpoint, dict)
            return checkpoint
    except OSError as error:
        reason = error.strerror or reason
    except Exception:  # on bytes of any other kind torch fails in many ways
        pass
    raise InputError(f"--ckpt_path {str(path)!r} cannot be read: {reason}; "
                     "name a checkpoint of a fit.")  # fmt: skip


def read_stored_input(path: Path, asked: dict[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    """What a checkpoint holds for a command that only reads its input.

    Args:
        path: of the checkpoint.
        asked: the settings of the command.
        parts: of the model, in which the fit must have had the same settings.

    Raises:
        InputError: it cannot be read, holds no input, or is of a fit with other settings.
    """
    checkpoint = read_checkpoint(path)
    if "state" not in checkpoint:
        raise InputError(f"--ckpt_path {str(path)!r} holds no input; name a checkpoint of a fit.")
    settings = path.parent.parent / FITTED
    if settings.exists():
        fitted = read_settings(settings).get("model", {})
        for part in parts:
            theirs = asked["model"].get(part)
            different = differences(fitted.get(part), theirs, f"model.{part}", HOW_IT_RUNS)
            if different:
                raise InputError(
                    f"--ckpt_path {str(path)!r} was made with another --{different[0]}; use the "
                    f"settings in {str(settings)!r}, or name another checkpoint."
                )
    return checkpoint


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that an earlier run left.

    Raises:
        InputError: they cannot be read.
    """
    try:
        settings = read_yaml(read_file(path))
    except (OSError, ValueError) as error:
        raise _no_settings(path) from error
    if not isinstance(settings, dict):
        raise _no_settings(path)
    return settings


def _no_settings(path: Path) -> InputError:
    return InputError(
        f"--ckpt_path: {str(path)!r} cannot be read as the settings of a run; restore it, or leave "
        "--ckpt_path out."
    )


def unfinished_checkpoint(path: Path, trainer: Trainer, questions: Sequence[str]) -> str | None:
    """This process's checkpoint of a run, unless its batch has ended: then there is none.

    A batch that has ended and whose rows are not on disk any more begins again: its input would be
    moved beyond what was asked for.

    Checkpoints of processes beyond the present number are removed, and their batches begin again.

    Args:
        path: of the first process's checkpoint.
        trainer: of the run.
        questions: the digest of what each row is to recover.

    Raises:
        InputError: the checkpoint is of other prompts, or cannot be read and is of no run.
    """
    if not path.name:
        raise InputError(f"--ckpt_path {str(path)!r} is a folder; name a checkpoint, or last.")
    mine = strategy.checkpoint_of(str(path), strategy.rank_of(trainer))
    if strategy.rank_of(trainer) == 0:
        for rank in range(trainer.world_size, len(list(path.parent.glob("*"))) + 1):
            Path(strategy.checkpoint_of(str(path), rank)).unlink(missing_ok=True)
    run_is_there = path.parent.parent.joinpath(FITTED).exists()
    if not Path(mine).exists():
        if mine == str(path) and not run_is_there:
            raise InputError(f"--ckpt_path {mine!r} does not exist; name a checkpoint, or last.")
        return None
    try:
        checkpoint = read_checkpoint(Path(mine))
    except InputError:
        if not run_is_there:
            raise
        _log.warning("%s is no whole checkpoint; its batch begins again.", mine)
        return None
    batch = checkpoint["state"]["batch"] if "state" in checkpoint else {"index": []}
    asked = checkpoint.get(PromptDataModule.__qualname__, {}).get("questions", {})
    if any(questions[row : row + 1] != [question] for row, question in asked.items()):
        raise InputError(
            f"--ckpt_path {mine!r} is of other prompts; restore them, or leave --ckpt_path out."
        )
    running = set(batch["index"])
    rows = {row.index for row in read_rows(path.parent.parent / FILE)}
    return None if running <= rows or checkpoint.get(ENDED, False) else mine


def last_run(root: Path, settings: str, differ: Callable[[dict[str, Any]], Sequence[str]]) -> Path:
    """The run of ``--ckpt_path last``: the newest with the settings of the command.

    Args:
        root: the folder that holds the runs, each a ``version_N``.
        settings: the file of a run that holds its settings.
        differ: in what a run's settings differ from the command's.

    Returns:
        The newest run of all where none has these settings.

    Raises:
        InputError: there is no run.
    """
    runs = {
        int(found[1]): run
        for run in root.glob("version_*")
        if (found := re.fullmatch(r"version_(\d+)", run.name)) and (run / settings).exists()
    }
    newest_first = [runs[number] for number in sorted(runs, reverse=True)]
    if not newest_first:
        raise InputError(f"--ckpt_path last finds no run under {str(root)!r}; leave it out.")
    for run in newest_first:
        try:
            if not differ(read_settings(run / settings)):
                return run
        except InputError:  # of another run, perhaps; the newest is read again
            continue
    return newest_first[0]


def check_continues(run: Path, settings: str, asked: dict[str, Any]) -> None:
    """Refuse to continue a run with other settings, or one whose rows are damaged.

    Args:
        run: its folder.
        settings: the file in it that holds its settings.
        asked: the settings of the command.

    Raises:
        InputError: the settings differ, or a file cannot be read.
    """
    different = differences(read_settings(run / settings), asked)
    if different:
        raise InputError(
            f"--ckpt_path last continues {str(run)!r}, which was made with another "
            f"--{different[0]}; use its settings, or leave --ckpt_path out."
        )
    read_rows(run / FILE)


def deciding(command: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a command that decide its rows, beside the prompts.

    Args:
        command: fit or predict.
        settings: all of them, as the run's folder keeps them.
    """
    model = settings["model"]
    transformer = {k: v for k, v in model["transformer"].items() if k not in HOW_IT_RUNS}
    if command == "predict":
        parts: dict[str, Any] = {"recovery": model["recovery"], "seed": settings["seed_everything"]}
    else:
        own = {k: v for k, v in model.items() if k not in ("recovery", "transformer")}
        parts = {"model": own, **{part: settings[part] for part in _OF_A_FIT}}
    return {"command": command, "transformer": transformer, **parts}


def differences(
    ours: Any, theirs: Any, key: str = "", ignored: tuple[str, ...] = RESUMING
) -> list[str]:
    """The keys in which two configs differ, except for those that may differ in a resumed run."""
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
