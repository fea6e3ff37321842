"""The linear probe as a proposer: tokens by how well they explain the probe's guess."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_inversion.proposers.open_positions import OpenPositions
from lightning_inversion.proposers.proposals import (
    UNIFORM_SHARE,
    Candidates,
    Proposals,
    Proposer,
    mix_with_uniform,
)
from lightning_inversion.transformer.embedding import TokenEmbedding, best_tokens
from lightning_inversion.transformer.linear_probe import LinearProbe
from lightning_inversion.verification.measurements import Measurements

_TEMPERATURES = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.01, 0.003)
_ENOUGH = (13.0, 6.5)
"""How many times the bits that name a token the used directions carry: at position 0, where errors
are farthest from Gaussian, and later."""
_AT_A_TIME = 1024
"""Tokens that are projected at a time."""
_AHEAD = 8
"""The best tokens of a position that are kept ready."""
_HELD_OUT = 192
"""Positions of the model's own text on which the temperature is chosen."""


class ProbeProposer(Proposer):
    """Tokens that explain the linear probe's guess, given how it errs.

    The guess of a regression is drawn towards the mean token. So a token is compared not with the
    guess but with the mean guess for that token: with q the guess and a the token in the probe's
    directions, where errors have variance 1 and tokens variance s,
    log p(q | a) = sum of q a - (1 - 1 / s) a^2 / 2, up to a constant. Directions without
    information (s = 1) drop out, and so do those beyond several times the bits that name a token.

    Errors are not Gaussian. The sum is scaled by the temperature that makes real tokens likeliest
    beside the language model's prior, measured on the model's own text, and a share of the
    probability is given evenly to all tokens.
    """

    def begin(self, search: OpenPositions) -> Proposals:
        return _ByProbe(search, self.name)


class _ByProbe(Proposals):
    def __init__(self, search: OpenPositions, name: str) -> None:
        super().__init__(search, name)
        self._ranking = search.measurements.derived(ProbeRanking)
        self._best: Tensor | None = None

    def scores(self, rows: Tensor) -> Tensor:
        """Log-likelihood given the linear guess, corrected by the candidates that failed."""
        likelihood = self._ranking.likelihood(self.search.guess(rows), self.search.positions(rows))
        scaled = self._ranking.temperature * likelihood
        return mix_with_uniform(scaled.log_softmax(-1), UNIFORM_SHARE)

    def ahead(self, rows: Tensor, width: int, count: int) -> Candidates:
        """The best tokens for the linear guess at each position; it depends on no other token."""
        if self._best is None:
            self._best = self._best_everywhere()
        last = self.search.target.shape[1] - 1
        positions = self.search.positions(rows)[:, None] + torch.arange(width, device=rows.device)
        ids = self._best[rows[:, None], positions.clamp(max=last), :count]
        return Candidates(ids, (self.name,) * ids.shape[2])

    def _best_everywhere(self) -> Tensor:
        """The best tokens ``[B, T, 8]`` of every position, computed once for a batch."""
        (B, T), embedding = self.search.target.shape[:2], self.search.transformer.embedding
        targets = self.search.target.flatten(0, 1)
        count = min(_AHEAD, embedding.vocabulary_size)
        # Allocated beforehand: pieces kept from each chunk would fragment the memory of the scores.
        best = torch.empty(B * T, count, dtype=torch.long, device=targets.device)
        # Position 0 of all prompts first, as it is measured apart.
        order = torch.arange(B * T, device=targets.device).view(B, T).T.flatten()
        for some in torch.split(order, embedding.at_a_time):
            positions = some % T
            guess = self.search.probe(targets[some], positions)
            best[some] = best_tokens(self._ranking.likelihood(guess, positions), count).indices
        return best.view(B, T, count)


