"""``checkpoints/last.ckpt``: the input and where the run stands."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_inversion.errors import InputError
from lightning_inversion.module import InputInversion

ENDED = "batch_has_ended"
"""Key of a checkpoint, true where its batch had ended."""


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
