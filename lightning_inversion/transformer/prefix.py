"""What each row of a batch begins with, run once; and what follows it, run behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_inversion.transformer.candidates import tree_fits
from lightning_inversion.transformer.ragged_cache import RaggedCache
from lightning_inversion.transformer.truncated import TruncatedTransformer


class KnownPrefix:
    """The vectors known so far of B texts; runs what comes next behind them.

    Where the model takes it, keys and values of the known vectors are kept, and candidates for a
    text's next token lie side by side in one forward. Other models (ALiBi, state spaces, sliding
    windows once a text outgrows them) run each candidate with its whole prefix: slower, with the
    same results.

    Args:
        transformer: the frozen model; causal.
        rows: B.

    Attributes:
        vectors: ``[B, T, D]``, of which each row's first ``lengths`` are known.
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
        """Know just this: of rows ``[R]``, the first ``lengths`` [R] of vectors ``[R, T, D]``.

        What is kept follows from the arguments alone, not from how they came to be known, so that a
        resumed run goes on bit for bit. Where it is what was begun with before, nothing is run.
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
        if not self._keeps(longest, longest):
            return
        assert self._cache is not None
        self._cache.forget()
        if longest:
            self._behind(rows, begun, _one_after_another(begun))
            self._cache.begin(lengths)

    def candidates(self, rows: Tensor, embeds: Tensor) -> Tensor:
        """Features ``[R, K, F]`` of vectors ``[R, K, D]``, each the next of its row.

        Differentiable in ``embeds``. The latest call is what `keep` chooses from.
        """
        self._latest = embeds.detach()
        longest = int(self.lengths[rows].max())
        if self._keeps(longest + 1, longest + embeds.shape[1]):
            beside = torch.eye(embeds.shape[1], dtype=torch.bool, device=embeds.device)
            return self._behind(rows, embeds, beside)
        return self._plain(rows, embeds)

    def reaches(self, rows: Tensor, width: int, count: int) -> bool:
        """Whether `ahead` can run ``count`` candidates at each of the next ``width`` places."""
        longest = int(self.lengths[rows].max())
        return self._fits(longest + width, longest + width * count)

    def ahead(self, rows: Tensor, embeds: Tensor) -> Tensor:
        """Features ``[R, W, K, F]`` of candidates ``[R, W, K, D]`` for the next W places.

        At each place the candidates stand behind the first ones of the places before. The latest
        call is what `keep` chooses from, place after place. More than one place asks for
        `reaches`.
        """
        R, W, K = embeds.shape[:3]
        if W == 1:
            return self.candidates(rows, embeds[:, 0])[:, None]
        assert self.reaches(rows, W, K)
        self._latest = embeds.detach().flatten(1, 2)
        place = torch.arange(W * K, device=rows.device) // K
        leads = torch.arange(W * K, device=rows.device) % K == 0
        sees = leads & (place < place[:, None])
        sees |= torch.eye(W * K, dtype=torch.bool, device=rows.device)
        features = self._behind(rows, embeds.flatten(1, 2), sees)
        return features.view(R, W, K, -1)

    def followed_by(self, rows: Tensor, vectors: Tensor) -> Tensor:
        """Features ``[R, W, F]`` of W vectors ``[R, W, D]`` that follow; differentiable in them."""
        end = int(self.lengths[rows].max()) + vectors.shape[1]
        if self._keeps(end, end):
            return self._behind(rows, vectors, _one_after_another(vectors))
        places = self.lengths[rows, None] + torch.arange(vectors.shape[1], device=rows.device)
        each = torch.arange(len(rows), device=rows.device)[:, None]
        length = int(places.max()) + 1
        sequence = vectors.new_zeros(len(rows), length, vectors.shape[2])
        sequence[:, : self.vectors.shape[1]] = self.vectors[rows, :length]
        sequence = sequence.index_put((each, places), vectors)
        mask = torch.arange(length, device=rows.device) <= places[:, -1:]
        features: Tensor = self.transformer(sequence, mask)
        return features[each, places]

    def keep(self, rows: Tensor, places: Tensor) -> None:
        """Of the latest candidates, those at ``places`` [R] (-1: none) are known from now on.

        After `ahead`, candidate k of the w-th place is at w K + k.

        Args:
            rows: ``[R]`` the rows of the latest call.
            places: ``[R]``.
        """
        kept = (places >= 0).nonzero()[:, 0]
        if not len(kept):
            return
        if self._cache is not None:
            self._cache.keep(places[:, None])
        into, self._begun = rows[kept], None
        at = self.lengths[into]
        if int(at.max()) >= self.vectors.shape[1]:
            more = self.vectors.new_zeros(
                len(self.vectors), max(16, self.vectors.shape[1]), self.vectors.shape[2]
            )
            self.vectors = torch.cat([self.vectors, more], dim=1)
        self.vectors[into, at] = self._latest[kept, places[kept]]
        self.lengths[into] += 1

    @torch.no_grad()
    def take_back(self, rows: Tensor) -> None:
        """The last known vector of each of ``rows`` [R] is not known any more."""
        self._begun = None
        self.lengths[rows] -= 1
        if self._cache is not None:
            self._cache.lengths[rows] -= 1

    def _keeps(self, length: int, places: int) -> bool:
        """Whether keys and values serve for a tree of this size; once one outgrows them, never."""
        if not self._fits(length, places):
            self._cache = None
        return self._cache is not None

    def _fits(self, length: int, places: int) -> bool:
        config = self.transformer.model.config
        return self._cache is not None and tree_fits(config, length, places)

    def _behind(self, rows: Tensor, embeds: Tensor, sees: Tensor) -> Tensor:
        assert self._cache is not None
        return self._cache.run(
            lambda mask, positions, cache: self.transformer.run(embeds, mask, positions, cache),
            rows,
            sees,
        )

    def _plain(self, rows: Tensor, embeds: Tensor) -> Tensor:
        lengths, prefix = self.lengths[rows], self.vectors[rows]
        if not embeds.requires_grad:
            return self.transformer.candidates(prefix, lengths, embeds)
        R, K, D = embeds.shape
        owner = torch.arange(R, device=rows.device).repeat_interleave(K)
        each = torch.arange(R * K, device=rows.device)
        ends = lengths[owner]
        longest = int(lengths.max())
        sequence = prefix.new_zeros(R * K, longest + 1, D)
        sequence[:, :longest] = prefix[owner, :longest]
        sequence = sequence.index_put((each, ends), embeds.reshape(-1, D))
        place = torch.arange(sequence.shape[1], device=rows.device)
        features: Tensor = self.transformer(sequence, place <= ends[:, None])
        return features[each, ends].reshape(R, K, -1)


def _one_after_another(vectors: Tensor) -> Tensor:
    """``[W, W]`` bool: each of W vectors ``[R, W, D]`` sees those before it."""
    width = vectors.shape[1]
    return torch.ones(width, width, dtype=torch.bool, device=vectors.device).tril()
