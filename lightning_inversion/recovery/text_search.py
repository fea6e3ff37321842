"""``TextSearch``: texts of T tokens whose last state comes near to a given one.

One state is too little for a gradient: T embeddings of D numbers have many solutions that are no
tokens. So texts are run, and what they show leads on:

1. The linear probe reads the last token; its best ones are run after random tokens, and those that
   come nearest, and its best, are taken in turn.
2. Random texts that end with it are run, and regressed from their last states on the tokens at each
   position: where attention mixes tokens linearly, that separates them, although every other token
   is noise to it. The regression is repeated on texts that come nearer.
3. In the nearest texts, one token or two are replaced by those that the regression and the language
   model find likeliest at their position or at another, and positions are exchanged.
4. In the nearest text one position after the other is regressed alone, on random tokens in its
   place: where the others are right, nothing else is noise to it.
5. The embeddings of all positions descend together towards the state (several starts in parallel),
   each ending at its nearest tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import chain, combinations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lightning_inversion.proposers.probe_proposer import ProbeRanking
from lightning_inversion.proposers.proposals import UNIFORM_SHARE, mix_with_uniform
from lightning_inversion.transformer.embedding import best_tokens
from lightning_inversion.transformer.linear_probe import (
    TOKENS_AT_A_TIME,
    as_frequent_as_in_text,
)
from lightning_inversion.verification.measurements import Measurements

_RANDOM = 4096
"""Random texts of the first regression at most; a quarter of the budget if that is less."""
_POOL = 4
"""Nearest texts that are changed."""
_LIKELY, _OF_OTHERS, _IN_PAIRS = 64, 24, 6
"""Tokens tried at a position: its likeliest, those of every position, and for two at once."""
_SWEEPS, _ROUNDS = 2, 4
_OF_ONE = 512
"""Random tokens that are run in place of one."""
_LAST_READ, _BEHIND, _LAST_TOKENS = 32, 16, 3
"""Last tokens that are run, after how many random texts each; and those that are searched, each
with half of the budget that is left."""
_STARTS, _STEPS, _RATE = 8, 12, 0.3
"""Of the joint descent; the rate in std of the embedding."""
_RIDGE, _SHRINKAGE = 3e-2, 0.3
"""Of a regression on texts hardly more than features; the shrinkage of its covariances towards even
ones."""
_REACHED = 0.05
"""The share of the threshold at which a text is taken to be found."""


class TextSearch:
    """Texts of T tokens that have been run, and how near the last state of each comes.

    Args:
        measurements: of a causal model.
        row: ``[F]`` the last state.
        tokens: T.
        known: ``[N]`` tokens before them.
        budget: texts run at most.

    Attributes:
        texts: ``[M, T]`` texts that were run.
        residuals: ``[M]`` of their last states, see ``Calibration``.
        random, random_texts: the same of the random texts alone, which nothing has chosen.
        forwards: forwards of the truncated model.
        seconds: wall time.
    """

    def __init__(
        self, measurements: Measurements, row: Tensor, tokens: int, known: Tensor, budget: int
    ) -> None:
        self.measurements, self.row, self.known, self.budget = measurements, row, known, budget
        self.embedding = measurements.transformer.embedding
        device = row.device
        self.texts = torch.empty(0, tokens, dtype=torch.long, device=device)
        self.random_texts = self.texts
        self.residuals = self.random = row.new_empty(0)
        self.forwards, self.seconds = 0, 0.0
        self._differences = row.new_empty(0, len(row))
        self._seen: set[tuple[int, ...]] = set()
        self._generator = torch.Generator().manual_seed(0)
        self._at = torch.ones((), dtype=torch.long, device=device)
        # Norms take the size of an embedding away before attention mixes tokens.
        matrix = self.embedding(torch.arange(self.embedding.vocabulary_size, device=device))
        self._directions = matrix / matrix.square().mean(1, keepdim=True).sqrt().clamp_min(1e-9)

    @property
    def best(self) -> Tensor:
        """``[T]`` the nearest text."""
        return self.texts[self.residuals.argmin()]

    @property
    def best_residual(self) -> Tensor:
        """Its residual, a number."""
        return self.residuals.min()

    @property
    def _found(self) -> bool:
        limit = self.measurements.calibration.limit(self._at)
        return len(self.texts) > 0 and bool(self.best_residual <= _REACHED * limit)

    def _ended(self, until: int) -> bool:
        """Whether a text is found, or so many were run."""
        return self._found or len(self.texts) >= until

    @property
    def _left(self) -> int:
        return self.budget - len(self.texts)

    def find(self) -> None:
        """Run texts until one is found or the budget is spent."""
        began = time.monotonic()
        ranking, probe = self.measurements.derived(ProbeRanking), self.measurements.probe
        likelihood = ranking.likelihood(probe(self.row[None], self._at[None]), self._at[None])
        texts = self._drawn(min(_BEHIND, max(1, self.budget // (8 * _LAST_READ))))
        lasts = best_tokens(likelihood, min(_LAST_READ, likelihood.shape[1])).indices[0]
        sizes = [self.residuals_of(in_place_of_last(texts, last)).mean() for last in lasts]
        nearest = lasts[torch.stack(sizes).argsort()].tolist()
        both = dict.fromkeys(chain(*zip(lasts.tolist(), nearest, strict=True)))
        self.budget -= len(texts) * len(lasts)
        for number, last in enumerate(chosen := list(both)[:_LAST_TOKENS]):
            share = self._left if number == len(chosen) - 1 else self._left // 2
            self._ending_with(last, len(self.texts) + share)
            if self._found:
                break
        self.seconds = time.monotonic() - began

    def _ending_with(self, last: int, until: int) -> None:
        """Search the texts that end with a token, until so many texts were run."""
        count = max(1, min(_RANDOM, (until - len(self.texts)) // 2))
        texts = in_place_of_last(self._drawn(count), self.texts.new_tensor(last))
        before = len(self.texts)
        self.run(texts)
        self.random, self.random_texts = self.residuals[before:], self.texts[before:]
        for number in range(_ROUNDS):
            if self._ended(until):
                return
            ending = self.texts[:, -1] == last
            likelihood = self._read(ending, range(self.texts.shape[1] - 1), around=number > 0)
            for _ in range(_SWEEPS):
                self.run(self._changed(likelihood)[: until - len(self.texts)])
                if self._ended(until):
                    return
            self._exchange(until)
            if self._ended(until):
                return
            self.run(self._descended()[: until - len(self.texts)])
            self.run(self._sampled(likelihood, count // 2, last)[: until - len(self.texts)])

    def _exchange(self, until: int) -> None:
        """Replace one token of the nearest text after the other, while it comes nearer.

        The likeliest tokens are run by a regression on texts that differ nowhere else.
        """
        position, unchanged, T = 0, 0, self.texts.shape[1]
        while unchanged < T - 1 and not self._ended(until):
            text = self.best
            drawn = in_place(text, position, self._drawn(_OF_ONE)[:, position])
            self.run(drawn[: until - len(self.texts)])
            others = torch.arange(T, device=text.device) != position
            counted = (self.texts[:, others] == text[others]).all(1)
            likelihood = self._read(counted, [position], around=False)
            ids = best_tokens(likelihood, min(_LIKELY, likelihood.shape[1])).indices[0]
            self.run(in_place(text, position, ids)[: until - len(self.texts)])
            unchanged = unchanged + 1 if bool((self.best == text).all()) else 0
            position = (position + 1) % (T - 1)

    # -- running texts -----------------------------------------------------------------------

    @torch.no_grad()
    def run(self, texts: Tensor) -> None:
        """Run those of texts ``[N, T]`` that were not run yet."""
        fresh = []
        for text in texts.tolist():
            key = tuple(text)
            fresh.append(key not in self._seen)
            self._seen.add(key)
        texts = texts[torch.tensor(fresh, dtype=torch.bool, device=texts.device)]
        if not len(texts):
            return
        features = self._features(texts)
        standard = (features - self.row) / self.measurements.probe.std[1]
        finite = standard.isfinite().all(1)
        self.texts = torch.cat([self.texts, texts[finite]])
        self._differences = torch.cat([self._differences, standard[finite]])
        at = self._at.expand(int(finite.sum()))
        residuals = self.measurements.calibration.residual(features[finite], self.row, at)
        self.residuals = torch.cat([self.residuals, residuals])

    @torch.no_grad()
    def residuals_of(self, texts: Tensor) -> Tensor:
        """Residuals ``[N]`` of texts ``[N, T]`` that are not kept."""
        features, at = self._features(texts), self._at.expand(len(texts))
        residuals = self.measurements.calibration.residual(features, self.row, at)
        return residuals.nan_to_num(nan=torch.inf)

    def _features(self, texts: Tensor) -> Tensor:
        """``[N, F]`` of the last position of texts ``[N, T]`` after the known tokens."""
        ids = torch.cat([self.known.expand(len(texts), -1), texts], dim=1)
        parts = torch.split(ids, max(1, 2 * TOKENS_AT_A_TIME // ids.shape[1]))
        self.forwards += len(parts)
        transformer = self.measurements.transformer
        return torch.cat([transformer.features_of(part)[:, -1] for part in parts])

    # -- what they show ----------------------------------------------------------------------

    @torch.no_grad()
    def _read(self, counted: Tensor, positions: Sequence[int], around: bool) -> Tensor:
        """Log-likelihood ``[P, V]`` of each token at P positions.

        Args:
            counted: ``[M]`` bool; which texts are regressed on.
            positions: at which tokens are read.
            around: those near to the target count most.
        """
        ids, x = self.texts[counted][:, list(positions)], self._differences[counted]
        weights = torch.ones(len(x), device=x.device)
        if around:
            squares = self.residuals[counted].square()
            weights = torch.exp(-squares / squares.median().clamp_min(1e-12))
        weights = weights / weights.sum()
        middle = weights @ x
        x = x - middle
        gram = (x.T @ (x * weights[:, None])).double()
        gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
        root = torch.linalg.cholesky(gram)
        white = torch.linalg.solve_triangular(root, x.T.double(), upper=False).float()
        target = torch.linalg.solve_triangular(root, -middle[:, None].double(), upper=False)
        # What a text adds to its own prediction is taken off its error.
        own = (white.square().sum(0) * weights).clamp(max=0.9)[:, None]
        found = []
        for column in ids.unbind(1):
            y = self._directions[column]
            mean = weights @ y
            y = y - mean
            slope = white @ (y * weights[:, None])
            errors = (y - white.T @ slope) / (1 - own)
            guess = target[:, 0].float() @ slope
            found.append(self._likelihood(guess, mean, y, errors, weights[:, None]))
        return torch.stack(found)

    def _likelihood(
        self, guess: Tensor, mean: Tensor, tokens: Tensor, errors: Tensor, weights: Tensor
    ) -> Tensor:
        """``[V]`` for a guess ``[D]``, from tokens and errors ``[N, D]`` of those regressed on."""
        variances, axes = torch.linalg.eigh(_covariance(errors, weights))
        whitening = axes / variances.clamp_min(1e-30).sqrt()
        spread = _covariance(tokens, weights)
        signal, turned = torch.linalg.eigh(whitening.T @ spread @ whitening)
        read = signal > 1
        directions = (whitening @ turned[:, read]).float()
        kept = (1 - 1 / signal[read]).float()
        coordinates = (self._directions - mean) @ directions
        scores: Tensor = coordinates @ (guess @ directions) - coordinates.square() @ kept / 2
        return scores

    def _prior(self, texts: Tensor) -> Tensor:
        """``[P, T - 1, V]`` the language model's log-probabilities in texts ``[P, T]``."""
        language_model, P = self.measurements.language_model, len(texts)
        T, V = texts.shape[1], self.embedding.vocabulary_size
        prior = torch.zeros(P, T - 1, V, device=texts.device)
        if language_model is None:
            return prior
        ids = torch.cat([self.known.expand(P, -1), texts], dim=1)[:, :-1]
        if ids.shape[1] > 1 or len(self.known):
            found = mix_with_uniform(language_model.log_probabilities(ids), UNIFORM_SHARE)
            begun = max(1, len(self.known))  # nothing stands before a first token
            prior[:, begun - len(self.known) :] = found[:, begun - 1 : -1]
        return prior

    # -- new texts ---------------------------------------------------------------------------

    def _drawn(self, count: int) -> Tensor:
        """``[N, T]`` random tokens: a quarter evenly, the others as frequent as in text."""
        size, V = (count, self.texts.shape[1]), self.embedding.vocabulary_size
        even = torch.randint(V, size, generator=self._generator)
        frequent = as_frequent_as_in_text(V, size, self._generator)
        pick = torch.rand(size, generator=self._generator) < 0.25
        return torch.where(pick, even, frequent).to(self.texts.device)

    def _pool(self) -> Tensor:
        return self.texts[self.residuals.argsort()[:_POOL]]

    @torch.no_grad()
    def _changed(self, likelihood: Tensor) -> Tensor:
        """The nearest texts with one other token or two, or two positions exchanged."""
        pool, T = self._pool(), self.texts.shape[1]
        V = likelihood.shape[1]
        chances = (likelihood + self._prior(pool)).flatten(0, 1)
        likely = best_tokens(chances, min(_LIKELY, V)).indices.view(len(pool), T - 1, -1)
        alone = best_tokens(likelihood, min(_OF_OTHERS, V)).indices
        made = []
        for number, text in enumerate(pool):
            for at in range(T - 1):
                ids = torch.cat([likely[number, at], alone.flatten()])
                made.append(in_place(text, at, ids))
            for one, other in combinations(range(T - 1), 2):
                swapped = text.clone()
                swapped[[one, other]] = text[[other, one]]
                ids = torch.cat([alone[one, :_IN_PAIRS], alone[other, :_IN_PAIRS]])
                pairs = torch.cartesian_prod(ids, ids)
                both = text.expand(len(pairs), -1).clone()
                both[:, [one, other]] = pairs
                made += [swapped[None], both]
        return torch.cat(made)

    def _sampled(self, likelihood: Tensor, count: int, last: int) -> Tensor:
        """Texts drawn by the likelihoods, half of which keep tokens of the nearest texts."""
        pool = self._pool()
        chances = (likelihood + self._prior(pool[:1])[0]).softmax(-1).cpu()
        drawn = self._drawn(count)
        for position, chance in enumerate(chances):
            likely = torch.multinomial(chance, count, replacement=True, generator=self._generator)
            pick = torch.rand(count, generator=self._generator) < 0.7
            column = torch.where(pick, likely, drawn[:, position].cpu())
            drawn[:, position] = column.to(drawn.device)
        numbers = torch.randint(len(pool), (count,), generator=self._generator)
        keep = torch.rand(drawn.shape, generator=self._generator) < 0.5
        keep[: count // 2] = False
        texts = torch.where(keep.to(drawn.device), pool[numbers.to(pool.device)], drawn)
        texts[:, -1] = last
        return texts

    def _descended(self) -> Tensor:
        """Texts whose embeddings have descended together, from the nearest ones."""
        transformer, std = self.measurements.transformer, self.measurements.probe.std[1]
        starts = self.texts[self.residuals.argsort()[:_STARTS]]
        ahead = self.embedding(self.known).expand(len(starts), -1, -1)
        target = ((self.row - self.measurements.probe.mean[1]) / std)[None]
        with torch.enable_grad():
            vectors = self.embedding(starts).clone().requires_grad_()
            optimizer = torch.optim.Adam([vectors], lr=_RATE * float(self.embedding.std))
            for _ in range(_STEPS):
                features = transformer(torch.cat([ahead, vectors], dim=1))[:, -1]
                standard = (features - self.measurements.probe.mean[1]) / std
                distance = (1 - cosine_similarity(standard, target)).sum()
                (vectors.grad,) = torch.autograd.grad(distance, vectors)
                optimizer.step()
        self.forwards += _STEPS
        nearness = self.embedding.nearness(vectors.detach().flatten(0, 1))
        nearest = best_tokens(nearness, 1).indices
        found = nearest.view(starts.shape)
        changed = (found != starts).nonzero()
        single = starts[changed[:, 0]].clone()
        single[torch.arange(len(changed)), changed[:, 1]] = found[changed[:, 0], changed[:, 1]]
        return torch.cat([found, single])


def _covariance(centred: Tensor, weights: Tensor) -> Tensor:
    """``[D, D]`` of vectors ``[N, D]`` with weights ``[N, 1]``, as few of them show it."""
    found = (centred.T @ (centred * weights)).double()
    mean = found.diagonal().mean()
    found.mul_(1 - _SHRINKAGE).diagonal().add_(_SHRINKAGE * mean)
    return found


def in_place_of_last(texts: Tensor, last: Tensor) -> Tensor:
    """Texts ``[N, T]`` that end with a token instead."""
    return torch.cat([texts[:, :-1], last.expand(len(texts), 1)], dim=1)


def in_place(text: Tensor, position: int, ids: Tensor) -> Tensor:
    """Texts ``[N, T]``: a text ``[T]`` with each of ids ``[N]`` at a position."""
    texts = text.expand(len(ids), -1).clone()
    texts[:, position] = ids
    return texts
