"""The source's learning rate: it falls linearly from eta to eta / 100."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from lightning_inversion.errors import InputError
from lightning_inversion.inversion import linear_rate
from lightning_inversion.module import InputInversion


class LinearLearningRate(Callback):
    """Moves the learning rate linearly over the iterations of each epoch.

    Args:
        start: multiple of the optimiser's own learning rate at the first iteration.
        end: multiple at the last iteration; the source's page ends at 1/100, its Part II at 1/10.
        in_embedding_std: the optimiser's learning rate is in std of the embedding, so that one
            value suits models whose embeddings differ in size.
    """

    def __init__(
        self, start: float = 1.0, end: float = 0.01, in_embedding_std: bool = False
    ) -> None:
        if min(start, end) < 0:
            raise InputError(
                f"learning_rate.start and learning_rate.end must not be negative, and are {start} "
                f"and {end}."
            )
        self.start, self.end, self.in_embedding_std = start, end, in_embedding_std

    def factor(self, iteration: int, iterations: int) -> float:
        """The multiple at ``iteration`` (from 0) of ``iterations``."""
        return linear_rate(self.start, self.end, iteration, iterations)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Set the rate of the step that follows."""
        assert isinstance(pl_module, InputInversion)
        period = pl_module.schedule.period(pl_module.iterations)
        factor = self.factor(pl_module.state.iteration % period, period)
        if self.in_embedding_std:
            factor *= pl_module.embedding.std
        for group in optimizer.param_groups:
            base: Any = group.setdefault("initial_lr", group["lr"])
            group["lr"] = base * factor
        if pl_module.logs_now:
            pl_module.report({"optimizer/learning_rate": optimizer.param_groups[0]["lr"]})
