"""The document's stopping criterion: ||O(a_g) - O(a)|| < ||O(a') - O(a)||."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_inversion.errors import InputError
from lightning_inversion.inputs import GaussianPerturbation, Perturbation
from lightning_inversion.metrics import row_distance
from lightning_inversion.module import InputInversion


class StoppingCriterion(Callback):
    """Watches each row's distance ratio, and stops the row when it falls below the threshold.

    Meeting the criterion says nothing about the tokens: a' is not a token, and how far it lies
    from a is arbitrary beside the distance between tokens. Read it beside the token accuracy.
    Captured targets of prompts that are not known have no a': nothing is reported, no row stops.

    Args:
        perturbation: what a' is; the document's is a Gaussian shift of 1/20.
        stop: False reports the criterion and lets the row go on.
        threshold: the distance ratio below which the criterion is met; the document's is 1.
        log_every: iterations between two values of the ratio in TensorBoard.
    """

    def __init__(
        self,
        perturbation: Perturbation | None = None,
        stop: bool = True,
        threshold: float = 1.0,
        log_every: int = 10,
    ) -> None:
        if threshold <= 0 or log_every < 1:
            raise InputError(
                f"stopping.threshold must be positive and stopping.log_every at least 1; they are "
                f"{threshold} and {log_every}."
            )
        self.perturbation = perturbation or GaussianPerturbation()
        self.stop, self.threshold, self.log_every = stop, threshold, log_every
        self._shifted: tuple[tuple[int, ...], Tensor] | None = None

    def shifted_distance(self, module: InputInversion) -> Tensor:
        """||O(a') - O(a)||_1 of each row ``[B]``, computed once for a batch."""
        batch = module.batch
        assert batch is not None
        assert batch.ids is not None
        if self._shifted is None or self._shifted[0] != batch.index:
            values = self.perturbation(
                batch.ids, module.noise("shift"), module.learnable, module.embedding
            )
            distance = row_distance(module.features_of(values), module.target, batch.mask)
            self._shifted = (batch.index, distance)
        return self._shifted[1]

    @torch.no_grad()
    def judge(self, module: InputInversion, features: Tensor) -> None:
        """Note each row's distance ratio, and whether it meets the criterion for the first time.

        Args:
            module: whose rows are judged.
            features: ``[B, T, F]`` of its input as it stands.
        """
        assert module.batch is not None
        if module.batch.ids is None:
            return
        progress = module.progress
        distance = row_distance(features, module.target, module.batch.mask)
        progress.ratio = distance / self.shifted_distance(module)
        first = (progress.ratio < self.threshold) & (progress.met_at < 0)
        # A row that has ended was as it is now when it did.
        at = progress.stopped_at.where(progress.stopped, module.iteration)
        progress.met_at[first] = at[first]
        if self.stop:
            module.stop_rows(progress.met_at >= 0)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Judge the input whose features were just computed, before it moves on.

        Where an iteration runs a few positions of each row alone, the others are run for this
        every ``log_every`` iterations.
        """
        assert isinstance(pl_module, InputInversion)
        if pl_module.features is not None:
            self.judge(pl_module, pl_module.features)
        elif pl_module.iteration % self.log_every == 0:
            self._judge_values(pl_module)
        if pl_module.iteration % self.log_every == 0:
            self._log(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge where the last step has left the input; a batch that was given up has none."""
        assert isinstance(pl_module, InputInversion)
        if pl_module.batch is not None:
            self._judge_values(pl_module)
            self._log(trainer, pl_module)

    @staticmethod
    def _log(trainer: Trainer, module: InputInversion) -> None:
        judged = module.batch is not None and module.batch.ids is not None
        if judged and trainer.logger is not None:
            ratio = float(module.progress.ratio.mean())
            trainer.logger.log_metrics({"match/distance_ratio": ratio}, module.step)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        """Judge a stored input."""
        self._judge_values(pl_module)

    def _judge_values(self, module: LightningModule) -> None:
        assert isinstance(module, InputInversion)
        with torch.no_grad():
            if module.features is None:
                module.features = module.generated()
            self.judge(module, module.features)
