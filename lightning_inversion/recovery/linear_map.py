"""The linear map from features to embeddings as a candidate order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_inversion.recovery.proposals import Candidates, Proposer, with_surprise
from lightning_inversion.recovery.search import PrefixSearch
from lightning_inversion.transformer.embedding import TokenEmbedding, best_tokens
from lightning_inversion.transformer.linear_probe import LinearProbe

_TEMPERS = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.01, 0.003)
_SURPRISE = 0.05
"""Share of the probability spread evenly, as the language model's own is."""
_ENOUGH = (13.0, 6.5)
"""How many times the bits that name a token the directions must tell that are used: at position 0,
where errors are farthest from Gaussian, and later."""
_AT_A_TIME = 1024
"""Tokens that are measured at a time."""
_AHEAD = 8
"""Tokens of a place that are kept ready."""
_HELD_BACK = 192
"""Positions of the model's own text on which the temper is chosen."""


@dataclass(frozen=True)
class _Measured:
    """A vocabulary along the directions that tell most at one kind of position.

    Attributes:
        embedding: the model's.
        mean: ``[D]``.
        directions: ``[D, R]``.
        half_squares: ``[V]`` of what the guess has of each token.
        tokens: ``[V, R + 1]`` each token's place, and less its half square, so that one product
            gives the scores; None where that would not be much smaller than the embedding, which
            then serves itself.
    """

    embedding: TokenEmbedding
    mean: Tensor
    directions: Tensor
    half_squares: Tensor
    tokens: Tensor | None

    @classmethod
    def of(cls, probe: LinearProbe, kind: int, embedding: TokenEmbedding) -> _Measured:
        """For position 0 (``kind`` 0) or later ones (1)."""
        bits = (probe.signal[kind].clamp_min(1.0).log2() / 2).cumsum(0)
        enough = int((bits < _ENOUGH[kind] * math.log2(embedding.vocabulary_size)).sum()) + 1
        mean, directions = probe.bias[kind], probe.directions[kind, :, :enough].contiguous()
        heard = probe.kept_share[kind, :enough]
        ids = torch.arange(embedding.vocabulary_size, device=mean.device)
        few = 2 * directions.shape[1] <= embedding.width
        tokens = torch.empty(len(ids), directions.shape[1] + 1, device=mean.device) if few else None
        half_squares = torch.empty(len(ids), device=mean.device)
        for chunk in torch.split(ids, _AT_A_TIME):
            places = (embedding(chunk) - mean) @ directions
            half_squares[chunk] = (places.square() @ heard) / 2
            if tokens is not None:
                tokens[chunk, :-1], tokens[chunk, -1] = places, -half_squares[chunk]
        return cls(embedding, mean, directions, half_squares, tokens)

    def scores(self, guess: Tensor) -> Tensor:
        """``[N, V]`` of guesses ``[N, D]``, up to a constant for each."""
        told = (guess - self.mean) @ self.directions
        if self.tokens is None:
            return self.embedding.dot(told @ self.directions.T).sub_(self.half_squares)
        return torch.cat([told, torch.ones_like(told[:, :1])], dim=1) @ self.tokens.T


