"""Proof by running: tokens whose features reproduce the target's."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_inversion.transformer.truncated import TruncatedTransformer

TOLERANCE = 1e-4
"""The relative residual up to which a position counts as reproduced.

Measured in float32 down to block 20 of a 30-block model: right tokens stay below 2e-6, the nearest
wrong candidate above 2e-3, where a massive activation hides the rest. Coarser arithmetic gets the
same tolerance: it may leave a right token unresolved, and never lets a wrong one through.
"""


@dataclass(frozen=True)
class Verdict:
    """What running a text has shown.

    Attributes:
        verified: ``[B, T]`` bool; True where the token and, in a causal model, all before it
            reproduce the target.
        residuals: ``[B, T]`` relative residual ||O(ids) - O(a)|| / ||O(a)|| of each position.
    """

    verified: Tensor
    residuals: Tensor


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
    residuals = relative_residual(features, target)
    reproduced = (residuals <= TOLERANCE) | ~mask
    if transformer.causal:
        reproduced = reproduced.cummin(dim=1).values
    else:
        reproduced = reproduced.all(dim=1, keepdim=True).expand_as(mask)
    return Verdict(reproduced & mask, residuals)
