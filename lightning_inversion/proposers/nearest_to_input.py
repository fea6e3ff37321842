"""``NearestToInput``: tokens near the vectors that a fit has optimised."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_inversion.proposers.open_positions import OpenPositions
from lightning_inversion.proposers.proposals import Candidates, Proposals
from lightning_inversion.transformer.embedding import best_tokens

NEARNESS = 0.15
"""Weight of the squared distance to a token, in std of the embedding, in its log-likelihood."""


class NearestToInput(Proposals):
    """Tokens near the vectors of an optimised input.

    Args:
        search: of the batch.
        vectors: ``[B, T, D]``; nan where there are none: after a prompt's end, and for all of a
            prompt that the fit did not have.
    """

    def __init__(self, search: OpenPositions, vectors: Tensor) -> None:
        super().__init__(search, type(self).__name__)
        self.vectors = vectors

    def scores(self, rows: Tensor) -> Tensor:
        return self._nearness(self.vectors[rows, self.search.positions(rows)])

    def ahead(self, rows: Tensor, width: int, count: int) -> Candidates | None:
        """The nearest tokens, where each of the prompts has vectors; a prompt has all or none."""
        last = self.vectors.shape[1] - 1
        positions = self.search.positions(rows)[:, None] + torch.arange(width, device=rows.device)
        vectors = self.vectors[rows[:, None], positions.clamp(max=last)]
        if vectors[:, 0].isnan().any():
            return None
        ids = [best_tokens(self._nearness(some), count).indices for some in vectors.unbind(1)]
        return Candidates(torch.stack(ids, dim=1), (self.name,) * count)

    def _nearness(self, vectors: Tensor) -> Tensor:
        embedding = self.search.transformer.embedding
        given = ~vectors.isnan().any(dim=1, keepdim=True)
        near = embedding.nearness(vectors.nan_to_num())
        return torch.where(given, near * (2 * NEARNESS / embedding.std**2), 0.0)