class ProbeProposer(Proposer):
    """Tokens that the probe's guess speaks for, given how it errs.

    The guess is a regression's, hence drawn towards the mean token by all that it cannot tell. So a
    token is compared not with the guess but with what the guess would be for it on average: with q
    the guess and a the token in the probe's directions, where errors have variance 1 and tokens
    variance s, log p(q | a) = sum of q a - (1 - 1 / s) a^2 / 2, up to a constant. Directions that
    tell nothing (s = 1) drop out by themselves, and after those that tell several times what names
    a token the others are left out.

    Errors are not Gaussian: the sum is tempered by what makes real tokens likeliest beside the
    language model's prior, measured on the model's own text, and a share of the probability is
    spread over all tokens, because now and then the guess is far off and others must be heard.
    """

    def __init__(self) -> None:
        self._readout: LinearProbe | None = None

    def begin(self, search: PrefixSearch) -> None:
        """Measure the vocabulary along the probe's directions, once for each probe."""
        self._ahead: Tensor | None = None
        if self._readout is not search.probe:
            self._readout = search.probe
            self._embedding = search.transformer.embedding
            self._measured: dict[int, _Measured] = {}
            self._temper: float | None = None

    def scores(self, search: PrefixSearch, rows: Tensor) -> Tensor:
        """Of the linear guess, corrected by what was tried."""
        if self._temper is None:  # which the best tokens do not depend on
            self._temper = self._best_temper(search)
        likelihood = self._likelihood(search.guess(rows), search.positions(rows))
        return with_surprise((self._temper * likelihood).log_softmax(-1), _SURPRISE)

    def ahead(self, search: PrefixSearch, rows: Tensor, width: int, count: int) -> Candidates:
        """Of the linear guess at each place, which no other place has a part in."""
        if self._ahead is None:
            self._ahead = self._best_everywhere(search)
        last = search.target.shape[1] - 1
        places = search.positions(rows)[:, None] + torch.arange(width, device=rows.device)
        ids = self._ahead[rows[:, None], places.clamp(max=last), :count]
        return Candidates(ids, (self.name,) * ids.shape[2])

    def _best_everywhere(self, search: PrefixSearch) -> Tensor:
        """``[B, T, 8]`` the best tokens of every place, computed once for a batch."""
        (B, T), embedding = search.target.shape[:2], search.transformer.embedding
        targets = search.target.flatten(0, 1)
        count = min(_AHEAD, embedding.vocabulary_size)
        # Made beforehand: pieces kept from each chunk would lie between the scores of earlier ones,
        # and their memory could not be used again.
        best = torch.empty(B * T, count, dtype=torch.long, device=targets.device)
        # The first places of all texts stand together, as they are measured apart.
        order = torch.arange(B * T, device=targets.device).view(B, T).T.flatten()
        for places in torch.split(order, embedding.at_a_time):
            where = places % T
            guess = search.probe(targets[places], where)
            best[places] = best_tokens(self._likelihood(guess, where), count).indices
        return best.view(B, T, count)

    def _likelihood(self, guess: Tensor, positions: Tensor) -> Tensor:
        """``[N, V]`` of guesses ``[N, D]`` at ``positions`` [N]."""
        first = positions == 0
        if not first.any():
            return self._tokens_at(1).scores(guess)
        if first.all():
            return self._tokens_at(0).scores(guess)
        scores = self._tokens_at(1).scores(guess)
        scores[first] = self._tokens_at(0).scores(guess[first])
        return scores

    def _tokens_at(self, kind: int) -> _Measured:
        """The vocabulary measured for position 0 or for later ones, when first asked for."""
        assert self._readout is not None
        if kind not in self._measured:
            self._measured[kind] = _Measured.of(self._readout, kind, self._embedding)
        return self._measured[kind]

    def _best_temper(self, search: PrefixSearch) -> float:
        text, language_model = search.measurements.text, search.measurements.language_model
        if text is None or language_model is None:
            return 1.0
        text = text[: max(1, _HELD_BACK // text.shape[1])]
        text = text.to(search.target.device)
        chances = [0.0] * len(_TEMPERS)
        for one in text[:, None]:  # a text at a time: each place has scores of the whole vocabulary
            features = search.transformer.features_of(one)[0, 1:]
            later = torch.ones(len(features), dtype=torch.long, device=features.device)
            likelihood = self._likelihood(search.probe(features, later), later)
            prior = language_model.log_probabilities(one)[0, :-1]
            right = one[0, 1:, None]
            for number, temper in enumerate(_TEMPERS):
                chance = (temper * likelihood).log_softmax(-1)
                mixed = prior + with_surprise(chance, _SURPRISE)
                right_is = mixed.gather(1, right)[:, 0] - mixed.logsumexp(-1)
                chances[number] += float(right_is.sum())
        return _TEMPERS[chances.index(max(chances))]
