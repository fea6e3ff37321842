"""A text of a few tokens from the state of its last position alone.

Every token has left something in that state, and the state of a right text is reproduced exactly,
so that a text can be verified that was found in any way. ``TextSearch`` looks for one; this module
decides what its last state shows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_inversion.errors import InputError
from lightning_inversion.recovery.policy import (
    ALTERNATIVES,
    RecoveredPrompt,
    RecoveryPolicy,
    Targets,
)
from lightning_inversion.recovery.text_search import TextSearch, in_place
from lightning_inversion.recovery.token_recovery import TokenRecovery
from lightning_inversion.transformer.embedding import best_tokens
from lightning_inversion.verification.calibration import CLEARANCE, RISK
from lightning_inversion.verification.certificate import State, TokenCertificate
from lightning_inversion.verification.measurements import Measurements
from lightning_inversion.verification.rarity import rarity_power
from lightning_inversion.verification.rivals import NearTokens

_NEAR, _RANDOM = 16, 64
"""Tokens that are run in place of each token of a text that may be right."""
_ALONE = 1024
"""Tokens that are run for a text of one token at most."""
_NEAREST = 4
"""Of the random ones the nearest, which show how fast texts get rare there."""


class LastPosition(RecoveryPolicy):
    """Finds a text of a few tokens whose last state is the given one; the other rows are not read.

    A text is verified where its last state is reproduced within rounding, and each text that was
    run in its place is at least 1.5 times as far and beyond rounding: for each token the nearest
    embeddings and random tokens in its place, neighbours exchanged, and all that the search ran.
    Texts that differ otherwise are not compared; how many of them may be as near by chance is
    estimated from how fast texts get rare.

    Args:
        tokens: how many the text has; null takes the number of rows, or tries 1, 2, 3 and so on
            where there is one row.
        most: the most tokens that are tried.
        budget: texts that are run for one length, after which it is left unresolved.
    """

    needs_language_model = True
    needs_first_position = False
    rows = "last"

    def __init__(self, tokens: int | None = None, most: int = 4, budget: int = 16384) -> None:
        if min(1 if tokens is None else tokens, most, budget) < 1:
            raise InputError(
                "--model.recovery: tokens, most and budget must be at least 1, and are "
                f"{tokens}, {most} and {budget}."
            )
        self.tokens, self.most, self.budget = tokens, most, budget

    def recover(
        self, measurements: Measurements, targets: Targets
    ) -> Iterator[list[RecoveredPrompt]]:
        """Recover B prompts, one after the other, from the last row of each."""
        if not measurements.transformer.causal:
            raise InputError("LastPosition needs a causal model; leave --model.recovery out.")
        prompts = [RecoveredPrompt(known=targets.known) for _ in targets.lengths]
        for prompt, rows, length in zip(prompts, targets.features, targets.lengths, strict=True):
            began, unknown = time.monotonic(), length - len(targets.known)
            for tokens in self._lengths(unknown) if unknown else ():  # none of nan
                found = self._text(measurements, rows[length - 1], tokens, targets.known_ids)
                prompt.forwards += found.forwards
                if not prompt.tokens or _residual(found) < _residual(prompt):
                    prompt.tokens = found.tokens
                if found.verified:
                    break
            prompt.seconds = time.monotonic() - began
            yield prompts
        yield prompts

    def _lengths(self, rows: int) -> range:
        told = self.tokens or (rows if rows > 1 else None)
        return range(1, self.most + 1) if told is None else range(told, told + 1)

    def _text(
        self, measurements: Measurements, row: Tensor, tokens: int, known: Tensor
    ) -> RecoveredPrompt:
        """The best text of so many tokens."""
        if tokens == 1:  # the tokens before it are known, and the search of one token serves
            rows = row.new_full((1, len(known) + 1, len(row)), torch.nan)
            rows[0, -1] = row
            alone = TokenRecovery(budget=min(self.budget, _ALONE))
            *_, (prompt,) = alone.recover(
                measurements, Targets(rows, [len(known) + 1], tuple(known.tolist()))
            )
            return prompt
        began = time.monotonic()
        search = TextSearch(measurements, row, tokens, known, self.budget)
        search.find()
        certificates = _Judge(measurements, search).certificates(self.name)
        prompt = RecoveredPrompt(certificates, forwards=search.forwards)
        prompt.seconds = time.monotonic() - began
        return prompt


def _residual(prompt: RecoveredPrompt) -> float:
    return prompt.tokens[-1].residual


class _Judge:
    """What the best text of a search is shown to be."""

    def __init__(self, measurements: Measurements, search: TextSearch) -> None:
        self.search, self.calibration = search, measurements.calibration
        self.near = measurements.derived(NearTokens)
        self.embedding = measurements.transformer.embedding
        self.at = torch.ones((), dtype=torch.long, device=search.row.device)

    def certificates(self, proposer: str) -> list[TokenCertificate]:
        """One for each token: the nearest text that has another token there is its rival."""
        search, calibration = self.search, self.calibration
        if bool(calibration.passes(search.best_residual, self.at)):
            search.run(self._near(search.best))
        best, residual = search.best, float(search.best_residual)
        passes = bool(calibration.passes(search.best_residual, self.at))
        differs = search.texts != best
        rivals, apart = [], []
        for position in range(len(best)):
            others = search.residuals.masked_fill(~differs[:, position], torch.inf)
            number = int(others.argmin())
            rivals.append((int(search.texts[number, position]), float(others[number])))
            apart.append(self._apart(residual, rivals[-1][1]))
        shown = passes and all(apart) and self._unseen() <= RISK
        seconds = search.seconds / len(best)
        return [
            TokenCertificate(
                id=int(token),
                state=_state(passes, apart[position], shown),
                residual=residual,
                threshold=float(calibration.limit(self.at)),
                rival=rivals[position][0],
                rival_residual=rivals[position][1],
                compared=int(differs[:, position].sum()) + 1,
                proposer=proposer,
                seconds=seconds,
                alternatives=() if shown else self._alternatives(position),
            )
            for position, token in enumerate(best)
        ]

    def _apart(self, residual: float, rival: float) -> bool:
        bar = float(self.calibration.rounding[1])
        return rival > bar and rival >= CLEARANCE * residual and residual <= bar

    def _near(self, text: Tensor) -> Tensor:
        """Texts ``[N, T]`` that have one near token, or two neighbours exchanged."""
        vectors = self.embedding(text)
        nearness = self.embedding.nearness(vectors)
        near = best_tokens(nearness, min(_NEAR, self.embedding.vocabulary_size)).indices
        made = []
        for position, token in enumerate(text.tolist()):
            always, _ = self.near.of_token(token)
            made.append(in_place(text, position, torch.cat([near[position], always])))
            if position:
                swapped = text.clone()
                swapped[[position - 1, position]] = text[[position, position - 1]]
                made.append(swapped[None])
        return torch.cat(made)

    def _random(self, text: Tensor) -> Tensor:
        """Residuals ``[T, 64]`` of the text with random tokens in place of each one."""
        generator = torch.Generator().manual_seed(9)
        size = (len(text), _RANDOM)
        drawn = torch.randint(self.embedding.vocabulary_size, size, generator=generator)
        drawn = drawn.to(text.device)
        made = [in_place(text, at, own) for at, own in enumerate(drawn)]
        residuals = torch.stack([self.search.residuals_of(texts) for texts in made])
        duplicates = self.embedding.first_duplicate.to(text.device)
        return residuals.masked_fill(duplicates[drawn] == duplicates[text][:, None], torch.inf)

    def _unseen(self) -> float:
        """How many texts that were not run may be as near as rounding allows, expected.

        Texts get rare towards the target as a power of the residual (Hill's estimator): those with
        one other token as the nearest random tokens show, others as the search's random texts do.
        """
        bar, T = float(self.calibration.rounding[1]), len(self.search.best)
        vocabulary = float(self.embedding.vocabulary_size)
        one = _share(self._random(self.search.best), _NEAREST, bar)
        random = self.search.random[(self.search.random_texts != self.search.best).any(1)]
        several = _share(random[None], max(2, len(random) // 20), bar)
        return T * vocabulary * one + math.exp(min(T * math.log(vocabulary) + math.log(several), 0))

    def _alternatives(self, position: int) -> tuple[int, ...]:
        order = self.search.residuals.argsort()
        tokens = dict.fromkeys(self.search.texts[order, position].tolist())
        return tuple(tokens)[: 1 + ALTERNATIVES]


def _share(residuals: Tensor, nearest: int, bar: float) -> float:
    """The share of texts with residuals below ``bar``, from random ones ``[N, K]``.

    Of each of the N the ``nearest`` ones are used; the N with the closest decides.
    """
    near = residuals.sort(dim=1).values[:, :nearest].double().clamp_min(1e-30)
    power = float(rarity_power(near[:, -1:], near[:, :-1]))
    common = float(near[:, -1].min())
    return float(max(nearest / residuals.shape[1] * min(1.0, bar / common) ** power, 1e-300))


def _state(passes: bool, apart: bool, shown: bool) -> State:
    if shown:
        return "verified"
    if passes and not apart:
        return "group"
    return "unresolved"
