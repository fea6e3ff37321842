"""Why an input that is far from the true one can be read all the same: the room beside a token."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_inversion.files import Record

NEAR = 0.3
"""Tokens whose direction has a larger cosine with the true one's are left out in ``far_apart``;
after training the nearest wrong token of the widest models of the ladder is about as near."""
NARROW, DRAWS = 64, 5
"""The least width of the ladder, to which directions are projected, and how often."""


def room_of(direction: Tensor, nearest: Tensor, width: int) -> Tensor:
    """By how many std of a random error the true token leads the nearest wrong one.

    An input x at an angle t from its token's direction, read by the nearest direction, is read as a
    token of cosine c with the true one where the part of x across that direction reaches
    cos(t) (1 - c) / sqrt(1 - c^2). Of a part of length sin(t) in a random direction, each direction
    holds sin(t) / sqrt(D), so that the lead is sqrt(D) cot(t) sqrt((1 - c) / (1 + c)) of its std.

    Args:
        direction: cos(t), the cosine of input and true token, of any shape.
        nearest: c, that of the true token and the nearest wrong one, of the same shape.
        width: D.
    """
    cotangent = direction / (1 - direction.square()).clamp_min(1e-12).sqrt()
    lead = ((1 - nearest).clamp_min(0) / (1 + nearest)).sqrt()
    return math.sqrt(width) * cotangent * lead


@torch.no_grad()
def room_numbers(values: Tensor, ids: Tensor, matrix: Tensor) -> Record:
    """What is read of inputs by the nearest direction, and what it depends on.

    ``by_direction`` is the share of the tokens that are right. ``in_64`` is that share after the
    inputs and the embedding were projected to 64 random dimensions, ``far_apart`` among the true
    token and those of a cosine of at most 0.3 with it, ``as_few`` among as many at random, and
    ``random_error`` with each input exchanged for one at the same angle from the true token, in a
    random direction.
    ``direction``, ``nearest_direction`` and ``room`` are medians: of the cosine between input and
    true token, of that between the true and the nearest wrong token, and of ``room_of``.

    Args:
        values: ``[N, T, D]`` where the recipe ended.
        ids: ``[N, T]`` the true tokens.
        matrix: ``[V, D]`` the embedding.
    """
    generator = torch.Generator().manual_seed(0)
    directions, inputs = normalize(matrix, dim=1), normalize(values, dim=-1)
    true = directions[ids]
    others = (true @ directions.T).scatter(-1, ids[..., None], -1.0)
    nearest = others.amax(-1)
    scores = inputs @ directions.T
    own = scores.gather(-1, ids[..., None])

    def right(found: Tensor, among: Tensor | None = None) -> float:
        if among is not None:
            among = among.scatter(-1, ids[..., None], True)
            found = found.masked_fill(~among, -torch.inf)
        return float((found.argmax(-1) == ids).float().mean())

    across = torch.randn(values.shape, generator=generator)
    across = normalize(across - (across * true).sum(-1, keepdim=True) * true, dim=-1)
    elsewhere = own * true + (1 - own.square()).clamp_min(0).sqrt() * across
    far = others <= NEAR
    few = torch.rand(far.shape, generator=generator) < far.float().mean(-1, keepdim=True)
    narrow = []
    for _ in range(DRAWS):
        projection = torch.linalg.qr(torch.randn(matrix.shape[1], NARROW, generator=generator)).Q
        narrow.append(right(values @ projection @ normalize(matrix @ projection, dim=1).T))
    return {
        "by_direction": right(scores),
        f"in_{NARROW}": sum(narrow) / DRAWS,
        "far_apart": right(scores, far),
        "as_few": right(scores, few),
        "random_error": right(elsewhere @ directions.T),
        "direction": float(own.median()),
        "nearest_direction": float(nearest.median()),
        "room": float(room_of(own[..., 0], nearest, matrix.shape[1]).median()),
    }