class ProbeRanking:
    """How likely each token is for a guess of the linear probe; computed once for a model.

    Args:
        measurements: of the model.
    """

    def __init__(self, measurements: Measurements) -> None:
        self._measurements = measurements
        self._projected: dict[int, _ProjectedVocabulary] = {}
        self._temperature: float | None = None

    @classmethod
    def of(cls, measurements: Measurements) -> ProbeRanking:
        """The ranking of a model."""
        return cls(measurements)

    def likelihood(self, guess: Tensor, positions: Tensor) -> Tensor:
        """Log-likelihood ``[N, V]`` of guesses ``[N, D]`` at ``positions`` [N], up to constants."""
        first = positions == 0
        if not first.any():
            return self._at(1).scores(guess)
        if first.all():
            return self._at(0).scores(guess)
        scores = self._at(1).scores(guess)
        scores[first] = self._at(0).scores(guess[first])
        return scores

    def misfit(self, guess: Tensor) -> Tensor:
        """How far guesses ``[N, D]`` at later positions are from that of the nearest token.

        ``[N]`` squares of differences, in variances of what is guessed for one token, averaged over
        the directions: about 1 for a token.
        """
        projected, probe = self._at(1), self._measurements.probe
        coordinates = (guess - projected.mean) @ projected.directions
        kept = probe.kept_share[1, : coordinates.shape[1]].clamp_min(1e-6)
        best = projected.scores(guess).amax(-1)
        return ((coordinates.square() / kept).sum(-1) - 2 * best) / len(kept)

    @property
    def temperature(self) -> float:
        """The factor that makes tokens of the model's own text likeliest beside its prior."""
        if self._temperature is None:
            probe, text = self._measurements.probe, self._measurements.text
            found = self._measurements.kept(
                _Temperature, self._best_temperature, probe.matrix, text
            )
            self._temperature = found.value
        return self._temperature

    def _at(self, kind: int) -> _ProjectedVocabulary:
        """The vocabulary projected for position 0 or for later ones."""
        if kind not in self._projected:
            embedding = self._measurements.transformer.embedding
            self._projected[kind] = _ProjectedVocabulary.of(
                self._measurements.probe, kind, embedding
            )
        return self._projected[kind]

    def _best_temperature(self) -> _Temperature:
        measurements = self._measurements
        text, language_model = measurements.text, measurements.language_model
        if text is None or language_model is None:
            return _Temperature(1.0)
        text = text[: max(1, _HELD_OUT // text.shape[1])].to(measurements.transformer.device)
        chances, left = [0.0] * len(_TEMPERATURES), list(range(len(_TEMPERATURES)))
        for one in text[:, None]:  # one at a time: each position has scores of all tokens
            features = measurements.transformer.features_of(one)[0, 1:]
            later = torch.ones(len(features), dtype=torch.long, device=features.device)
            likelihood = self.likelihood(measurements.probe(features, later), later)
            prior = language_model.log_probabilities(one)[0, :-1]
            right = one[0, 1:, None]
            for number in left:
                chance = (_TEMPERATURES[number] * likelihood).log_softmax(-1)
                mixed = prior + mix_with_uniform(chance, UNIFORM_SHARE)
                right_is = mixed.gather(1, right)[:, 0] - mixed.logsumexp(-1)
                chances[number] += float(right_is.sum())
            best = max(left, key=chances.__getitem__)
            # The chance has one peak: the other texts decide between the neighbours.
            left = [number for number in left if abs(number - best) <= 1]
        return _Temperature(_TEMPERATURES[best])


@dataclass(frozen=True)
class _Temperature:
    """The factor of log-likelihoods that makes tokens of the model's own text likeliest."""

    value: float


@dataclass(frozen=True)
class _ProjectedVocabulary:
    """A vocabulary along the most informative directions at one kind of position.

    Attributes:
        embedding: the model's.
        mean: ``[D]`` the mean embedding.
        directions: ``[D, R]`` the R directions that are used.
        half_squares: ``[V]`` half the squared norm of the mean guess for each token.
        tokens: ``[V, R + 1]`` each token's coordinates and minus its half square, so that one
            product gives the scores; None where that would not be much smaller than the embedding,
            which then serves itself.
    """

    embedding: TokenEmbedding
    mean: Tensor
    directions: Tensor
    half_squares: Tensor
    tokens: Tensor | None

    @classmethod
    def of(cls, probe: LinearProbe, kind: int, embedding: TokenEmbedding) -> _ProjectedVocabulary:
        """Project the vocabulary for position 0 (``kind`` 0) or for later ones (1)."""
        bits = (probe.signal[kind].clamp_min(1.0).log2() / 2).cumsum(0)
        enough = int((bits < _ENOUGH[kind] * math.log2(embedding.vocabulary_size)).sum()) + 1
        mean, directions = probe.bias[kind], probe.directions[kind, :, :enough].contiguous()
        kept = probe.kept_share[kind, :enough]
        ids = torch.arange(embedding.vocabulary_size, device=mean.device)
        few = 2 * directions.shape[1] <= embedding.width
        tokens = torch.empty(len(ids), directions.shape[1] + 1, device=mean.device) if few else None
        half_squares = torch.empty(len(ids), device=mean.device)
        for chunk in torch.split(ids, _AT_A_TIME):
            coordinates = (embedding(chunk) - mean) @ directions
            half_squares[chunk] = (coordinates.square() @ kept) / 2
            if tokens is not None:
                tokens[chunk, :-1], tokens[chunk, -1] = coordinates, -half_squares[chunk]
        return cls(embedding, mean, directions, half_squares, tokens)

    def scores(self, guess: Tensor) -> Tensor:
        """Scores ``[N, V]`` of guesses ``[N, D]``, up to a constant for each."""
        coordinates = (guess - self.mean) @ self.directions
        if self.tokens is None:
            return self.embedding.dot(coordinates @ self.directions.T).sub_(self.half_squares)
        ones = torch.ones_like(coordinates[:, :1])
        return torch.cat([coordinates, ones], dim=1) @ self.tokens.T
