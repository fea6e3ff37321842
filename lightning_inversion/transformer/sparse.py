"""Sparse features: of each position only the largest are kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kept_features(share: float, features: int) -> int:
    """How many of so many features are kept."""
    return min(features, max(1, math.ceil(share * features - 1e-9)))


def keep_largest(features: Tensor, share: float) -> Tensor:
    """Features ``[..., F]`` of which a share of each position, the largest by size, is kept."""
    count = kept_features(share, features.shape[-1])
    if count == features.shape[-1]:
        return features
    least = features.abs().topk(count, dim=-1).values[..., -1:]
    return features.masked_fill(features.abs() < least, 0.0)


def where_kept(standard: Tensor, target: Tensor, count: int, power: int = 2) -> Tensor:
    """Differences ``[..., F]`` to a sparse target ``[..., F]``, at the features that it kept.

    They are scaled, so that their mean over all features is that over those: the mean of the
    ``power`` of their size. Infinite where the target has fewer than ``count`` of them.
    """
    present = target != 0
    kept = present.sum(-1, keepdim=True)
    times = (target.shape[-1] / kept.clamp_min(1)) ** (1 / power)
    compared = standard.masked_fill(~present, 0.0) * times
    return torch.where(kept >= count, compared, torch.inf)
