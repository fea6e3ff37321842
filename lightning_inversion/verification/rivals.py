"""``NearTokens``: the rivals that a token must be compared with before it is verified."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_inversion.transformer.embedding import TokenEmbedding, best_tokens
from lightning_inversion.verification.calibration import Calibration
from lightning_inversion.verification.first_tokens import FirstTokenFeatures
from lightning_inversion.verification.measurements import Measurements

_DIRECTIONS = 64
_STRETCH = 1.5
"""How far random directions may shorten a distance: 64 of them do by so much once in a million."""
_MOST = 512
"""Tokens near one token at most; a token with more of them cannot be verified by comparing."""
_FEW = 16
"""Tokens near a token that are run where not all can be."""
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
        whole: all tokens up to the radius are needed, whatever the residual.
    """

    def __init__(
        self, vectors: Tensor, radius: float, count: int | None = None, whole: bool = True
    ) -> None:
        self.vectors, self.radius, self.count, self.whole = vectors, radius, count, whole
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
        self._found: dict[int, _Found] = {}

    @classmethod
    def of(cls, measurements: Measurements) -> NearTokens:
        """The near tokens of a model at the precision that its calibration measured."""
        calibration, embedding = measurements.calibration, measurements.transformer.embedding
        if calibration.has_noise or measurements.transformer.keeps_embeddings:
            return cls.at(calibration, embedding)
        if calibration.is_sparse:  # which features are compared depends on the target
            return cls(embedding.matrix, 1e9)
        scan = measurements.derived(FirstTokenFeatures)
        residuals = scan.projected / scan.directions.shape[1] ** 0.5
        near = 2 * calibration.threshold + calibration.right
        return cls(residuals.to(embedding.matrix.device), float(near.amax()))

    @classmethod
    def at(cls, calibration: Calibration, embedding: TokenEmbedding) -> NearTokens:
        """The tokens with near embeddings, at the precision of a calibration."""
        if calibration.has_noise:
            return cls(embedding.matrix, 0.0, min(_UNDER_NOISE, embedding.vocabulary_size - 1))
        return cls(embedding.matrix, float(calibration.radius.clamp(max=1e9).amax()), whole=False)

    @torch.no_grad()
    def prepare(self, ids: Tensor) -> None:
        """Find the near tokens of ``ids`` of any shape together, which is faster than apart."""
        missing = [token for token in torch.unique(ids).tolist() if token not in self._found]
        for start in range(0, len(missing), 64):
            some = torch.tensor(missing[start : start + 64], device=self.vectors.device)
            self._found.update(zip(some.tolist(), self._search(some), strict=True))

    def of_token(self, token: int, needed: float = torch.inf) -> tuple[Tensor, bool]:
        """The tokens ``[N]`` near a token, the nearest first, without itself; and whether all are.

        Of more near tokens than can be compared those up to ``needed`` are enough, see
        ``Calibration.within``; of more of these the nearest few, which may form a group.
        """
        if token not in self._found:
            self.prepare(torch.tensor([token]))
        found = self._found[token]
        if found.reach >= self.radius:
            return found.ids, True
        needed = self.radius if self.whole else min(needed, self.radius)
        whole = found.reach >= needed
        return found.ids[found.distances <= needed][: None if whole else _FEW], whole

    def up_to(self, token: int, distance: float) -> Tensor | None:
        """The tokens ``[N]`` with embeddings up to a distance; None where features are compared."""
        if self.whole or self.count is not None:
            return None
        every = torch.arange(len(self.vectors), device=self.vectors.device)
        own = torch.tensor(token, device=every.device)
        near, distances = self._nearest(own, every[every != token])
        return near[distances <= distance]

    def _search(self, ids: Tensor) -> list[_Found]:
        nearness = self._left[ids] @ self._right.T
        nearness.scatter_(1, ids[:, None], -torch.inf)
        if self.count is not None:
            shortlist = best_tokens(nearness, min(4 * self.count, nearness.shape[1] - 1)).indices
            ordered = [self._nearest(one, some) for one, some in zip(ids, shortlist, strict=True)]
            return [_Found(near[: self.count], far, torch.inf) for near, far in ordered]
        crowded = (nearness >= 0).sum(1) > 4 * _MOST
        some = ids[crowded]  # of most tokens none
        shortlists = zip(*self._shortlists(some), strict=True) if len(some) else iter(())
        found = []
        for token, near, many in zip(ids, nearness, crowded.tolist(), strict=True):
            others, reach = (near >= 0).nonzero()[:, 0], self.radius
            if many:
                others, farthest = next(shortlists)
                reach = min(reach, float(farthest))
            found.append(self._within(token, others, reach))
        return found

    @cached_property
    def _half_squares(self) -> Tensor:
        """Half the square ``[V, 1]`` of each vector."""
        parts = torch.split(self.vectors, 8192)
        return torch.cat([rows.float().square().sum(1, keepdim=True) / 2 for rows in parts])

    def _shortlists(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest 2048 tokens ``[R, N]`` of each, and a distance ``[R]`` below all others'.

        Where projections leave many tokens, one product with all vectors is as good as exact.
        """
        own = self.vectors[ids].float()
        nearness = torch.cat([rows.float() @ own.T for rows in torch.split(self.vectors, 8192)])
        nearness -= self._half_squares
        nearness = nearness.scatter(0, ids[None], -torch.inf).T
        values, shortlist = best_tokens(nearness, min(4 * _MOST, nearness.shape[1] - 1))
        squares = own.square().sum(1)
        rounding = 1e-5 * (squares - 2 * values.amin(1)).clamp_min(0).maximum(squares)
        farthest = (squares - 2 * values.amin(1) - rounding).clamp_min(0).sqrt()
        return shortlist, farthest

    def _within(self, token: Tensor, others: Tensor, reach: float) -> _Found:
        """The tokens of ``others`` up to the radius, or the nearest of them where there are many.

        All tokens up to ``reach`` are among the others.
        """
        near, distances = self._nearest(token, others)
        if len(near) > _MOST:
            below = torch.nextafter(distances[_MOST], distances.new_zeros(()))
            reach = min(reach, float(below))
        kept = distances <= reach
        return _Found(near[kept], distances[kept], reach)

    def _nearest(self, token: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """Others in the order of their distances, and these."""
        own = self.vectors[token].float()
        distances = torch.cat(
            [(self.vectors[some].float() - own).norm(dim=1) for some in torch.split(others, 8192)]
        )
        order = distances.argsort()
        return others[order], distances[order]


class NearFirstTokens:
    """The tokens whose features as the first of a prompt are near a target.

    They follow from the token alone. A low precision errs by so much that many embeddings are near
    enough to be right, while few features are.
    """

    def __init__(self, measurements: Measurements) -> None:
        self.measurements = measurements

    def near(self, target: Tensor, residual: float) -> tuple[Tensor, bool]:
        """Tokens ``[N]`` up to a residual from a target ``[F]``, and whether these are all."""
        scan = self.measurements.derived(FirstTokenFeatures)
        first = torch.zeros((), dtype=torch.long, device=target.device)
        own = self.measurements.probe.standardize(target, first) @ scan.directions
        distances = (scan.projected - own).norm(dim=1) / scan.directions.shape[1] ** 0.5
        found = (distances <= _STRETCH * residual).nonzero()[:, 0]
        order = distances[found].argsort()
        return found[order][:_MOST], len(found) <= _MOST


@dataclass(frozen=True)
class _Found:
    """The tokens near a token.

    Attributes:
        ids: ``[N]`` the nearest first.
        distances: ``[N]``.
        reach: the distance up to which all are there.
    """

    ids: Tensor
    distances: Tensor
    reach: float


def _in_parts(vectors: Tensor, directions: Tensor) -> Tensor:
    return torch.cat([rows.float() @ directions for rows in torch.split(vectors, 8192)])
