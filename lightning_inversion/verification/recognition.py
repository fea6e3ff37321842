"""Whether a model is the one that was measured: its features of a few tokens are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_inversion.transformer.blocks import most_positions
from lightning_inversion.transformer.cached import kept
from lightning_inversion.transformer.rounding import rounded_differently
from lightning_inversion.transformer.truncated import TruncatedTransformer

_TOKENS = 8
_ROUNDINGS = 2
_SAFETY = 10.0
"""How many times the error of another rounding the features may be off."""
_MOST = 4
"""Ways in which models of equal weights may behave before nothing more is kept of them."""


@dataclass(frozen=True)
class Behaviour:
    """What a model makes of a few tokens.

    Attributes:
        features: ``[T, F]`` of a sequence of T tokens.
        allowed: ``[T]`` how far they may be off; see ``_errors``.
    """

    features: Tensor
    allowed: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, transformer: TruncatedTransformer) -> Behaviour:
        """Run the tokens, also with other roundings."""
        features = _features(transformer)
        generator = torch.Generator().manual_seed(0)
        errors = []
        for _ in range(_ROUNDINGS):
            with rounded_differently(transformer, generator):
                errors.append(_errors(_features(transformer), features))
        return cls(features, _SAFETY * torch.stack(errors).amax(0))

    def fits(self, features: Tensor) -> bool:
        """Whether features ``[T, F]`` of the same tokens are these, but for rounding."""
        if features.shape != self.features.shape:
            return False
        return bool((_errors(features, self.features) <= self.allowed).all())


def recognised(transformer: TruncatedTransformer) -> dict[str, Any] | None:
    """What tells a model from every other, for what is kept of it.

    Equal weights are not enough: hooks and other code around them change the features. So do
    several such models in turn, each of which gets a number.

    Returns:
        None where too many models of these weights behave differently.
    """
    features = _features(transformer)
    for number in range(_MOST):
        identity = {**transformer.identity, "behaviour": number}
        stored = kept(Behaviour, identity, lambda: Behaviour.of(transformer), transformer.device)
        if stored.fits(features):
            return identity
    return None


def _features(transformer: TruncatedTransformer) -> Tensor:
    most = most_positions(transformer.model.config) or _TOKENS
    generator = torch.Generator().manual_seed(3)
    size = (1, min(_TOKENS, most))
    ids = torch.randint(transformer.embedding.vocabulary_size, size, generator=generator)
    return transformer.features_of(ids.to(transformer.device))[0]


def _errors(features: Tensor, stored: Tensor) -> Tensor:
    """``[T]`` root mean square of differences of features ``[T, F]``, in std of each over the T.

    Features that overflow must do so in both.
    """
    both = features.isfinite() & stored.isfinite()
    std = torch.where(stored.isfinite(), stored, 0.0).std(0, correction=0) + 1e-6
    errors = torch.where(both, (features - stored) / std, 0.0).square().mean(-1).sqrt()
    same = (features.isfinite() == stored.isfinite()).all(-1)
    return torch.where(same, errors, torch.inf)
