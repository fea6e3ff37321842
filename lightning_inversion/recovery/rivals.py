"""``NearTokens``: the rivals that a token must be compared with before it is verified."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_inversion.recovery.calibration import Calibration
from lightning_inversion.recovery.first_tokens import FirstTokenFeatures
from lightning_inversion.recovery.measurements import Measurements
from lightning_inversion.transformer.embedding import TokenEmbedding, best_tokens

_DIRECTIONS = 64
_STRETCH = 1.5
"""How far random directions may shorten a distance: 64 of them do by so much once in a million."""
_MOST = 512
"""Tokens near one token at most; a token with more of them cannot be verified by comparing."""
_UNDER_NOISE = 16
"""Nearest tokens that are compared where noise may have made any of them the nearest."""


class NearTokens:
    """For each token the others whose features may be as near to the target as its own.

    Features follow the embedding: the calibration measures how far apart embeddings are whose
    features the threshold still separates. Almost no token of a trained model has another so near;
    tokens that training never saw do. Where features do not carry the embedding along (a slice,
    attention without its residual), the features of first tokens are compared instead. A token's
    duplicates are always among its near tokens.

    Args:
        vectors: ``[V, D]`` what is compared.
        radius: the distance up to which tokens are near; 0 for duplicates alone.
        count: nearest tokens of each instead, whatever their distance; None for none.

    Attributes:
        crowded: tokens that were asked for and have more near tokens than are compared.
    """

    def __init__(self, vectors: Tensor, radius: float, count: int | None = None) -> None:
        self.vectors, self.radius, self.count = vectors, radius, count
        self.crowded: set[int] = set()
        generator = torch.Generator().manual_seed(0)
        D = vectors.shape[1]
        drawn = torch.randn(D, min(_DIRECTIONS, D), generator=generator)
        directions = torch.linalg.qr(drawn).Q if D <= _DIRECTIONS else drawn / _DIRECTIONS**0.5
        projected = _in_parts(vectors, directions.to(vectors.device))
        # One product gives (limit - distance^2) / 2. The small factor allows for its rounding: the
        # difference of large squares is not exact.
        halves = projected.square().sum(1, keepdim=True) * (0.5 - 1e-6)
        limit = (_STRETCH * radius) ** 2 / 2
        ones = torch.ones_like(halves)
        self._left = torch.cat([projected, ones, limit - halves], dim=1)
        self._right = torch.cat([projected, -halves, ones], dim=1)
        self._found: dict[int, Tensor] = {}

    @classmethod
    def of(cls, measurements: Measurements) -> NearTokens:
        """The near tokens of a model at the precision that its calibration measured."""
        calibration, embedding = measurements.calibration, measurements.transformer.embedding
        if calibration.has_noise or measurements.transformer.keeps_embeddings:
            return cls.at(calibration, embedding)
        scan = measurements.derived(FirstTokenFeatures)
        residuals = scan.projected / scan.directions.shape[1] ** 0.5
        near = 2 * calibration.threshold + calibration.right
        return cls(residuals.to(embedding.matrix.device), float(near.amax()))

    @classmethod
    def at(cls, calibration: Calibration, embedding: TokenEmbedding) -> NearTokens:
        """The tokens with near embeddings, at the precision of a calibration."""
        if calibration.has_noise:
            return cls(embedding.matrix, 0.0, min(_UNDER_NOISE, embedding.vocabulary_size - 1))
        return cls(embedding.matrix, float(calibration.radius.clamp(max=1e9).amax()))

    @torch.no_grad()
    def prepare(self, ids: Tensor) -> None:
        """Find the near tokens of ``ids`` of any shape together, which is faster than apart."""
        missing = [token for token in torch.unique(ids).tolist() if token not in self._found]
        for start in range(0, len(missing), 64):
            some = torch.tensor(missing[start : start + 64], device=self.vectors.device)
            self._found.update(zip(some.tolist(), self._search(some), strict=True))

    def of_token(self, token: int) -> Tensor:
        """``[N]`` ids near a token, the nearest first, without itself."""
        if token not in self._found:
            self.prepare(torch.tensor([token]))
        return self._found[token]

    def _search(self, ids: Tensor) -> list[Tensor]:
        nearness = self._left[ids] @ self._right.T
        nearness.scatter_(1, ids[:, None], -torch.inf)
        if self.count is not None:
            shortlist = best_tokens(nearness, min(4 * self.count, nearness.shape[1] - 1)).indices
            return [
                self._nearest(one, some)[: self.count]
                for one, some in zip(ids, shortlist, strict=True)
            ]
        rows, others = (nearness >= 0).nonzero().unbind(1)
        sizes = torch.bincount(rows, minlength=len(ids)).tolist()
        found = []
        for row, some in enumerate(torch.split(others, sizes)):
            if len(some) > 4 * _MOST:
                some = best_tokens(nearness[row], 4 * _MOST).indices
                self.crowded.add(int(ids[row]))
            found.append(self._nearest(ids[row], some) if len(some) else some)
        return found

    def _nearest(self, token: Tensor, others: Tensor) -> Tensor:
        own = self.vectors[token].float()
        distances = torch.cat(
            [(self.vectors[some].float() - own).norm(dim=1) for some in torch.split(others, 8192)]
        )
        order = distances.argsort()
        if self.count is None:
            order = order[distances[order] <= self.radius]
            if len(order) > _MOST:
                self.crowded.add(int(token))
                order = order[:_MOST]
        return others[order]


def _in_parts(vectors: Tensor, directions: Tensor) -> Tensor:
    return torch.cat([rows.float() @ directions for rows in torch.split(vectors, 8192)])
