"""``Measurements``: what is measured once for a frozen model, and used for every prompt."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor

from lightning_inversion.recovery.calibration import Calibration, Channel
from lightning_inversion.transformer.language_model import LanguageModel, own_text
from lightning_inversion.transformer.linear_probe import LinearProbe
from lightning_inversion.transformer.truncated import TruncatedTransformer

_log = logging.getLogger(__name__)


class Derived(Protocol):
    """What can be computed from the measurements of a model, once."""

    @classmethod
    def of(cls, measurements: Measurements) -> Any:
        """Compute the value from the measurements of a model."""


D = TypeVar("D", bound=Derived)


@dataclass(frozen=True)
class Measurements:
    """What is measured once for a frozen model, and used for every prompt.

    Attributes:
        transformer: the frozen model.
        probe: its linear probe.
        calibration: when a target counts as reproduced.
        language_model: the whole model; None where no proposer uses it.
        text: ``[N, T]`` ids that it wrote; None without it.
    """

    transformer: TruncatedTransformer
    probe: LinearProbe
    calibration: Calibration
    language_model: LanguageModel | None = None
    text: Tensor | None = None
    _derived: dict[type, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def derived(self, kind: type[D]) -> D:
        """What ``kind.of`` computes from these measurements, computed when first asked for."""
        if kind not in self._derived:
            self._derived[kind] = kind.of(self)
        found: D = self._derived[kind]
        return found

    @classmethod
    def measure(
        cls,
        transformer: TruncatedTransformer,
        language_model: LanguageModel | None = None,
        channel: Channel | None = None,
    ) -> Measurements:
        """Measure everything for a model; the text it writes is kept in the cache folder.

        Args:
            transformer: the frozen model.
            language_model: the whole model, of the same weights.
            channel: what has happened to the targets.
        """
        _log.info("fitting the linear probe from hidden states to embeddings ...")
        text = None if language_model is None else own_text(language_model)
        noise = 0.0 if channel is None else channel.noise
        probe = LinearProbe.fit(transformer, text=text, noise=noise)
        _log.info("calibrating verification thresholds ...")
        calibration = Calibration.measure(transformer, probe, channel, text)
        return cls(transformer, probe, calibration, language_model, text)
