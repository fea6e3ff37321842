"""What a fit has arrived at as a candidate order."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_inversion.recovery.proposals import Candidates, Proposer
from lightning_inversion.recovery.search import PrefixSearch
from lightning_inversion.transformer.embedding import best_tokens

SHARPNESS = 0.15
"""Weight of the squared distance, in units of the embedding's spread, in the log-likelihood."""


class NearestToInput(Proposer):
    """Tokens near the vectors that an optimised input holds.

    Args:
        vectors: ``[B, T, D]``; nan where there is none, of which nothing is expected: behind a
            text's end, and for all of a text that the fit has not had.
    """

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors

    def scores(self, search: PrefixSearch, rows: Tensor) -> Tensor:
        """The nearer, the likelier."""
        return self._nearness(search, self.vectors[rows, search.positions(rows)])

    def ahead(
        self, search: PrefixSearch, rows: Tensor, width: int, count: int
    ) -> Candidates | None:
        """Where each of the texts has vectors: a text has all of them or none."""
        last = self.vectors.shape[1] - 1
        places = search.positions(rows)[:, None] + torch.arange(width, device=rows.device)
        vectors = self.vectors[rows[:, None], places.clamp(max=last)]
        if vectors[:, 0].isnan().any():
            return None
        nearness = (self._nearness(search, some) for some in vectors.unbind(1))
        ids = [best_tokens(scores, count).indices for scores in nearness]
        return Candidates(torch.stack(ids, dim=1), (self.name,) * count)

    def _nearness(self, search: PrefixSearch, vectors: Tensor) -> Tensor:
        embedding = search.transformer.embedding
        known = ~vectors.isnan().any(dim=1, keepdim=True)
        near = embedding.dot(vectors.nan_to_num()) - embedding.norms.square() / 2
        return torch.where(known, near * (2 * SHARPNESS / embedding.std**2), 0.0)
