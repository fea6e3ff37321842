"""Features of tokens behind each row's known prefix, without running the prefix again."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_inversion.transformer.candidates import tree_fits
from lightning_inversion.transformer.ragged_cache import RaggedCache
from lightning_inversion.transformer.truncated import TruncatedTransformer


class KnownPrefix:
    """The tokens known so far of B texts; runs candidates for each text's next token behind them.

    Where the model takes it, keys and values of the known tokens are kept, and candidates lie side
    by side in one forward. Other models (ALiBi, sliding windows, state spaces) run each candidate
    with its whole prefix: slower, with the same results.

    Args:
        transformer: the frozen model; causal.
        rows: B.

    Attributes:
        ids: ``[B, T]`` the known tokens, of which each row's first ``lengths`` count.
        lengths: ``[B]``.
    """

    def __init__(self, transformer: TruncatedTransformer, rows: int) -> None:
        self.transformer = transformer
        device = transformer.device
        self.ids = torch.zeros(rows, 0, dtype=torch.long, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self._cache = RaggedCache(rows, transformer.depth, device) if transformer.caches else None

    def candidates(self, rows: Tensor, embeds: Tensor) -> Tensor:
        """Features ``[R, K, F]`` of vectors ``[R, K, D]``, each the next token of its row.

        Differentiable in ``embeds``. The latest call is what `keep` chooses from.
        """
        fits = tree_fits(
            self.transformer.model.config, int(self.lengths[rows].max()), embeds.shape[1]
        )
        if self._cache is None or not fits:
            self._cache = None  # a prefix that has outgrown the window stays so
            return self._plain(rows, embeds)
        sees = torch.eye(embeds.shape[1], dtype=torch.bool, device=embeds.device)
        return self._cache.run(
            lambda mask, positions, cache: self.transformer.run(embeds, mask, positions, cache),
            rows,
            sees,
        )

    def keep(self, rows: Tensor, places: Tensor, ids: Tensor) -> None:
        """Of the latest candidates, those at ``places`` [R] (-1: none) are known from now on.

        Args:
            rows: the rows of the latest call.
            places: ``[R]``.
            ids: ``[R]`` their tokens.
        """
        if self._cache is not None:
            self._cache.keep(places[:, None])
        kept = places >= 0
        self._append(rows[kept], ids[kept][:, None])

    @torch.no_grad()
    def start(self, ids: Tensor) -> None:
        """Begin with tokens ``[B, N]`` that are known beforehand, of every row."""
        rows = torch.arange(len(ids), device=self.lengths.device)
        if self._cache is not None:
            embeds = self.transformer.embedding(ids)
            N = ids.shape[1]
            self._cache.run(
                lambda mask, positions, cache: self.transformer.run(embeds, mask, positions, cache),
                rows,
                torch.ones(N, N, dtype=torch.bool, device=ids.device).tril(),
            )
            self._cache.keep(torch.arange(N, device=ids.device).expand(len(ids), N))
        self._append(rows, ids)

    def _append(self, rows: Tensor, ids: Tensor) -> None:
        longest = int(self.lengths[rows].max()) + ids.shape[1] if len(rows) else 0
        if longest > self.ids.shape[1]:
            more = self.ids.new_zeros(len(self.ids), longest - self.ids.shape[1])
            self.ids = torch.cat([self.ids, more], dim=1)
        for place in range(ids.shape[1]):
            self.ids[rows, self.lengths[rows]] = ids[:, place]
            self.lengths[rows] += 1

    def _plain(self, rows: Tensor, embeds: Tensor) -> Tensor:
        lengths = self.lengths[rows]
        prefix = self.transformer.embedding(self.ids[rows])
        if not embeds.requires_grad:
            return self.transformer.candidates(prefix, lengths, embeds)
        R, K, D = embeds.shape
        owner = torch.arange(R, device=rows.device).repeat_interleave(K)
        each = torch.arange(R * K, device=rows.device)
        ends = lengths[owner]
        sequence = prefix.new_zeros(R * K, int(lengths.max()) + 1, D)
        sequence[:, :-1] = prefix[owner, : sequence.shape[1] - 1]
        sequence = sequence.index_put((each, ends), embeds.reshape(-1, D))
        place = torch.arange(sequence.shape[1], device=rows.device)
        features: Tensor = self.transformer(sequence, place <= ends[:, None])
        return features[each, ends].reshape(R, K, -1)
