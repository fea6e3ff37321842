"""The recommended policy: candidates from several proposers, run together, verified by the target.

All prompts of a batch advance together, each at its own position. What a wrong candidate shows
corrects the next round. Where none of several plausible tokens can be verified, what follows
decides (``PlausibleTokens``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from lightning_inversion.errors import InputError
from lightning_inversion.proposers.first_position import FirstTokenScan
from lightning_inversion.proposers.gradient_proxy import GradientProxy
from lightning_inversion.proposers.mixture import MixedProposals, Mixture
from lightning_inversion.proposers.nearest_to_input import NearestToInput
from lightning_inversion.proposers.prior import LanguageModelPrior
from lightning_inversion.proposers.probe_proposer import ProbeProposer
from lightning_inversion.proposers.proposals import Proposals, Proposer
from lightning_inversion.recovery.plausible import PlausibleTokens
from lightning_inversion.recovery.policy import (
    ALTERNATIVES,
    RecoveredPrompt,
    RecoveryPolicy,
    Targets,
)
from lightning_inversion.recovery.search import PrefixSearch, Trial
from lightning_inversion.verification.certificate import State, TokenCertificate
from lightning_inversion.verification.measurements import Measurements
from lightning_inversion.verification.verifier import compares_all

_AT_LEAST = 2
"""Candidates of a position at least, so that a certificate can name a runner-up."""
_BEHIND = 512
"""Candidates of a position at most, after a position whose whole budget fitted nothing."""


class TokenRecovery(RecoveryPolicy):
    """Runs candidates for the next token of every prompt at once until one is verified.

    Args:
        proposer: which tokens to run first; default the linear probe, the gradient and the language
            model's prior together.
        first: the proposer at position 0; default the linear probe, then a scan that is made once
            for a model and depth.
        candidates: tokens run for a prompt in its first rounds at a position, a quarter of them in
            the very first, and half of them at position 0.
        max_candidates: the most tokens of a round; a position that stays open gets twice as many in
            each round, from its fourth on.
        budget: tokens run for a position before it is left unresolved with its best candidate;
            null runs the whole vocabulary.
        certify: compare a token that reproduces the target with the tokens ``near`` it, or with the
            whole vocabulary (``exhaustive``), before it is verified. Where 64 features or more are
            kept, up to 16,384 tokens are compared in any case where the near ones do not suffice.
    """

    uses_fit = True
    GROWS_AFTER = 2
    """Rounds at a position after which each doubles the number of candidates."""
    PATIENCE = 4
    """Rounds after which a plausible token that cannot be verified is taken as it is."""

    def __init__(
        self,
        proposer: Proposer | None = None,
        first: Proposer | None = None,
        candidates: int = 16,
        max_candidates: int = 512,
        budget: int | None = None,
        certify: Literal["near", "exhaustive"] = "near",
    ) -> None:
        if min(candidates, max_candidates, budget or 1) < 1:
            raise InputError(
                "--model.recovery: candidates, max_candidates and budget must be at least 1; they "
                f"are {candidates}, {max_candidates} and {budget}."
            )
        self.proposer = proposer or Mixture(
            [ProbeProposer(), GradientProxy(), LanguageModelPrior()]
        )
        self.first = first or FirstTokenScan()
        self.candidates, self.max_candidates = candidates, max(max_candidates, candidates)
        self.budget, self.certify = budget, certify
        self.needs_language_model = self.proposer.needs_language_model

    @property
    def name(self) -> str:
        """The name of the policy, with that of its proposer."""
        return f"TokenRecovery({self.proposer.name})"

    def recover(
        self, measurements: Measurements, targets: Targets
    ) -> Iterator[list[RecoveredPrompt]]:
        """Recover B prompts; see ``RecoveryPolicy``."""
        batch = _Batch(self, measurements, targets)
        while len(rows := batch.unfinished()):
            batch.round(rows)
            yield batch.prompts
        batch.decide_groups()
        yield batch.prompts

    def sizes(self, rounds: Tensor, share: int = 4) -> Tensor:
        """Candidates of rows ``[R]`` after so many rounds at a position.

        Args:
            rounds: ``[R]``.
            share: what part of them is run in the very first round.
        """
        growth = 2 ** (rounds - self.GROWS_AFTER).clamp(0, 16)
        sizes = (self.candidates * growth).clamp(max=self.max_candidates)
        # Most tokens are among the first few, and a round costs as many tokens as it runs.
        return torch.where(rounds == 0, max(1, self.candidates // share), sizes)


class _Batch:
    """The prompts of one batch while they are recovered."""

    def __init__(self, policy: TokenRecovery, measurements: Measurements, targets: Targets) -> None:
        exhaustive, verifies = policy.certify == "exhaustive", measurements.calibration.verifies
        if not verifies:  # so few tokens cost less than an answer without a certificate
            vocabulary = measurements.transformer.embedding.vocabulary_size
            exhaustive |= compares_all(measurements.calibration, vocabulary)
        self.policy, self.calibration = policy, measurements.calibration
        self.search = search = PrefixSearch(measurements, targets.features, exhaustive=exhaustive)
        B, device = len(targets.features), targets.features.device
        self.embedding = measurements.transformer.embedding
        limit = min(policy.budget or self.embedding.vocabulary_size, self.embedding.vocabulary_size)
        self.limits = torch.full((B,), limit, device=device)
        self.totals = torch.tensor(targets.lengths, device=device)
        self.prompts = [RecoveredPrompt(known=targets.known) for _ in range(B)]
        self.plausible = PlausibleTokens(B)
        self.began = time.monotonic()
        self.spent = [0.0] * B
        shape = (B, 1 + ALTERNATIVES)
        self.best_ids = torch.zeros(shape, dtype=torch.long, device=device)
        self.best_residuals = torch.full(shape, torch.inf, device=device)
        self.best_proposers = torch.zeros(shape, dtype=torch.long, device=device)
        self.names: list[str] = []
        self.first = None if targets.known else policy.first.begin(search)
        self.proposals = policy.proposer.begin(search)
        if targets.fitted is not None:
            parts = [NearestToInput(search, targets.fitted), self.proposals]
            self.proposals = MixedProposals(search, parts, [0, 0], share_alone=0.5)
        if targets.known:
            self._begin_with(targets.known_ids)

    def _begin_with(self, known: Tensor) -> None:
        rows = torch.arange(len(self.prompts), device=known.device)
        vectors = self.embedding(known).expand(len(rows), -1, -1)
        self.search.prefix.begin(rows, vectors, torch.full_like(rows, len(known)))
        for token in known:
            self.proposals.accept(rows, token.expand(len(rows)))

    def unfinished(self) -> Tensor:
        """Rows ``[R]`` with tokens to find."""
        return (self.search.prefix.lengths < self.totals).nonzero()[:, 0]

    def round(self, rows: Tensor) -> None:
        """Run one round of candidates for ``rows`` [R], at position 0 by ``first``."""
        at_start = self.search.positions(rows) == 0
        if at_start.any():
            assert self.first is not None
            self._round(rows[at_start], self.first, share=2)
        if not at_start.all():
            self._round(rows[~at_start], self.proposals, share=4)

    def _round(self, rows: Tensor, proposals: Proposals, share: int) -> None:
        search = self.search
        left = self.limits[rows] - search.count[rows]
        sizes = torch.minimum(self.policy.sizes(search.rounds[rows], share), left).clamp(min=1)
        began = time.monotonic()
        remaining = self.totals[rows] - search.positions(rows)
        open_rows, tried = [], []
        for trial in search.step(proposals, rows, sizes, remaining, at_least=_AT_LEAST):
            now = time.monotonic()
            for row in trial.rows.tolist():
                self.prompts[row].forwards += not trial.same_forward
                self.spent[row] += now - began
            began = now
            self._remember(trial)
            self._settle(trial)
            open_rows.append(trial.rows[~trial.settled])
            tried.append(trial.tried[~trial.settled])
        # Only now, because accepting a token would take the place of candidates that wait.
        self._give_up(torch.cat(open_rows), torch.cat(tried))

    def _give_up(self, rows: Tensor, tried: Tensor) -> None:
        """Where nothing verifies a token, take the best, so that later ones can be searched."""
        if not len(rows):
            return
        likely = self.calibration.plausible[self.search.positions(rows).clamp(max=1)]
        near = self.best_residuals[rows, 0] <= likely
        patient = self.search.rounds[rows] < self.policy.PATIENCE
        doubted = self.plausible.in_doubt(rows, tried) & ~near
        spent = tried >= self.limits[rows]
        ended = spent | (near & ~patient) | doubted
        for row in rows[ended & doubted].tolist():
            self._reconsider(row)
        # After a wrong token nothing reproduces the target, however many are run.
        lost = rows[spent & ~near & ~doubted]
        self.limits[lost] = self.limits[lost].clamp(max=_BEHIND)
        rows, tried = rows[ended & ~doubted], tried[ended & ~doubted]
        if len(rows):
            chosen = self.best_ids[rows, 0]
            self.search.accept(rows, chosen)
            for row, token, run in zip(rows.tolist(), chosen.tolist(), tried.tolist(), strict=True):
                self._certify(row, token, "unresolved", run)
            self._continue(rows, chosen)

    def _reconsider(self, row: int) -> None:
        """Nothing follows the uncertain token before: replace it by another plausible one."""
        rows = torch.tensor([row], device=self.totals.device)
        token = self.plausible.next(row, float(self.best_residuals[row, 0]))
        ids = torch.full_like(rows, token)
        self.search.take_back(rows)
        self.proposals.take_back(rows)
        self.search.accept(rows, ids)
        self.proposals.accept(rows, ids)
        tokens = self.prompts[row].tokens
        tokens[-1] = tokens[-1].replaced_by(token, self.plausible.residual(row, token))
        self.best_residuals[row] = torch.inf

    def decide_groups(self) -> None:
        """Verify tokens of groups whose other members the next row refutes."""
        if self.search.exhaustive:
            return  # the verifier compares with the near tokens alone
        for row, prompt in enumerate(self.prompts):
            groups = [
                at
                for at, (token, next_one) in enumerate(pairwise(prompt.tokens))
                if token.state == "group" and next_one.state != "unresolved"
            ]
            if not groups:
                continue
            begin = len(prompt.known)
            ids = torch.tensor([prompt.ids], device=self.totals.device)
            where = torch.zeros_like(ids, dtype=torch.bool)
            for at in groups:
                where[0, begin + at : begin + at + 2] = True
            target = self.search.target[row, None, : ids.shape[1]]
            verdict = self.search.verifier.verify(
                ids, target, torch.ones_like(where), self.search.transformer.features_of,
                where=where,
            )  # fmt: skip
            for (_, position), decision in verdict.decisions.items():
                at = position - begin
                prompt.tokens[at] = prompt.tokens[at].decided(**asdict(decision))
            verified = True
            for at, token in enumerate(prompt.tokens):
                prompt.tokens[at] = token.after(verified)
                verified &= prompt.tokens[at].verified

    def _remember(self, trial: Trial) -> None:
        """Keep the best candidates of each row's position."""
        rows = trial.rows
        numbers = [self._number(name) for name in trial.proposers]
        columns = torch.tensor(numbers, device=rows.device).expand(trial.ids.shape)
        all_ids = torch.cat([self.best_ids[rows], trial.ids], dim=1)
        all_residuals = torch.cat([self.best_residuals[rows], trial.residuals], dim=1)
        all_proposers = torch.cat([self.best_proposers[rows], columns], dim=1)
        order = all_residuals.argsort(dim=1, stable=True)[:, : self.best_ids.shape[1]]
        self.best_ids[rows] = all_ids.gather(1, order)
        self.best_residuals[rows] = all_residuals.gather(1, order)
        self.best_proposers[rows] = all_proposers.gather(1, order)

    def _number(self, proposer: str) -> int:
        if proposer not in self.names:
            self.names.append(proposer)
        return self.names.index(proposer)

    def _settle(self, trial: Trial) -> None:
        """Write the certificates of rows that have moved on to their next token."""
        settled = trial.settled
        for row, token, verified, tried, risk in zip(
            trial.rows[settled].tolist(),
            trial.best[settled].tolist(),
            trial.verified[settled].tolist(),
            trial.tried[settled].tolist(),
            trial.risks[settled].tolist(),
            strict=True,
        ):
            state: State = "verified" if verified else "group"
            self._certify(row, token, state, tried, None if math.isnan(risk) else risk)
        self._continue(trial.rows[settled], trial.best[settled])

    def _continue(self, rows: Tensor, ids: Tensor) -> None:
        if len(rows):
            self.proposals.accept(rows, ids)
            self.best_residuals[rows] = torch.inf

    def _certify(
        self, row: int, token: int, state: State, tried: int, risk: float | None = None
    ) -> None:
        """Write the certificate of a row's latest token."""
        position = self.search.prefix.lengths[row] - 1
        found = zip(self.best_ids[row].tolist(), self.best_residuals[row].tolist(), strict=True)
        nearest: dict[int, float] = {}
        for run, far in found:
            if far != float("inf"):
                nearest.setdefault(run, far)  # a token may have been run twice
        residual = nearest.pop(token, float("inf"))
        others = list(nearest.items())
        column = self.best_ids[row].tolist().index(token)
        limit = float(self.calibration.limit(position))
        likely = float(self.calibration.plausible[position.clamp(max=1)])
        plausible = [(token, residual), *(pair for pair in others if pair[1] <= likely)]
        prompt = self.prompts[row]
        certificate = TokenCertificate(
            id=token,
            state=state,
            residual=residual,
            threshold=limit,
            rival=others[0][0] if others else None,
            rival_residual=others[0][1] if others else None,
            risk=risk,
            compared=tried,
            proposer=self.names[int(self.best_proposers[row, column])],
            seconds=self.spent[row],
            alternatives=self._alternatives(state, token, others, limit),
        )
        prompt.tokens.append(certificate.after(prompt.verified))
        prompt.seconds = time.monotonic() - self.began
        self.spent[row] = 0.0
        self.plausible.settle(row, [] if state == "verified" else plausible)

    @staticmethod
    def _alternatives(
        state: State, token: int, others: list[tuple[int, float]], limit: float
    ) -> tuple[int, ...]:
        if state == "verified":
            return ()
        members = others if state != "group" else [pair for pair in others if pair[1] <= limit]
        return (token, *(other for other, _ in members))
