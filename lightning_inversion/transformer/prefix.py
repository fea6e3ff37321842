"""What each row of a batch begins with, run once; and what follows it, run after it."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_inversion.transformer.kv_cache import (
    RaggedCache,
    most_keys,
    one_after_another,
    serves,
)
from lightning_inversion.transformer.truncated import TruncatedTransformer


class FixedPrefix:
    """The fixed first vectors of B sequences; runs what comes next after them.

    Where the model takes it, keys and values of the fixed vectors are kept, and candidates for a
    row's next token lie side by side in one forward. Other models (ALiBi, state spaces, sliding
    windows once a sequence outgrows them) run each candidate with its whole prefix: slower, with
    the same results.

    Args:
        transformer: the frozen model; causal.
        rows: B.

    Attributes:
        vectors: ``[B, T, D]``, of which each row's first ``lengths`` are fixed.
        lengths: ``[B]``.
    """

    def __init__(self, transformer: TruncatedTransformer, rows: int) -> None:
        self.transformer = transformer
        device = transformer.device
        self.vectors = torch.zeros(rows, 0, transformer.embedding.width, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self._cache = RaggedCache(rows, transformer.depth, device) if transformer.caches else None
        self._latest = self.vectors
        self._begun: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def begin(self, rows: Tensor, vectors: Tensor, lengths: Tensor) -> None:
        """Replace what is fixed by the first ``lengths`` [R] of vectors ``[R, T, D]`` of ``rows``.

        What is kept follows from the arguments alone, not from how they came to be fixed, so that a
        resumed run continues bit for bit. A second call with equal rows and lengths runs nothing.
        """
        if self._begun is not None and all(map(torch.equal, self._begun, (rows, lengths))):
            return
        longest = int(lengths.max())
        known = torch.arange(longest, device=rows.device) < lengths[:, None]
        begun = vectors[:, :longest].detach().masked_fill(~known[..., None], 0.0)
        self.lengths = torch.zeros_like(self.lengths).index_copy_(0, rows, lengths)
        self.vectors = begun.new_zeros(len(self.lengths), *begun.shape[1:]).index_copy_(
            0, rows, begun
        )
        self._begun = rows.clone(), lengths.clone()
        if not self._keeps(longest):
            return
        assert self._cache is not None
        self._cache.clear()
        if longest:
            self._behind(rows, begun, one_after_another(longest, rows.device))
            self._cache.begin(lengths)

    def candidates(self, rows: Tensor, embeds: Tensor) -> Tensor:
        """Features ``[R, K, F]`` of vectors ``[R, K, D]``, each the next of its row.

        Differentiable in ``embeds``. The latest call is what `keep` chooses from.
        """
        self._latest = embeds.detach()
        longest = int(self.lengths[rows].max())
        if not self._keeps(longest + 1):
            return self.transformer.candidates(self.vectors[rows], self.lengths[rows], embeds)
        room = most_keys(self.transformer.model.config) - longest
        parts = torch.split(embeds, int(min(embeds.shape[1], room)), dim=1)
        features = []
        for number, part in enumerate(parts):
            beside = torch.eye(part.shape[1], dtype=torch.bool, device=embeds.device)
            features.append(self._behind(rows, part, beside, more=number > 0))
        return features[0] if len(features) == 1 else torch.cat(features, dim=1)

    def reaches(self, rows: Tensor, width: int, count: int) -> bool:
        """Whether `ahead` can run ``count`` candidates at each of the next ``width`` positions."""
        longest = int(self.lengths[rows].max())
        return self._cache is not None and self._serves(longest + width, longest + width * count)

    def ahead(self, rows: Tensor, embeds: Tensor) -> Tensor:
        """Features ``[R, W, K, F]`` of candidates ``[R, W, K, D]`` for the next W positions.

        At each position the candidates come after the first ones of the positions before. The
        latest call is what `keep` chooses from. More than one position asks for `reaches`.
        """
        R, W, K = embeds.shape[:3]
        if W == 1:
            return self.candidates(rows, embeds[:, 0])[:, None]
        assert self.reaches(rows, W, K)
        self._latest = embeds.detach().flatten(1, 2)
        position = torch.arange(W * K, device=rows.device) // K
        leads = torch.arange(W * K, device=rows.device) % K == 0
        sees = leads & (position < position[:, None])
        sees |= torch.eye(W * K, dtype=torch.bool, device=rows.device)
        features = self._behind(rows, embeds.flatten(1, 2), sees)
        return features.view(R, W, K, -1)

    def followed_by(self, rows: Tensor, vectors: Tensor) -> Tensor:
        """Features ``[R, W, F]`` of W vectors ``[R, W, D]`` that follow; differentiable in them."""
        width = vectors.shape[1]
        if self._keeps(int(self.lengths[rows].max()) + width):
            return self._behind(rows, vectors, one_after_another(width, rows.device))
        positions = self.lengths[rows, None] + torch.arange(width, device=rows.device)
        each = torch.arange(len(rows), device=rows.device)[:, None]
        length = int(positions.max()) + 1
        sequence = vectors.new_zeros(len(rows), length, vectors.shape[2])
        sequence[:, : self.vectors.shape[1]] = self.vectors[rows, :length]
        sequence = sequence.index_put((each, positions), vectors)
        mask = torch.arange(length, device=rows.device) <= positions[:, -1:]
        features: Tensor = self.transformer(sequence, mask)
        return features[each, positions]

    def keep(self, rows: Tensor, slots: Tensor) -> None:
        """Of the latest candidates, those at ``slots`` [R] (-1: none) are fixed from now on.

        After `ahead`, candidate k of the w-th position is at w K + k.

        Args:
            rows: ``[R]`` the rows of the latest call.
            slots: ``[R]``.
        """
        kept = (slots >= 0).nonzero()[:, 0]
        if not len(kept):
            return
        if self._cache is not None:
            self._cache.keep(slots[:, None])
        into, self._begun = rows[kept], None
        at = self.lengths[into]
        if int(at.max()) >= self.vectors.shape[1]:
            more = self.vectors.new_zeros(
                len(self.vectors), max(16, self.vectors.shape[1]), self.vectors.shape[2]
            )
            self.vectors = torch.cat([self.vectors, more], dim=1)
        self.vectors[into, at] = self._latest[kept, slots[kept]]
        self.lengths[into] += 1

    @torch.no_grad()
    def take_back(self, rows: Tensor) -> None:
        """The last fixed vector of each of ``rows`` [R] is not fixed any more."""
        self._begun = None
        self.lengths[rows] -= 1
        if self._cache is not None:
            self._cache.lengths[rows] -= 1

    def _keeps(self, length: int) -> bool:
        """Whether keys and values serve sequences of this length; once outgrown, never again."""
        if not self._serves(length, length):
            self._cache = None
        return self._cache is not None

    def _serves(self, length: int, keys: int) -> bool:
        return serves(self.transformer.model.config, length, keys)

    def _behind(self, rows: Tensor, embeds: Tensor, sees: Tensor, more: bool = False) -> Tensor:
        assert self._cache is not None
        return self._cache.run(
            lambda mask, positions, cache: self.transformer.run(embeds, mask, positions, cache),
            rows,
            sees,
            more,
        )
