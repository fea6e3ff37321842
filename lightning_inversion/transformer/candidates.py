"""Features of many candidate tokens after one prefix, in one forward: tree attention.

The candidates lie side by side behind the prefix. A 4-D mask lets each see the prefix and itself
only, and position ids put all of them at the one place after the prefix, so that each gets the
features it would have alone (Miao et al. 2023, 'SpecInfer', arXiv 2305.09781, section 4.2).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PretrainedConfig

if TYPE_CHECKING:
    from lightning_inversion.transformer.truncated import TruncatedTransformer

# Candidates in one tree: each attends over all of them, masked or not, so that a tree of the
# whole vocabulary would cost the square of it. 256 to 512 were fastest on SmolLM2.
GROUP = 256
# Rows of one plain forward: bounds the memory.
ROWS = 256


@torch.no_grad()
def tree_candidates(
    transformer: TruncatedTransformer, prefix: Tensor, lengths: Tensor, candidates: Tensor
) -> Tensor:
    """`TruncatedTransformer.candidates` by tree attention."""
    P = int(lengths.max())
    parts = [
        _one_tree(transformer, prefix[:, :P], lengths, group)
        for group in torch.split(candidates, GROUP, dim=1)
    ]
    return torch.cat(parts, dim=1)


def _one_tree(
    transformer: TruncatedTransformer, prefix: Tensor, lengths: Tensor, candidates: Tensor
) -> Tensor:
    B, P, _ = prefix.shape
    K = candidates.shape[1]
    place = torch.arange(P, device=prefix.device)
    known = place < lengths[:, None]  # [B, P]
    sequence = torch.cat([prefix.masked_fill(~known[..., None], 0.0), candidates], dim=1)

    allowed = torch.zeros(B, P + K, P + K, dtype=torch.bool, device=prefix.device)
    allowed[:, :P, :P] = place <= place[:, None]
    allowed[:, P:, :P] = known[:, None, :]
    allowed[:, P:, P:] = torch.eye(K, dtype=torch.bool, device=prefix.device)
    positions = torch.cat([place.expand(B, P), lengths[:, None].expand(B, K)], dim=1)
    return transformer.run(sequence, allowed, positions)[:, P:]


@torch.no_grad()
def plain_candidates(
    transformer: TruncatedTransformer, prefix: Tensor, lengths: Tensor, candidates: Tensor
) -> Tensor:
    """`TruncatedTransformer.candidates` with a row of its own for each candidate."""
    B, K, D = candidates.shape
    P = int(lengths.max())
    place = torch.arange(P + 1, device=prefix.device)
    owner = torch.arange(B, device=prefix.device).repeat_interleave(K)  # whose candidate a row is
    features = []
    for rows, embeds in zip(
        torch.split(owner, ROWS), torch.split(candidates.reshape(-1, D), ROWS), strict=True
    ):
        sequence = prefix.new_zeros(len(rows), P + 1, D)
        sequence[:, :P] = prefix[rows, :P]
        ends = lengths[rows]
        each = torch.arange(len(rows), device=prefix.device)
        sequence[each, ends] = embeds
        features.append(transformer(sequence, place <= ends[:, None])[each, ends])
    return torch.cat(features).reshape(B, K, -1)


def tree_fits(config: PretrainedConfig, length: int, places: int) -> bool:
    """Whether a tree stays clear of the model's limits.

    Args:
        config: the model's.
        length: of the longest text in it, from its first token to a leaf.
        places: that it takes, candidates side by side counted one by one.
    """
    # A sliding window is not in our mask: it must not matter yet.
    if length > (getattr(config, "sliding_window", None) or math.inf):
        return False
    # Local attention (GPT-Neo) and masks of a fixed size go by the place in the tree itself.
    limits = (getattr(config, name, None) for name in ("window_size", "max_position_embeddings"))
    return all(limit is None or places <= limit for limit in limits)


@torch.no_grad()
def tree_works(transformer: TruncatedTransformer) -> bool:
    """Whether the model obeys the 4-D mask and the position ids: tried out against plain rows.

    Models that take positions from the order of the keys (the ALiBi of BLOOM and MPT) do not.
    The error allowed is a hundredth of what the prefix does to the features, plus rounding.
    """
    if not transformer.causal:
        return False  # the prefix would see the candidates
    matrix = transformer.embedding.matrix
    ids = torch.arange(12, device=matrix.device) % len(matrix)
    ids = (ids * max(1, len(matrix) // 12)) % len(matrix)
    prefix = transformer.embedding(ids[:6].reshape(2, 3))
    candidates = transformer.embedding(ids[4:].reshape(2, 4))
    lengths = torch.tensor([3, 2], device=matrix.device)
    plain = plain_candidates(transformer, prefix, lengths, candidates)
    alone = plain_candidates(transformer, prefix, torch.zeros_like(lengths), candidates)
    try:
        tree = tree_candidates(transformer, prefix, lengths, candidates)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return False  # an architecture that does not even take such a mask
    influence = (plain - alone).norm()
    rounding = 32 * torch.finfo(torch.float32).eps
    if matrix.dtype != torch.float32:
        rounding = 4 * torch.finfo(matrix.dtype).eps
    return bool((tree - plain).norm() <= 0.01 * influence + rounding * plain.norm())
