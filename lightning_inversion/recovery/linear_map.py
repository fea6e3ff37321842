"""The linear map from features to embeddings as a candidate order."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_inversion.recovery.frontier import Frontier
from lightning_inversion.recovery.orders import CandidateOrder, Candidates
from lightning_inversion.transformer.readout import Readout

_TEMPERS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
_AT_A_TIME = 1024
"""Tokens that are measured at a time: the products with two matrices are three times as large."""
_AHEAD = 8
"""Tokens of a place that are kept ready."""
_HELD_BACK = 192
"""Positions of the model's own text on which the temper is chosen."""


class LinearMap(CandidateOrder):
    """Tokens whose embedding is likely, given the readout's guess and how it errs.

    The log-likelihood is Gaussian with the covariance of the readout's errors. Those are not
    Gaussian, so it is tempered by what makes real tokens likeliest beside the language model's
    prior, measured on the model's own text.

    Args:
        later: whether a mixture should listen in later rounds too. Off, because what is tried later
            is better judged by the model itself, where another order asks it.
    """

    def __init__(self, later: bool = False) -> None:
        self.later = later
        self._readout: Readout | None = None

    def begin(self, frontier: Frontier) -> None:
        """Measure the vocabulary by how the readout errs, once for each readout."""
        self._ahead: Tensor | None = None
        if self._readout is frontier.readout:
            return
        self._readout, embedding = frontier.readout, frontier.transformer.embedding
        self._precision = self._readout.whitening @ self._readout.whitening.mT
        ids = torch.arange(embedding.vocabulary_size, device=frontier.target.device)
        self._half_squares = torch.empty(2, len(ids), device=ids.device)
        for chunk in torch.split(ids, _AT_A_TIME):
            vectors = embedding(chunk)
            squares = (vectors @ self._precision).mul_(vectors).sum(-1)
            self._half_squares[:, chunk] = squares / 2
        self._temper: float | None = None

    def speaks(self, later: bool) -> bool:
        """In the first round, and in later ones as asked."""
        return self.later or not later

    def scores(self, frontier: Frontier, rows: Tensor) -> Tensor:
        """Of the linear guess, corrected by what was tried."""
        if self._temper is None:  # which the best tokens do not depend on
            self._temper = self._best_temper(frontier)
        return self._temper * self._likelihood(
            frontier, frontier.guess(rows), frontier.positions(rows)
        )

    def ahead(self, frontier: Frontier, rows: Tensor, width: int, count: int) -> Candidates:
        """Of the linear guess at each place, which no other place has a part in."""
        if self._ahead is None:
            self._ahead = self._best_everywhere(frontier)
        last = frontier.target.shape[1] - 1
        places = frontier.positions(rows)[:, None] + torch.arange(width, device=rows.device)
        ids = self._ahead[rows[:, None], places.clamp(max=last), :count]
        return Candidates(ids, (self.name,) * ids.shape[2])

    def _best_everywhere(self, frontier: Frontier) -> Tensor:
        """``[B, T, 8]`` the best tokens of every place, computed once for a batch."""
        (B, T), embedding = frontier.target.shape[:2], frontier.transformer.embedding
        targets = frontier.target.flatten(0, 1)
        count = min(_AHEAD, embedding.vocabulary_size)
        # Made beforehand: pieces kept from each chunk would lie between the scores of earlier ones,
        # and their memory could not be used again.
        best = torch.empty(B * T, count, dtype=torch.long, device=targets.device)
        # The first places of all texts stand together, as they are measured apart.
        order = torch.arange(B * T, device=targets.device).view(B, T).T.flatten()
        for places in torch.split(order, embedding.at_a_time):
            where = places % T
            guess = frontier.readout(targets[places], where)
            best[places] = self._likelihood(frontier, guess, where).topk(count, dim=1).indices
        return best.view(B, T, count)

    def _likelihood(self, frontier: Frontier, guess: Tensor, positions: Tensor) -> Tensor:
        first, later = (guess @ precision for precision in self._precision)
        weighed = torch.where((positions == 0)[:, None], first, later)
        kinds = positions.clamp(max=1)
        # Later places share one row: a copy for each would be as large as the scores themselves.
        half_squares = self._half_squares[1 if bool(kinds.all()) else kinds]
        return frontier.transformer.embedding.dot(weighed).sub_(half_squares)

    def _best_temper(self, frontier: Frontier) -> float:
        text, language_model = frontier.instruments.text, frontier.instruments.language_model
        if text is None or language_model is None:
            return 1.0
        text = text[: max(1, _HELD_BACK // text.shape[1])]
        text = text.to(frontier.target.device)
        chances = [0.0] * len(_TEMPERS)
        for one in text[:, None]:  # a text at a time: each place has scores of the whole vocabulary
            features = frontier.transformer.features_of(one)[0, 1:]
            later = torch.ones(len(features), dtype=torch.long, device=features.device)
            likelihood = self._likelihood(frontier, frontier.readout(features, later), later)
            prior = language_model.log_probabilities(one)[0, :-1]
            right = one[0, 1:, None]
            for number, temper in enumerate(_TEMPERS):
                mixed = torch.add(prior, likelihood, alpha=temper)
                right_is = mixed.gather(1, right)[:, 0] - mixed.logsumexp(-1)
                chances[number] += float(right_is.sum())
        return _TEMPERS[chances.index(max(chances))]
