"""Position 0 as a proposer: the linear probe's tokens and those near them, then a scan of all."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_inversion.proposers.open_positions import OpenPositions
from lightning_inversion.proposers.probe_proposer import ProbeRanking
from lightning_inversion.proposers.proposals import Candidates, Proposals, Proposer, best_untried
from lightning_inversion.verification.first_tokens import FirstTokenFeatures

_ROUNDS_BY_PROBE = 8
"""Rounds before the vocabulary is scanned: nearly all first tokens are found in the first one."""


class FirstTokenScan(Proposer):
    """Tokens whose features as the first token of a prompt are close to the target's.

    A first token sees no other, so its features follow from the token alone, and the linear probe
    reads nearly all of them. Half of the first candidates are the probe's; the other half are the
    nearest embeddings to its best one, which are the nearest features too, so that a certificate
    compares the token with its strongest rivals. Where some rounds have verified nothing, the
    features of all tokens are computed once for a model and a depth, and kept in the cache folder.
    """

    def begin(self, search: OpenPositions) -> Proposals:
        return _FirstTokens(search, self.name)


class _FirstTokens(Proposals):
    def __init__(self, search: OpenPositions, name: str) -> None:
        super().__init__(search, name)
        self._ranking = search.measurements.derived(ProbeRanking)

    def scores(self, rows: Tensor) -> Tensor:
        """By the probe in the first rounds, then by the distance of features in the scan."""
        scores = torch.empty(self.search.tried[rows].shape, device=rows.device)
        scanned = self.search.rounds[rows] >= _ROUNDS_BY_PROBE
        if scanned.any():
            scores[scanned] = self._nearness(rows[scanned])
        if not scanned.all():
            left = rows[~scanned]
            guess, positions = self.search.linear_guess(left), self.search.positions(left)
            scores[~scanned] = self._ranking.likelihood(guess, positions)
        return scores

    def propose(self, rows: Tensor, count: int) -> Candidates:
        """The best tokens; in the first round also the nearest to the best of them."""
        if count == 1 or (self.search.rounds[rows] > 0).any():
            return super().propose(rows, count)
        embedding, tried = self.search.transformer.embedding, self.search.tried[rows]
        best = best_untried(self.scores(rows), tried, (count + 1) // 2)
        near = embedding.nearness(embedding(best[:, 0]))
        near = best_untried(near, tried.scatter(1, best, True), count // 2)
        ids = torch.cat([best, near], dim=1)
        return Candidates(ids, (self.name,) * ids.shape[1])

    def _nearness(self, rows: Tensor) -> Tensor:
        search, scan = self.search, self.search.measurements.derived(FirstTokenFeatures)
        target = search.probe.standardize(search.target_at(rows), search.positions(rows))
        return -scan.distances(target)
