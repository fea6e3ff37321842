"""What is measured once for a frozen model, and used for every text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from lightning_inversion.recovery.calibration import Calibration, Channel
from lightning_inversion.transformer.language_model import LanguageModel, own_text
from lightning_inversion.transformer.linear_probe import LinearProbe
from lightning_inversion.transformer.truncated import TruncatedTransformer


def say_nothing(what: str) -> None:
    """Where nobody waits to be told."""


@dataclass(frozen=True)
class Measurements:
    """What is measured once for a model, and used for every text.

    Attributes:
        transformer: the frozen model; causal.
        probe: its linear guess.
        calibration: when a target counts as reproduced.
        language_model: the whole model; None where no order asks for it.
        text: ``[N, T]`` ids that it wrote; None without it.
        say: is told what begins, where it is slow.
    """

    transformer: TruncatedTransformer
    probe: LinearProbe
    calibration: Calibration
    language_model: LanguageModel | None = None
    text: Tensor | None = None
    say: Callable[[str], None] = field(default=say_nothing, repr=False, compare=False)

    @classmethod
    def measure(
        cls,
        transformer: TruncatedTransformer,
        language_model: LanguageModel | None = None,
        channel: Channel | None = None,
        say: Callable[[str], None] = say_nothing,
    ) -> Measurements:
        """Everything for a model; the text it writes is kept in the cache folder.

        Args:
            transformer: the frozen model.
            language_model: the whole model, of the same weights.
            channel: what has happened to the targets.
            say: is told what begins, where it is slow.
        """
        say("measuring the linear map from features to tokens")
        text = None if language_model is None else own_text(language_model)
        probe = LinearProbe.fit(transformer, text=text)
        say("measuring how exactly a token reproduces its features")
        calibration = Calibration.measure(transformer, probe, channel, text)
        return cls(transformer, probe, calibration, language_model, text, say)
