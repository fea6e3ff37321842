"""How a text is recovered token by token: what every policy is given, and what it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_inversion.recovery.calibration import Calibration, Channel
from lightning_inversion.recovery.certificate import RecoveredText
from lightning_inversion.transformer.language_model import LanguageModel, own_text
from lightning_inversion.transformer.readout import Readout
from lightning_inversion.transformer.truncated import TruncatedTransformer


@dataclass(frozen=True)
class Instruments:
    """What is measured once for a model, and used for every text.

    Attributes:
        transformer: the frozen model; causal.
        readout: its linear guess.
        calibration: when a target counts as reproduced.
        language_model: the whole model; None where no order asks for it.
        text: ``[N, T]`` ids that it wrote; None without it.
    """

    transformer: TruncatedTransformer
    readout: Readout
    calibration: Calibration
    language_model: LanguageModel | None = None
    text: Tensor | None = None

    @classmethod
    def measure(
        cls,
        transformer: TruncatedTransformer,
        language_model: LanguageModel | None = None,
        channel: Channel | None = None,
    ) -> Instruments:
        """Everything for a model; the text it writes is kept in the cache folder.

        Args:
            transformer: the frozen model.
            language_model: the whole model, of the same weights.
            channel: what has happened to the targets.
        """
        text = None if language_model is None else own_text(language_model)
        readout = Readout.fit(transformer, text=text)
        calibration = Calibration.measure(transformer, readout, channel, text)
        return cls(transformer, readout, calibration, language_model, text)


class RecoveryPolicy(ABC):
    """Names the tokens of a batch of texts from left to right.

    Attributes:
        needs_language_model: whether it asks for the whole model.
    """

    needs_language_model: bool = False

    @property
    def name(self) -> str:
        """How result files call it."""
        return type(self).__name__

    @abstractmethod
    def recover(
        self,
        instruments: Instruments,
        target: Tensor,
        lengths: list[int],
        known: Tensor | None = None,
    ) -> Iterator[list[RecoveredText]]:
        """Recover B texts; yields their state after each round, the same list, to the end.

        Args:
            instruments: what was measured for the model.
            target: ``[B, T, F]`` features to reproduce.
            lengths: tokens of each text.
            known: ``[N]`` tokens with which every text begins.
        """


def recovered(
    policy: RecoveryPolicy,
    instruments: Instruments,
    target: Tensor,
    lengths: list[int],
    known: Tensor | None = None,
    watch: Callable[[list[RecoveredText]], None] | None = None,
) -> list[RecoveredText]:
    """What a policy recovers in the end; ``watch`` is shown each round."""
    texts: list[RecoveredText] = []
    with torch.no_grad():
        for texts in policy.recover(instruments, target, lengths, known):
            if watch is not None:
                watch(texts)
    return texts
