"""How far each position of the input is from the tokens nearest to it, as a picture."""

import math

import torch
from torch import Tensor

from lightning_inversion.decoding import first_of_equals
from lightning_inversion.transformer.embedding import TokenEmbedding, best_tokens

_SQUARE = 12
"""Pixels of a square's side."""
_NEAR_TO_FAR = ((253, 231, 37), (94, 201, 98), (33, 145, 140), (59, 82, 139), (68, 1, 84))
"""Of viridis, which is read alike by those who see fewer colours."""


@torch.no_grad()
def nearest_distances(vectors: Tensor, embedding: TokenEmbedding, k: int) -> Tensor:
    """Distances ``[T, k]`` of vectors ``[T, D]`` to the k nearest tokens, the nearest first.

    In units of the embedding's spread, so that two unrelated tokens are about sqrt(2) apart.
    """
    halves, k = embedding.norms.square() / 2, min(k, embedding.vocabulary_size)
    nearest = torch.empty(len(vectors), k, device=vectors.device)
    which = first_of_equals(vectors)
    for places in torch.split(torch.unique(which), embedding.at_a_time):
        some = vectors[places].float()
        # Half the squared distance is |e|^2 / 2 + |v|^2 / 2 - v e: the most of what is negative.
        most = best_tokens(embedding.dot(some).sub_(halves), k).values
        nearest[places] = some.square().sum(-1, keepdim=True) - 2 * most
    unit = embedding.std * math.sqrt(embedding.width)
    return nearest[which].clamp_min(0).sqrt() / unit


def picture(distances: Tensor) -> Tensor:
    """Distances ``[T, k]`` -> bytes ``[3, H, W]``: a column a position, a row a rank.

    Yellow is a token's own place, dark is a distance of 1 and more.
    """
    shares = distances.T.clamp(0, 1).cpu() * (len(_NEAR_TO_FAR) - 1)
    lower = shares.floor().long().clamp_max(len(_NEAR_TO_FAR) - 2)
    colours = torch.tensor(_NEAR_TO_FAR, dtype=torch.float)
    between = (shares - lower)[..., None]
    mixed = colours[lower] * (1 - between) + colours[lower + 1] * between
    squares = mixed.round().byte().permute(2, 0, 1)
    return squares.repeat_interleave(_SQUARE, 1).repeat_interleave(_SQUARE, 2)
