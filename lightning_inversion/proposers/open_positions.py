"""``OpenPositions``: where each prompt of a batch stands, and what wrong candidates have shown."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_inversion.proposers.evidence import Evidence
from lightning_inversion.transformer.prefix import FixedPrefix
from lightning_inversion.verification.measurements import Measurements

_STORED = ("tried", "count", "rounds", "reach", "_rivals", "_rival_residuals")
FARTHEST = 64
"""The most positions that are run together, and the number for a new prompt."""


class OpenPositions:
    """The next unknown token of each of B prompts, and what was run there.

    Args:
        measurements: of the model.
        target: ``[B, T, F]`` features to reproduce.
        prefix: keeps the keys and values of the tokens found; default a new one.

    Attributes:
        prefix: the tokens found so far.
        tried: ``[B, V]`` bool, tokens that were run at the row's position.
        count: ``[B]`` how many these are.
        rounds: ``[B]`` rounds of candidates at the row's position.
        reach: ``[B]`` how many positions are worth running together: twice as many as before where
            all first candidates were right, else half.
    """

    def __init__(
        self, measurements: Measurements, target: Tensor, prefix: FixedPrefix | None = None
    ) -> None:
        self.measurements, self.target = measurements, target
        self.transformer, self.probe = measurements.transformer, measurements.probe
        B, device, embedding = len(target), target.device, self.transformer.embedding
        self.prefix = prefix or FixedPrefix(self.transformer, B)
        self.tried = torch.zeros(B, embedding.vocabulary_size, dtype=torch.bool, device=device)
        self.count = torch.zeros(B, dtype=torch.long, device=device)
        self.rounds = torch.zeros(B, dtype=torch.long, device=device)
        self.reach = torch.full((B,), FARTHEST, device=device)
        self.evidence = Evidence(self.probe, embedding, B, device)
        self._rivals = torch.full((B,), -1, device=device)
        self._rival_residuals = torch.full((B,), torch.inf, device=device)

    def to_checkpoint(self) -> dict[str, Tensor]:
        """What a checkpoint holds, beside the tokens found, to continue from here."""
        stored = {name: getattr(self, name) for name in _STORED}
        return {**stored, **self.evidence.to_checkpoint()}

    def restore(self, stored: dict[str, Tensor]) -> None:
        """Continue from what a checkpoint holds."""
        for name in _STORED:
            setattr(self, name, stored[name].to(self.target.device))
        self.evidence.restore(stored)

    def positions(self, rows: Tensor) -> Tensor:
        """The position ``[R]`` of each row's next token."""
        return self.prefix.lengths[rows]

    def target_at(self, rows: Tensor) -> Tensor:
        """The features ``[R, F]`` that each row's next token must reproduce."""
        return self.target[rows, self.positions(rows)]

    def linear_guess(self, rows: Tensor) -> Tensor:
        """The linear probe's embedding ``[R, D]`` of each row's next token."""
        return self.probe(self.target_at(rows), self.positions(rows))

    def guess(self, rows: Tensor) -> Tensor:
        """The linear guess ``[R, D]``, corrected by the wrong candidates that came closest."""
        guess, positions = self.linear_guess(rows), self.positions(rows)
        return self.evidence.corrected(rows, positions, guess)

    def closest(self, rows: Tensor, count: int) -> Tensor:
        """Embeddings ``[R, K, D]`` of the wrong candidates that came closest, nearest first.

        The corrected guess fills the entries that do not exist yet. K is ``count``, or 16.
        """
        return self.evidence.closest(rows, count, self.guess(rows))

    def rivals(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest wrong candidate ``[R]`` of each row so far, and its residual ``[R]``."""
        return self._rivals[rows], self._rival_residuals[rows]

    def count_with(self, rows: Tensor, ids: Tensor) -> Tensor:
        """How many tokens ``[R]`` are run at each position with candidates ``[R, K]``."""
        fresh = torch.zeros_like(self.tried[rows]).scatter_(1, ids, True)
        return self.count[rows] + (fresh & ~self.tried[rows]).sum(1)

    def stay(
        self, rows: Tensor, ids: Tensor, best: Tensor, smallest: Tensor, features: Tensor | None
    ) -> None:
        """Record candidates of rows whose token is still open.

        Args:
            rows: ``[R]``.
            ids: ``[R, K]`` what was run.
            best: ``[R]`` the candidate with the smallest residual.
            smallest: ``[R]`` its residual.
            features: ``[R, K, F]`` of the candidates; None where they correct no guess.
        """
        # Only rows that stay need a record of what was tried: most move on with their first token.
        self.count[rows] += (~self.tried[rows[:, None], ids]).sum(1)
        self.tried[rows[:, None], ids] = True
        nearer = smallest < self._rival_residuals[rows]
        self._rivals[rows[nearer]] = best[nearer]
        self._rival_residuals[rows[nearer]] = smallest[nearer]
        if features is not None:
            self.evidence.keep(rows, self.positions(rows), self.target_at(rows), ids, features)

    def leave(self, rows: Tensor) -> None:
        """A new position begins in ``rows``."""
        self.tried[rows[self.count[rows] > 0]] = False
        self.count[rows] = 0
        self.rounds[rows] = 0
        self.evidence.forget(rows)
        self._rivals[rows] = -1
        self._rival_residuals[rows] = torch.inf
