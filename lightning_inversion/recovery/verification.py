"""Proof by running: tokens whose features reproduce the target's."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_inversion.transformer.truncated import TruncatedTransformer

# The relative residual of the right token is rounding (1e-6 in float32, measured at every depth of
# a 30-block model); a wrong token's is a hundred times larger or more.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Verdict:
    """What running a text has shown.

    Attributes:
        verified: ``[B, T]`` bool; True where the token and, in a causal model, all before it
            reproduce the target.
        residuals: ``[B, T]`` relative residual ||O(ids) - O(a)|| / ||O(a)|| of each position.
        tolerance: the residual up to which a position counts as reproduced.
    """

    verified: Tensor
    residuals: Tensor
    tolerance: float


def tolerance_of(transformer: TruncatedTransformer) -> float:
    """The relative residual that rounding may leave, by the dtype of the model."""
    return _TOLERANCE[transformer.dtype]


def relative_residual(features: Tensor, target: Tensor) -> Tensor:
    """||features - target||_2 / ||target||_2 over the last axis."""
    size = torch.linalg.vector_norm(target, dim=-1).clamp_min(1e-12)
    residual: Tensor = torch.linalg.vector_norm(features - target, dim=-1) / size
    return residual


def verify_text(
    features: Tensor, target: Tensor, mask: Tensor, transformer: TruncatedTransformer
) -> Verdict:
    """Judge decoded tokens by their features.

    Args:
        features: ``[B, T, F]`` of the decoded tokens.
        target: ``[B, T, F]``.
        mask: ``[B, T]`` True at a token.
        transformer: that made both.
    """
    tolerance = tolerance_of(transformer)
    residuals = relative_residual(features, target)
    reproduced = (residuals <= tolerance) | ~mask
    if transformer.causal:
        reproduced = reproduced.cummin(dim=1).values
    else:
        reproduced = reproduced.all(dim=1, keepdim=True).expand_as(mask)
    return Verdict(reproduced & mask, residuals, tolerance)
