"""How a text is recovered token by token: what every policy is given, and what it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from lightning_inversion.recovery.measurements import Measurements
from torch import Tensor

from lightning_inversion.recovery.certificate import RecoveredPrompt


class RecoveryPolicy(ABC):
    """Names the tokens of a batch of texts from left to right.

    Attributes:
        needs_language_model: whether it asks for the whole model.
        takes_start: whether what a fit has arrived at helps it.
    """

    needs_language_model: bool = False
    takes_start: bool = False

    @property
    def name(self) -> str:
        """How result files call it."""
        return type(self).__name__

    @abstractmethod
    def recover(
        self,
        measurements: Measurements,
        target: Tensor,
        lengths: list[int],
        known: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Iterator[list[RecoveredPrompt]]:
        """Recover B texts; yields their state after each round, the same list, to the end.

        Args:
            measurements: what was measured for the model.
            target: ``[B, T, F]`` features to reproduce.
            lengths: tokens of each text.
            known: ``[N]`` tokens with which every text begins.
            start: ``[B, T, D]`` vectors that a fit has arrived at, nan where there are none; only
                where ``takes_start``.
        """


def recovered(
    policy: RecoveryPolicy,
    measurements: Measurements,
    target: Tensor,
    lengths: list[int],
    known: Tensor | None = None,
    watch: Callable[[list[RecoveredPrompt]], None] | None = None,
    start: Tensor | None = None,
) -> list[RecoveredPrompt]:
    """What a policy recovers in the end; ``watch`` is shown each round."""
    texts: list[RecoveredPrompt] = []
    with torch.no_grad():
        for texts in policy.recover(measurements, target, lengths, known, start):
            if watch is not None:
                watch(texts)
    return texts
