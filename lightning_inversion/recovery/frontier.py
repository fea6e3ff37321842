"""Where the recovery of a batch of texts stands: what is known, and what was tried."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_inversion.transformer.known_prefix import KnownPrefix
from lightning_inversion.transformer.language_model import LanguageModel
from lightning_inversion.transformer.readout import Readout
from lightning_inversion.transformer.truncated import TruncatedTransformer

_KEPT = 16
"""Wrong candidates that correct the guess, the closest ones."""


class Frontier:
    """The next unknown token of each of B texts.

    Args:
        transformer: the frozen model.
        readout: its linear guess.
        target: ``[B, T, F]`` features to reproduce.
        language_model: the whole model, where an order asks for it.
        text: ``[N, T]`` ids that it wrote.

    Attributes:
        prefix: the tokens known so far.
        tried: ``[B, V]`` bool, tokens that were run at the row's position.
        rounds: ``[B]`` rounds of candidates at the row's position.
    """

    def __init__(
        self,
        transformer: TruncatedTransformer,
        readout: Readout,
        target: Tensor,
        language_model: LanguageModel | None = None,
        text: Tensor | None = None,
    ) -> None:
        self.transformer, self.readout, self.target = transformer, readout, target
        self.language_model, self.text = language_model, text
        B, device, embedding = len(target), target.device, transformer.embedding
        self.prefix = KnownPrefix(transformer, B)
        self.tried = torch.zeros(B, embedding.vocabulary_size, dtype=torch.bool, device=device)
        self.rounds = torch.zeros(B, dtype=torch.long, device=device)
        self._errors = torch.full((B, _KEPT), torch.inf, device=device)
        self._corrected = torch.zeros(B, _KEPT, embedding.width, device=device)

    @property
    def rows(self) -> int:
        """B."""
        return len(self.target)

    def positions(self, rows: Tensor) -> Tensor:
        """``[R]`` where each row's next token stands."""
        return self.prefix.lengths[rows]

    def target_at(self, rows: Tensor) -> Tensor:
        """``[R, F]`` what each row's next token must reproduce."""
        return self.target[rows, self.positions(rows)]

    def linear_guess(self, rows: Tensor) -> Tensor:
        """``[R, D]`` what the readout makes of the target."""
        return self.readout(self.target_at(rows), self.positions(rows))

    def guess(self, rows: Tensor) -> Tensor:
        """``[R, D]`` the linear guess, corrected by the wrong candidates that came closest.

        Each wrong candidate shows by how much the readout misses in this context: its embedding,
        plus the readout's difference between target and candidate, is a guess without that miss
        (a secant step). The closer a candidate came, the more it counts.
        """
        errors = self._errors[rows]
        known = torch.isfinite(errors)
        squares = errors.square()
        middle = squares.masked_fill(~known, torch.nan).nanmedian(dim=1, keepdim=True).values
        weights = torch.softmax(-squares / (0.3 * middle).clamp_min(1e-12), dim=1)
        weights = weights.masked_fill(~known, 0.0)
        corrected = (weights[..., None] * self._corrected[rows]).sum(1)
        return torch.where(known.any(1, keepdim=True), corrected, self.linear_guess(rows))

    def learn(self, rows: Tensor, ids: Tensor, features: Tensor) -> None:
        """Note that tokens ``[R, K]`` with features ``[R, K, F]`` were run."""
        self.tried[rows[:, None], ids] = True
        self.rounds[rows] += 1
        positions = self.positions(rows)[:, None].expand(ids.shape)
        target = self.target_at(rows)[:, None]
        distance = self.readout.standardize(features, positions) - self.readout.standardize(
            target, positions[:, :1]
        )
        errors = torch.linalg.vector_norm(distance, dim=-1)
        closest = errors.topk(min(_KEPT, ids.shape[1]), dim=1, largest=False).indices
        pick = torch.arange(len(rows), device=rows.device)[:, None]
        vectors = self.transformer.embedding(ids[pick, closest])
        corrected = (
            vectors
            + self.linear_guess(rows)[:, None]
            - self.readout(features[pick, closest], positions[pick, closest])
        )
        errors = torch.cat([self._errors[rows], errors[pick, closest]], dim=1)
        corrected = torch.cat([self._corrected[rows], corrected], dim=1)
        order = errors.argsort(dim=1, stable=True)[:, :_KEPT]
        self._errors[rows] = errors.gather(1, order)
        self._corrected[rows] = corrected[pick, order]

    def advance(self, rows: Tensor) -> None:
        """A new position begins in ``rows``."""
        self.tried[rows] = False
        self.rounds[rows] = 0
        self._errors[rows] = torch.inf
