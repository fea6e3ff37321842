"""Which tokens have features near to a row as the first of a prompt: read, or among all of them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lightning_inversion.proposers.probe_proposer import ProbeRanking
from lightning_inversion.transformer.embedding import best_tokens
from lightning_inversion.verification.first_tokens import FirstTokenFeatures
from lightning_inversion.verification.measurements import Measurements


class FirstTokens(Protocol):
    """Finds tokens to run as the first of a prompt."""

    mean: Tensor

    def nearest(self, rows: Tensor, count: int) -> Tensor:
        """Ids ``[N, K]`` of the tokens nearest to rows ``[N, F]``."""

    def nearest_in_direction(self, row: Tensor, count: int) -> Tensor:
        """Ids ``[K]`` of the tokens nearest to a multiple of a row ``[F]``."""


class ReadFirstTokens:
    """The tokens that the linear probe reads in rows; nothing is run.

    Args:
        measurements: of the model.
    """

    def __init__(self, measurements: Measurements) -> None:
        self.probe, self.ranking = measurements.probe, measurements.derived(ProbeRanking)
        self.at_a_time = measurements.transformer.embedding.at_a_time
        self.mean, self.std = self.probe.mean[0], self.probe.std[0]

    def nearest(self, rows: Tensor, count: int) -> Tensor:
        """Ids ``[N, K]`` of the tokens that explain rows ``[N, F]`` best."""
        found = []
        for some in torch.split(rows, self.at_a_time):
            first = torch.zeros(len(some), dtype=torch.long, device=rows.device)
            scores = self.ranking.likelihood(self.probe(some, first), first)
            found.append(best_tokens(scores, min(count, scores.shape[1])).indices)
        return torch.cat(found)

    def nearest_in_direction(self, row: Tensor, count: int) -> Tensor:
        """Ids ``[K]`` of the tokens that explain a multiple of a row ``[F]`` best.

        Half of them are of the row with the usual mean over its features.
        """
        factor = (row * self.mean).sum() / self.mean.square().sum().clamp_min(1e-12)
        usual = row / factor if float(factor) else row
        moved = row + (self.mean.mean() - row.mean())
        return self.nearest(torch.stack([usual, moved]), -(-count // 2)).flatten().unique()  # type: ignore[no-any-return, no-untyped-call]


class ScannedFirstTokens:
    """The same among all tokens, each of which was run as a prompt of its own.

    Args:
        measurements: of the model.
    """

    @classmethod
    def of(cls, measurements: Measurements) -> ScannedFirstTokens:
        """The scan of a model."""
        return cls(measurements)

    def __init__(self, measurements: Measurements) -> None:
        self.index = measurements.derived(FirstTokenFeatures)
        self.mean, self.std = measurements.probe.mean[0], measurements.probe.std[0]

    def distances(self, rows: Tensor) -> Tensor:
        """``[N, V]`` of each token to rows ``[N, F]``, up to the error of the projection."""
        return self.index.distances((rows - self.mean) / self.std)

    def nearest(self, rows: Tensor, count: int) -> Tensor:
        """Ids ``[N, K]`` of the tokens nearest to rows ``[N, F]``."""
        distances = self.distances(rows)
        return distances.topk(min(count, distances.shape[1]), largest=False).indices

    def nearest_in_direction(self, row: Tensor, count: int) -> Tensor:
        """Ids ``[K]`` of the tokens nearest to a multiple of a row ``[F]``."""
        vectors = self.index.projected + self.mean / self.std @ self.index.directions
        own = row / self.std @ self.index.directions
        factors = vectors @ own / vectors.square().sum(-1).clamp_min(1e-12)
        distances = (own - factors[:, None] * vectors).square().sum(-1) / factors.square()
        distances = distances.masked_fill(factors <= 0, torch.inf)
        return distances.topk(min(count, len(distances)), largest=False).indices
