"""``checkpoints/last.ckpt``: the input and where the run stands."""

import io
import os
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_inversion.errors import InputError
from lightning_inversion.module import InputInversion

ENDED = "batch_has_ended"
"""Key of a checkpoint, true where its batch had ended."""


class CheckpointBeside(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it: a kill leaves the old one or the new.

    Lightning's own goes through the system's temporary folder, and checkpoints hold prompts.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a local file whole or not at all; Lightning writes to other places."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_name(f".{place.name}.{os.getpid()}")
        whole = io.BytesIO()
        torch.save(checkpoint, whole)  # into a file it would hide the system's error
        try:
            with part.open("wb") as file:
                file.write(whole.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            part.replace(place)
        finally:
            part.unlink(missing_ok=True)


class RunCheckpoint(ModelCheckpoint):
    """Keeps ``checkpoints/last.ckpt``: the input and where the run stands, to resume or validate.

    Args:
        every: iterations between two checkpoints.
    """

    def __init__(self, every: int = 50) -> None:
        if every < 1:
            raise InputError(f"checkpoint.every must be at least 1, and is {every}.")
        super().__init__(
            every_n_train_steps=every,
            save_top_k=0,
            save_last=True,
            enable_version_counter=False,
        )
        self._ended = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let checkpoints be written beside their place."""
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckpointBeside()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Skip the last iteration, from which Lightning would not resume, and empty epochs."""
        assert isinstance(pl_module, InputInversion)
        if not trainer.is_last_batch and not pl_module.state.is_empty:
            super().on_train_batch_end(trainer, pl_module, *args, **kwargs)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the finished input too."""
        self._ended = True
        super().on_train_end(trainer, pl_module)
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        self._ended = False

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Record whether the batch has ended: a fit does not resume from the end of a batch."""
        checkpoint[ENDED] = self._ended
