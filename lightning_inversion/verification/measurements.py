"""``Measurements``: what is measured once for a frozen model, and used for every prompt."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, is_dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

from torch import Tensor

from lightning_inversion.transformer.cached import kept
from lightning_inversion.transformer.language_model import LanguageModel, own_text
from lightning_inversion.transformer.linear_probe import LinearProbe, Moments
from lightning_inversion.transformer.selection import slice_of
from lightning_inversion.transformer.truncated import TruncatedTransformer
from lightning_inversion.verification.calibration import Calibration, Channel
from lightning_inversion.verification.held_out import HeldOutRuns
from lightning_inversion.verification.recognition import recognised

_log = logging.getLogger(__name__)
_NARROW = 1024
"""Features up to which sums and features of runs are kept; those of wide models take gigabytes."""
T = TypeVar("T")


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
        identity: what they were measured of, by which the cache folder keeps them; None where it
            does not.
        channel: what has happened to the targets.
    """

    transformer: TruncatedTransformer
    probe: LinearProbe
    calibration: Calibration
    language_model: LanguageModel | None = None
    text: Tensor | None = None
    identity: dict[str, Any] | None = None
    channel: Channel | None = None
    _derived: dict[type, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def derived(self, kind: type[D]) -> D:
        """What ``kind.of`` computes from these measurements, computed when first asked for."""
        if kind not in self._derived:
            self._derived[kind] = kind.of(self)
        found: D = self._derived[kind]
        return found

    def kept(self, kind: type[T], build: Callable[[], T], *tensors: Tensor | None) -> T:
        """What ``build`` computes from the model and from tensors, kept in the cache folder.

        The tensors tell apart what is computed of one model: name all that it depends on.
        """
        return _kept(self.identity, kind, build, self.transformer, tensors=_digest(*tensors))

    def probe_of(self, text: Tensor | None) -> LinearProbe:
        """A linear probe for the same channel, fitted on other text ``[N, T]``.

        The tokens that every probe is fitted on are not run again.
        """
        sums = _Runs(self.transformer).moments
        return LinearProbe.fit(self.transformer, text=text, **_told(self.channel), sums=sums)

    @classmethod
    def measure(
        cls,
        transformer: TruncatedTransformer,
        language_model: LanguageModel | None = None,
        channel: Channel | None = None,
        first_alone: bool = False,
    ) -> Measurements:
        """Measure everything for a model, or read what was measured from the cache folder.

        Args:
            transformer: the frozen model.
            language_model: the whole model, of the same weights.
            channel: what has happened to the targets; only where it is a dataclass, or None, is the
                calibration kept.
            first_alone: measure position 0 in a fraction of the time; later ones count as it.
        """
        text = None if language_model is None else own_text(language_model)
        told = {**_told(channel), "first_alone": first_alone}
        identity, digest = recognised(transformer), _digest(text)
        runs = _Runs(transformer)

        def fit() -> LinearProbe:
            _log.info("fitting the linear probe from hidden states to embeddings ...")
            return LinearProbe.fit(transformer, text=text, **told, sums=runs.moments)

        def calibrate() -> Calibration:
            _log.info("calibrating verification thresholds ...")
            held_out = runs.held_out(text, first_alone)
            return Calibration.measure(transformer, probe, channel, text, held_out)

        probe = _kept(identity, LinearProbe, fit, transformer, text=digest, **told)
        plain = channel is None or is_dataclass(channel)
        calibration = _kept(
            identity if plain else None, Calibration, calibrate, transformer,
            text=digest, channel=None if channel is None else repr(channel),
            first_alone=first_alone,
        )  # fmt: skip
        if calibration.is_too_sparse and not first_alone:
            _log.warning(
                "%d of the %d features of a position are kept, which is too few to verify a token.",
                calibration.features, calibration.std.shape[1],
            )  # fmt: skip
        return cls(transformer, probe, calibration, language_model, text, identity, channel)


class _Runs:
    """What a model was run on to be measured, for every channel and slice of its features.

    Args:
        transformer: the frozen model.
    """

    def __init__(self, transformer: TruncatedTransformer) -> None:
        cut = transformer.selection.features
        self._slice = slice(None) if cut is None else slice_of(cut)
        self._whole = transformer if cut is None else transformer.uncut()

    @cached_property
    def _identity(self) -> dict[str, Any] | None:
        return recognised(self._whole) if self._whole.feature_size <= _NARROW else None

    def moments(
        self,
        transformer: TruncatedTransformer,
        sequences: Sequence[Tensor],
        first: int,
        largest: float,
    ) -> Moments:
        """``Moments.of`` ids; which features are the largest depends on the slice."""
        whole, cut, identity = self._whole, self._slice, self._identity
        if largest < 1:
            whole, cut, identity = transformer, slice(None), identity and recognised(transformer)
        found = _kept(
            identity, Moments, lambda: Moments.of(whole, sequences, first, largest), whole,
            ids=_digest(*sequences), first=first, largest=largest,
        )  # fmt: skip
        return found.of_slice(cut)

    def held_out(self, text: Tensor | None, first_alone: bool) -> HeldOutRuns:
        """Held-out prompts, half of them of text ``[N, T]``."""
        whole = self._whole
        found = _kept(
            self._identity, HeldOutRuns,
            lambda: HeldOutRuns.measure(whole, text, first_alone=first_alone), whole,
            text=_digest(text), first_alone=first_alone,
        )  # fmt: skip
        return found.of_slice(self._slice)


def _kept(
    identity: dict[str, Any] | None,
    kind: type[T],
    build: Callable[[], T],
    transformer: TruncatedTransformer,
    **more: Any,
) -> T:
    if identity is None:
        return build()
    return kept(kind, {**identity, **more}, build, transformer.device)


def _told(channel: Channel | None) -> dict[str, Any]:
    """What a probe depends on of a channel."""
    if channel is None:
        return {"noise": 0.0, "largest": 1.0}
    return {"noise": channel.noise, "largest": channel.largest}


def _digest(*tensors: Tensor | None) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
