"""Naming the next token of many prompts at once: propose, run, learn from what was run.

Each row is known up to its proven prefix. The tokens nearest to a guess of the next embedding are
run behind the prefix, all in one forward; the one whose features reproduce the target is proven.
Wrong candidates are not wasted: each shows how features answer to embeddings in this very context,
and together they correct the guess (a secant step).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_inversion.recovery.verification import TOLERANCE, relative_residual
from lightning_inversion.transformer.known_vectors import KnownVectors
from lightning_inversion.transformer.readout import Readout
from lightning_inversion.transformer.truncated import TruncatedTransformer

_CANDIDATES_AT_A_TIME = 2048
"""Candidates of one forward, over all rows: bounds the memory."""

_FIRST = 8
"""Candidates of a round that are run before the others."""


@dataclass
class Proposal:
    """What one round found, for the rows it looked at.

    Attributes:
        proven: ``[R]`` bool, True where a candidate reproduced the target.
        ids: ``[R]`` the best candidate, proven or not.
        residuals: ``[R]`` its relative residual.
    """

    proven: Tensor
    ids: Tensor
    residuals: Tensor


class TokenSearch:
    """The candidates tried at each row's first unproven position, and what they taught.

    Args:
        transformer: the frozen model; causal.
        readout: its linear guess.
        target: ``[B, T, F]`` features to reproduce.
        start: candidates of a row's first round at a position.
        most: candidates of a round at most; a row that stays unproven gets four times as many
            every few rounds, so that the whole vocabulary is tried in the end.
        kept: how many of the best wrong candidates correct the guess.
    """

    GROWS_EVERY = 4
    """Rounds at a position after which a row's share of candidates grows."""

    tested: Tensor
    rounds: Tensor
    errors: Tensor
    corrected: Tensor

    def __init__(
        self,
        transformer: TruncatedTransformer,
        readout: Readout,
        target: Tensor,
        start: int = 64,
        most: int = 1024,
        kept: int = 8,
    ) -> None:
        self.transformer, self.readout, self.target = transformer, readout, target
        self.start, self.most = start, most
        rows, length, _ = target.shape
        embedding, device = transformer.embedding, target.device
        positions = torch.arange(length, device=device).expand(rows, length)
        self.guess = readout(target, positions)
        self.half_squares = embedding.norms.square() / 2
        self.tested = torch.zeros(rows, embedding.vocabulary_size, dtype=torch.bool, device=device)
        self.rounds = torch.zeros(rows, dtype=torch.long, device=device)
        self.errors = torch.full((rows, kept), torch.inf, device=device)
        self.corrected = torch.zeros(rows, kept, embedding.width, device=device)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold to go on from here."""
        return {name: getattr(self, name) for name in ("tested", "rounds", "errors", "corrected")}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from ``state``."""
        for name, value in state.items():
            setattr(self, name, value.to(self.target.device))

    def secant(self, rows: Tensor) -> Tensor:
        """The guess ``[R, D]`` corrected by the best wrong candidates; zero where there is none.

        Each wrong candidate shows by how much the readout misses in this context; its embedding
        plus the readout's difference to the target is a guess without that miss.
        """
        weights = torch.isfinite(self.errors[rows]).float()[..., None]
        return (self.corrected[rows] * weights).sum(1) / weights.sum(1).clamp_min(1)

    @torch.no_grad()
    def propose(self, rows: Tensor, known: KnownVectors, guesses: Tensor) -> Proposal:
        """Run each row's most likely untried tokens and prove one where it can be.

        Args:
            rows: ``[R]`` which rows of the batch.
            known: the vectors already proven; what follows them is looked at.
            guesses: ``[R, D]`` where the embedding is thought to be, beside our own secant guess.
        """
        proven = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        ids = torch.zeros_like(rows)
        residuals = torch.full((len(rows),), torch.inf, device=rows.device)
        sizes = (self.start * 4 ** (self.rounds[rows] // self.GROWS_EVERY).clamp(max=8)).clamp(
            max=self.most
        )
        for size in torch.unique(sizes).tolist():
            members = (sizes == size).nonzero()[:, 0]
            for part in members.split(max(1, _CANDIDATES_AT_A_TIME // size)):
                found = self._round(rows[part], known, guesses[part], int(size))
                proven[part], ids[part], residuals[part] = found.proven, found.ids, found.residuals
        return Proposal(proven, ids, residuals)

    def _round(self, rows: Tensor, known: KnownVectors, guesses: Tensor, size: int) -> Proposal:
        """The nearest few first: mostly one of them is right, and the others need not run."""
        candidates = self._nearest_untried(rows, guesses, size)
        first, others = candidates[:, :_FIRST], candidates[:, _FIRST:]
        features = self._features(rows, known, first)
        found = self._judge(rows, known, first, features)
        left = (~found.proven).nonzero()[:, 0]
        if len(left):
            rows, features, candidates = rows[left], features[left], candidates[left]
            if others.shape[1]:
                features = torch.cat([features, self._features(rows, known, others[left])], dim=1)
            late = self._judge(rows, known, candidates, features)
            found.proven[left], found.ids[left] = late.proven, late.ids
            found.residuals[left] = late.residuals
            self._learn(rows, known.lengths_of(rows), candidates, features)
            self._forget(rows[late.proven])
        return found

    def _features(self, rows: Tensor, known: KnownVectors, candidates: Tensor) -> Tensor:
        return known.candidates(rows, self.transformer.embedding(candidates))

    def _judge(
        self, rows: Tensor, known: KnownVectors, candidates: Tensor, features: Tensor
    ) -> Proposal:
        target = self.target[rows, known.lengths_of(rows)]
        best = relative_residual(features, target[:, None]).min(dim=1)
        ids = candidates.gather(1, best.indices[:, None])[:, 0]
        proven = best.values <= TOLERANCE
        self._forget(rows[proven])
        return Proposal(proven, ids, best.values)

    def _nearest_untried(self, rows: Tensor, guesses: Tensor, size: int) -> Tensor:
        """``[R, size]`` tokens, the nearest first: in turn to the guess and to the secant guess."""
        size = min(size, self.tested.shape[1])
        near = self._nearness(guesses, self.tested[rows])
        ours = near.topk(size, dim=1).indices
        known = torch.isfinite(self.errors[rows, 0]).nonzero()[:, 0]
        if not len(known) or size < 2:
            return ours
        kept = ours[known, : size - size // 2]
        blocked = (near[known] == -torch.inf).scatter_(1, kept, True)
        theirs = self._nearness(self.secant(rows[known]), blocked).topk(size // 2, dim=1).indices
        turns = torch.cat([torch.arange(0, 2 * kept.shape[1], 2), torch.arange(1, size, 2)])
        ours[known] = torch.cat([kept, theirs], dim=1)[:, turns.argsort().to(rows.device)]
        return ours

    def _nearness(self, vectors: Tensor, blocked: Tensor) -> Tensor:
        scores = self.transformer.embedding.dot(vectors) - self.half_squares
        return scores.masked_fill_(blocked, -torch.inf)

    def _learn(self, rows: Tensor, lengths: Tensor, candidates: Tensor, features: Tensor) -> None:
        """Remember what was tried, and the corrections of the candidates that came closest."""
        vectors, target = self.transformer.embedding(candidates), self.target[rows, lengths]
        self.tested[rows[:, None], candidates] = True
        self.rounds[rows] += 1
        positions = lengths[:, None].expand(candidates.shape)
        distance = self.readout.standardize(features, positions) - self.readout.standardize(
            target[:, None], positions
        )
        errors = torch.linalg.vector_norm(distance, dim=-1)
        kept = self.errors.shape[1]
        closest = errors.topk(min(kept, errors.shape[1]), dim=1, largest=False).indices
        pick = torch.arange(len(rows), device=rows.device)[:, None]
        corrected = (
            vectors[pick, closest]
            + self.guess[rows, lengths][:, None]
            - self.readout(features[pick, closest], positions[pick, closest])
        )
        all_errors = torch.cat([self.errors[rows], errors[pick, closest]], dim=1)
        all_corrected = torch.cat([self.corrected[rows], corrected], dim=1)
        order = all_errors.argsort(dim=1, stable=True)[:, :kept]
        self.errors[rows] = all_errors.gather(1, order)
        self.corrected[rows] = all_corrected[pick, order]

    def _forget(self, rows: Tensor) -> None:
        """A new position begins."""
        self.tested[rows] = False
        self.rounds[rows] = 0
        self.errors[rows] = torch.inf
