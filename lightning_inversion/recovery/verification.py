"""Verification: whether tokens reproduce the target, up to thresholds measured for the model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lightning_inversion.transformer.embedding import best_tokens
from lightning_inversion.transformer.language_model import LanguageModel, own_text
from lightning_inversion.transformer.linear_probe import LinearProbe
from lightning_inversion.transformer.prefix import KnownPrefix
from lightning_inversion.transformer.truncated import TruncatedTransformer

Channel = Callable[[Tensor], Tensor]
"""What happens to features on their way to the target: rounding, noise. ``[..., F] -> [..., F]``"""

_log = logging.getLogger(__name__)
_PROMPTS = 16
_LENGTH = 12
_NEIGHBOURS = 15
_RANDOM = 16
_CLEARANCE = 1.5
"""How many times the largest right residual the smallest wrong one must be to verify anything."""


@dataclass(frozen=True)
class Calibration:
    """Residuals of right and wrong tokens, measured on held-out prompts; the thresholds between.

    A residual is the root mean square over the features of their difference in std of each feature
    over random tokens: 1 is about the distance of another token. Unlike a difference relative to
    the norm, it is not dominated by a few massive activations.

    Each value has two entries: for position 0, which sees no other token, and for later ones.

    Attributes:
        std: ``[2, F]`` std of each feature.
        threshold: ``[2]`` the residual up to which a token is verified; 0 where right and wrong
            tokens cannot be distinguished.
        plausible: ``[2]`` the residual up to which a token may be right.
        right: ``[2]`` the largest residual of a right token.
        wrong: ``[2]`` the smallest residual of a wrong one, its 15 nearest embeddings included.
    """

    std: Tensor
    threshold: Tensor
    plausible: Tensor
    right: Tensor
    wrong: Tensor

    @property
    def verifies(self) -> bool:
        """Whether tokens can be verified at every position."""
        return bool((self.threshold > 0).all())

    def residual(self, features: Tensor, target: Tensor, positions: Tensor) -> Tensor:
        """Residual ``[...]`` of features ``[..., F]`` to a target ``[..., F]`` at positions."""
        std = self.std[positions.clamp(max=1)]
        return ((features - target) / std).square().mean(-1).sqrt()

    def reproduced(self, residuals: Tensor, positions: Tensor) -> Tensor:
        """Whether residuals ``[...]`` at positions ``[...]`` are within the threshold.

        A threshold of 0 verifies nothing.
        """
        threshold = self.threshold[positions.clamp(max=1)]
        return (residuals <= threshold) & (threshold > 0)

    @classmethod
    @torch.no_grad()
    def measure(
        cls,
        transformer: TruncatedTransformer,
        probe: LinearProbe,
        channel: Channel | None = None,
        text: Tensor | None = None,
        seed: int = 1,
    ) -> Calibration:
        """Run held-out prompts twice: whole, and token by token behind kept keys and values.

        A model that is not causal runs them whole twice, alone and beside others.

        Args:
            transformer: the frozen model.
            probe: for the std of each feature.
            channel: what has happened to the targets.
            text: ``[N, T]`` ids of text to use beside random tokens.
            seed: of the random tokens.
        """
        ids = _held_out(transformer, text, seed)
        target = transformer.features_of(ids)
        if channel is not None:
            target = channel(target)
        right = torch.zeros(2, device=target.device)
        wrong = torch.full((2,), torch.inf, device=target.device)
        rows = torch.arange(len(ids), device=ids.device)
        prefix = KnownPrefix(transformer, len(ids))
        unset = torch.zeros(2, device=target.device)
        measured = cls(probe.std, unset, unset, right, wrong)
        first_duplicate = transformer.embedding.first_duplicate.to(ids.device)
        # Without a causal mask each candidate takes a forward of its own: fewer positions must do.
        for position in range(0, ids.shape[1], 1 if transformer.causal else _LENGTH // 2):
            kind = min(position, 1)
            candidates = _right_and_wrong(transformer, ids[:, position], seed + position)
            if transformer.causal:
                features = prefix.candidates(rows, transformer.embedding(candidates))
            else:
                features = _in_context(transformer, ids, position, candidates)
            positions = torch.full(candidates.shape, position, device=ids.device)
            residuals = measured.residual(features, target[:, position, None], positions)
            right[kind] = torch.maximum(right[kind], residuals[:, 0].max())
            # A duplicate of the right token is not wrong: nothing distinguishes the two.
            same = first_duplicate[candidates[:, 1:]] == first_duplicate[candidates[:, :1]]
            nearest = residuals[:, 1:].masked_fill(same, torch.inf).min()
            wrong[kind] = torch.minimum(wrong[kind], nearest)
            if transformer.causal:
                prefix.keep(rows, torch.zeros_like(rows))
        apart = wrong > _CLEARANCE * right
        between = (right.clamp_min(1e-9) * wrong).sqrt()
        threshold = torch.where(apart & wrong.isfinite(), between, 0.0)
        return cls(probe.std, threshold, torch.maximum(threshold, 1.2 * right), right, wrong)


def _held_out(transformer: TruncatedTransformer, text: Tensor | None, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = transformer.embedding.vocabulary_size
    ids = torch.randint(vocabulary, (_PROMPTS, _LENGTH), generator=generator)
    if text is not None and text.shape[1] >= _LENGTH:
        half = min(_PROMPTS // 2, len(text))
        ids[:half] = text[-half:, -_LENGTH:].cpu()
    return ids.to(transformer.device)


def _in_context(
    transformer: TruncatedTransformer, ids: Tensor, position: int, candidates: Tensor
) -> Tensor:
    """Features ``[N, K, F]`` at a position with each of ``candidates`` [N, K] in the prompt."""
    prompts = ids[:, None].repeat(1, candidates.shape[1], 1)
    prompts[:, :, position] = candidates
    return torch.stack([transformer.features_of(some)[:, position] for some in prompts])


def _right_and_wrong(transformer: TruncatedTransformer, right: Tensor, seed: int) -> Tensor:
    """The right token, its nearest neighbours, and random tokens, ``[R, 1 + 15 + 16]``."""
    embedding = transformer.embedding
    near = embedding.dot(embedding(right)) - embedding.norms.square() / 2
    count = min(_NEIGHBOURS, embedding.vocabulary_size - 1)
    near.scatter_(1, right[:, None], -torch.inf)
    neighbours = best_tokens(near, count).indices
    generator = torch.Generator().manual_seed(seed)
    size = (len(right), _RANDOM)
    random = torch.randint(embedding.vocabulary_size, size, generator=generator)
    return torch.cat([right[:, None], neighbours, random.to(right.device)], dim=1)


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
        probe = LinearProbe.fit(transformer, text=text)
        _log.info("calibrating verification thresholds ...")
        calibration = Calibration.measure(transformer, probe, channel, text)
        return cls(transformer, probe, calibration, language_model, text)


@dataclass(frozen=True)
class Verdict:
    """What running decoded tokens has shown.

    Attributes:
        verified: ``[B, T]`` bool; True where the token and, in a causal model, all before it
            reproduce the target.
        residuals: ``[B, T]`` of each position, see ``Calibration``.
        thresholds: ``[B, T]`` the residual up to which a position counts as reproduced.
    """

    verified: Tensor
    residuals: Tensor
    thresholds: Tensor


def verify(features: Tensor, target: Tensor, mask: Tensor, measurements: Measurements) -> Verdict:
    """Compare the features of decoded tokens with the target.

    Args:
        features: ``[B, T, F]`` of the decoded tokens.
        target: ``[B, T, F]``.
        mask: ``[B, T]`` True at a token.
        measurements: of the transformer that made both.
    """
    calibration = measurements.calibration
    positions = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    residuals = calibration.residual(features, target, positions)
    thresholds = calibration.threshold[positions.clamp(max=1)]
    reproduced = calibration.reproduced(residuals, positions) | ~mask
    if measurements.transformer.causal:
        reproduced = reproduced.cummin(dim=1).values
    else:
        reproduced = reproduced.all(dim=1, keepdim=True).expand_as(mask)
    return Verdict(reproduced & mask, residuals, thresholds)
