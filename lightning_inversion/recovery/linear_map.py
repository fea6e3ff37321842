"""The linear map from features to embeddings as a candidate order."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_inversion.recovery.frontier import Frontier
from lightning_inversion.recovery.orders import CandidateOrder

_TEMPERS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
_HELD_BACK = 512
"""Positions of the model's own text on which the temper is chosen."""


class LinearMap(CandidateOrder):
    """Tokens whose embedding is likely, given the readout's guess and how it errs.

    The log-likelihood is Gaussian with the covariance of the readout's errors. Those are not
    Gaussian, so it is tempered by what makes real tokens likeliest beside the language model's
    prior, measured on the model's own text.
    """

    def begin(self, frontier: Frontier) -> None:
        """Whiten the vocabulary; choose the temper."""
        embedding = frontier.transformer.embedding
        self._whitened = torch.stack(
            [embedding.matrix.float() @ whitening for whitening in frontier.readout.whitening]
        )
        self._half_squares = self._whitened.square().sum(-1) / 2
        self._temper = self._best_temper(frontier)

    def speaks(self, later: bool) -> bool:
        """In the first round: what is tried later is better judged by the model itself."""
        return not later

    def scores(self, frontier: Frontier, rows: Tensor) -> Tensor:
        """Of the linear guess, corrected by what was tried."""
        return self._temper * self._likelihood(
            frontier, frontier.guess(rows), frontier.positions(rows)
        )

    def _likelihood(self, frontier: Frontier, guess: Tensor, positions: Tensor) -> Tensor:
        scores = torch.empty(len(guess), self._whitened.shape[1], device=guess.device)
        for kind in (0, 1):
            members = positions.clamp(max=1) == kind
            whitened = guess[members] @ frontier.readout.whitening[kind]
            scores[members] = whitened @ self._whitened[kind].T - self._half_squares[kind]
        return scores

    def _best_temper(self, frontier: Frontier) -> float:
        if frontier.text is None or frontier.language_model is None:
            return 1.0
        text = frontier.text[: max(1, _HELD_BACK // frontier.text.shape[1])]
        text = text.to(frontier.target.device)
        features = frontier.transformer.features_of(text)[:, 1:].flatten(0, 1)
        later = torch.ones(len(features), dtype=torch.long, device=features.device)
        likelihood = self._likelihood(frontier, frontier.readout(features, later), later)
        prior = frontier.language_model.log_probabilities(text)[:, :-1].flatten(0, 1)
        right = text[:, 1:].flatten()[:, None]
        chances = [
            float((temper * likelihood + prior).log_softmax(-1).gather(1, right).mean())
            for temper in _TEMPERS
        ]
        return _TEMPERS[chances.index(max(chances))]
