"""The source's stopping criterion: ||O(a_g) - O(a)|| < ||O(a') - O(a)||."""

from __future__ import annotations

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

    Meeting the criterion does not show that tokens are right: a' is not a token, and its distance
    from a is arbitrary beside the distance between tokens. Read it beside the token accuracy.
    Captured targets without their prompts have no a': nothing is reported, and no row stops.

    Args:
        perturbation: what makes a' of a; the source's is Gaussian with std 1/20.
        stop: False reports the criterion and lets the row continue.
        threshold: the distance ratio below which the criterion is met; the source's is 1.
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
        self._perturbed: tuple[tuple[int, ...], Tensor] | None = None

    def perturbed_distance(self, module: InputInversion) -> Tensor:
        """||O(a') - O(a)||_1 of each row ``[B]``, computed once for a batch."""
        batch, target = module.state.batch, module.state.target
        assert batch.ids is not None
        assert target is not None
        if self._perturbed is None or self._perturbed[0] != batch.index:
            values = self.perturbation(
                batch.ids, module.noise("shift"), module.learnable, module.embedding
            )
            distance = row_distance(module.features_of(values, batch.mask), target, batch.mask)
            self._perturbed = (batch.index, distance)
        return self._perturbed[1]

    @torch.no_grad()
    def judge(self, module: InputInversion, compute: bool = True) -> None:
        """Compare the input as it stands with the criterion; doing so twice changes nothing.

        Args:
            module: whose rows are judged.
            compute: run the model where the latest iteration did not run whole rows; else the rows
                are not judged there.
        """
        state = module.state
        if state.is_empty or state.batch.ids is None:
            return
        features = module.features(compute)
        if features is None:
            return
        assert state.target is not None
        distance = row_distance(features, state.target, state.batch.mask)
        ratio = distance / self.perturbed_distance(module)
        met = ratio < self.threshold
        module.record_ratio(ratio, met)
        if self.stop:
            module.stop_rows(met)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Judge the input whose features were just computed, before the step moves it.

        Where an iteration runs only a few positions of each row, whole rows are run for this every
        ``log_every`` iterations.
        """
        assert isinstance(pl_module, InputInversion)
        now = pl_module.state.iteration % self.log_every == 0
        self.judge(pl_module, compute=now)
        if now:
            self._report(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge where the last step has left the input."""
        assert isinstance(pl_module, InputInversion)
        self.judge(pl_module)
        self._report(pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        """Judge a stored input."""
        assert isinstance(pl_module, InputInversion)
        self.judge(pl_module)

    @staticmethod
    def _report(module: InputInversion) -> None:
        if not module.state.is_empty and module.state.batch.ids is not None:
            module.report({"match/distance_ratio": float(module.state.ratio.mean())})
