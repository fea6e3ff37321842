"""The k best tokens of scores of a whole vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 64
"""Scores of which first the highest alone is looked at."""


class BestTokens(NamedTuple):
    """Best first, as ``torch.topk`` returns them.

    Attributes:
        values: ``[..., k]`` the scores.
        indices: ``[..., k]`` the tokens' ids.
    """

    values: Tensor
    indices: Tensor


def best_tokens(scores: Tensor, k: int) -> BestTokens:
    """What ``scores.topk(k)`` finds in scores ``[..., V]``, several times as fast on a CPU.

    The k best stand in the k blocks of 64 whose highest scores are best, so that the others need
    no sorting. Which of equal scores are found is not said, as it is not by ``topk``.
    """
    V = scores.shape[-1]
    whole = V // _BLOCK
    if whole < 2 * k:  # as many to sort as there were
        return BestTokens(*scores.topk(k, dim=-1))
    blocks = scores[..., : whole * _BLOCK].reshape(*scores.shape[:-1], whole, _BLOCK)
    chosen = blocks.amax(-1).topk(k, dim=-1).indices
    among = blocks.gather(-2, chosen[..., None].expand(*chosen.shape, _BLOCK)).flatten(-2)
    rest = scores[..., whole * _BLOCK :]  # of a vocabulary that is no multiple of 64
    values, places = torch.cat([among, rest], dim=-1).topk(k, dim=-1)
    inside = chosen.gather(-1, (places // _BLOCK).clamp(max=k - 1)) * _BLOCK + places % _BLOCK
    behind = whole * _BLOCK + places - k * _BLOCK
    return BestTokens(values, torch.where(places < k * _BLOCK, inside, behind))
