"""Vectors behind each row's known ones: the known ones are run once, not at every iteration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_inversion.transformer.candidates import tree_fits
from lightning_inversion.transformer.ragged_cache import RaggedCache

if TYPE_CHECKING:
    from lightning_inversion.transformer.truncated import TruncatedTransformer


class KnownVectors:
    """What some rows of a batch begin with, kept as keys and values where the model has them.

    What it holds follows from its arguments alone, not from how the rows came to be known, so that
    a resumed run goes on bit for bit.

    Args:
        transformer: the frozen model; causal.
        rows: ``[R]`` rows of the batch.
        vectors: ``[B, T, D]`` of the whole batch, as they stand.
        lengths: ``[R]`` how many of them each row begins with.
    """

    def __init__(
        self, transformer: TruncatedTransformer, rows: Tensor, vectors: Tensor, lengths: Tensor
    ) -> None:
        self.transformer, self.rows, self.vectors = transformer, rows, vectors.detach()
        self.lengths = lengths.clone()
        self._grown = False
        self._place = torch.full((len(vectors),), -1, device=rows.device)
        self._place[rows] = torch.arange(len(rows), device=rows.device)
        self._cache: RaggedCache | None = None
        if transformer.caches:
            self._cache = RaggedCache(len(rows), transformer.depth, rows.device)
            if longest := int(lengths.max()):
                known = torch.arange(longest, device=rows.device) < lengths[:, None]
                begun = self.vectors[rows, :longest].masked_fill(~known[..., None], 0.0)
                with torch.no_grad():
                    self._behind(begun, torch.arange(len(rows), device=rows.device), tree=False)
                self._cache.begin(lengths)

    def of(self, rows: Tensor, lengths: Tensor) -> bool:
        """Whether these are the rows, as long as this, and nothing was appended."""
        return (
            not self._grown and torch.equal(self.rows, rows) and torch.equal(self.lengths, lengths)
        )

    def lengths_of(self, rows: Tensor) -> Tensor:
        """How many vectors of some rows are known ``[R']``."""
        return self.lengths[self._place[rows]]

    def followed_by(self, vectors: Tensor) -> Tensor:
        """Features ``[R, W, F]`` of W vectors ``[R, W, D]`` that follow; differentiable in them."""
        return self._behind(vectors, torch.arange(len(self.rows), device=vectors.device), False)

    @torch.no_grad()
    def candidates(self, rows: Tensor, vectors: Tensor) -> Tensor:
        """Features ``[R', K, F]`` of K vectors, each the next of some rows ``[R']``."""
        places = self._place[rows]
        lengths = self.lengths[places]
        config = self.transformer.model.config
        if self._cache is None or not tree_fits(config, int(lengths.max()), vectors.shape[1]):
            return self.transformer.candidates(self.vectors[rows], lengths, vectors)
        return torch.cat(
            [self._behind(part, places, True) for part in torch.split(vectors, 256, dim=1)], dim=1
        )

    @torch.no_grad()
    def append(self, rows: Tensor, vectors: Tensor) -> None:
        """The next vectors ``[R', D]`` of some rows are known from now on."""
        places, self._grown = self._place[rows], True
        self.vectors[rows, self.lengths[places]] = vectors
        self.lengths[places] += 1
        if self._cache is not None and len(rows):
            self._behind(vectors[:, None], places, False)
            self._cache.keep(torch.zeros(len(rows), 1, dtype=torch.long, device=rows.device))

    def _behind(self, vectors: Tensor, places: Tensor, tree: bool) -> Tensor:
        assert self._cache is not None
        count = vectors.shape[1]
        sees = torch.eye(count, dtype=torch.bool, device=vectors.device)
        if not tree:
            sees = torch.ones_like(sees).tril()
        return self._cache.run(
            lambda mask, positions, known: self.transformer.run(vectors, mask, positions, known),
            places,
            sees,
        )
