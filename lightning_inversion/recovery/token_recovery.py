"""Our policy: candidates by what is known of them, run together, verified by the target."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from lightning_inversion.recovery.measurements import Measurements
from torch import Tensor

from lightning_inversion.errors import InputError
from lightning_inversion.recovery.certificate import RecoveredPrompt, TokenCertificate
from lightning_inversion.recovery.first_token import FirstTokenScan
from lightning_inversion.recovery.gradient_proxy import GradientProxy
from lightning_inversion.recovery.linear_map import ProbeProposer
from lightning_inversion.recovery.look_back import LookBack
from lightning_inversion.recovery.optimized_input import NearestToInput
from lightning_inversion.recovery.policy import RecoveryPolicy
from lightning_inversion.recovery.prior import LanguageModelPrior
from lightning_inversion.recovery.proposals import Mixture, Proposer
from lightning_inversion.recovery.rounds import round_of
from lightning_inversion.recovery.search import PrefixSearch, Trial

_ALTERNATIVES = 5
_BESIDE = 2
"""Candidates of a place at least, so that a certificate can name a runner-up."""


class TokenRecovery(RecoveryPolicy):
    """Tries candidates for the next token of every text at once until one is verified.

    All texts advance together, each at its own place; the candidates of a round lie side by side in
    one forward behind the kept prefix. What a wrong candidate shows corrects the next round. Where
    none of several plausible tokens can be verified, what follows decides (see ``LookBack``).

    Args:
        order: which tokens to try first; default the mixture of prior, linear map and gradient.
        first: the order at position 0; default a scan that is made once for a model and depth.
        candidates: tokens run for a text in its first rounds at a place, a quarter of them in the
            very first.
        most: tokens of a round at most; a place that stays open gets twice as many every four
            rounds.
        budget: tokens tried for a place before it is left as unresolved, its best candidate taken;
            null tries the whole vocabulary.
    """

    takes_start = True
    GROWS_EVERY = 4
    """Rounds at a place after which its share of candidates doubles."""
    PATIENCE = 4
    """Rounds after which a token that may be right, and cannot be verified, is taken as it is."""

    def __init__(
        self,
        order: Proposer | None = None,
        first: Proposer | None = None,
        candidates: int = 16,
        most: int = 512,
        budget: int | None = None,
    ) -> None:
        if min(candidates, most, budget or 1) < 1:
            raise InputError(
                "--model.recovery: candidates, most and budget must be at least 1; they are "
                f"{candidates}, {most} and {budget}."
            )
        self.order = order or Mixture([ProbeProposer(), GradientProxy(), LanguageModelPrior()])
        self.first = first or FirstTokenScan()
        self.candidates, self.most, self.budget = candidates, max(most, candidates), budget
        self.needs_language_model = self.order.needs_language_model

    @property
    def name(self) -> str:
        """With the order of its candidates."""
        return f"TokenRecovery({self.order.name})"

    def recover(
        self,
        measurements: Measurements,
        target: Tensor,
        lengths: list[int],
        known: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Iterator[list[RecoveredPrompt]]:
        """Recover B texts; see ``RecoveryPolicy``."""
        batch = _Batch(self, measurements, target, lengths, known, start)
        while len(rows := batch.unfinished()):
            batch.round(rows)
            yield batch.texts
        yield batch.texts

    def sizes(self, rounds: Tensor) -> Tensor:
        """How many candidates rows are given after so many rounds at a place."""
        growth = 2 ** (rounds // self.GROWS_EVERY).clamp(max=16)
        sizes = (self.candidates * growth).clamp(max=self.most)
        # Most tokens are among the first few, and a round costs as many tokens as it runs.
        return torch.where(rounds == 0, max(1, self.candidates // 4), sizes)


class _Batch:
    """The texts of one batch on their way."""

    def __init__(
        self,
        policy: TokenRecovery,
        measurements: Measurements,
        target: Tensor,
        lengths: list[int],
        known: Tensor | None,
        start: Tensor | None,
    ) -> None:
        self.policy, self.calibration = policy, measurements.calibration
        self.search = PrefixSearch(measurements, target)
        self.order = policy.order
        if start is not None:
            self.order = Mixture([NearestToInput(start), policy.order])
        B, device = len(target), target.device
        self.embedding = measurements.transformer.embedding
        self.limit = self.embedding.vocabulary_size
        if policy.budget is not None:
            self.limit = min(policy.budget, self.limit)
        self.totals = torch.tensor(lengths, device=device)
        self.texts = [RecoveredPrompt() for _ in range(B)]
        self.look_back = LookBack(B)
        self.began = time.monotonic()
        self.spent = [0.0] * B
        shape = (B, 1 + _ALTERNATIVES)
        self.best_ids = torch.zeros(shape, dtype=torch.long, device=device)
        self.best_residuals = torch.full(shape, torch.inf, device=device)
        self.best_orders = torch.zeros(shape, dtype=torch.long, device=device)
        self.names: list[str] = []
        if known is None or not len(known):
            policy.first.begin(self.search)
        self.order.begin(self.search)
        if known is not None and len(known):
            self._begin_with(known)

    def _begin_with(self, known: Tensor) -> None:
        rows = torch.arange(len(self.texts), device=known.device)
        vectors = self.embedding(known).expand(len(rows), -1, -1)
        self.search.prefix.begin(rows, vectors, torch.full_like(rows, len(known)))
        for token in known:
            self.order.advance(rows, token.expand(len(rows)))
        for text in self.texts:
            text.known = tuple(known.tolist())

    def unfinished(self) -> Tensor:
        """``[R]`` rows with tokens to find."""
        return (self.search.prefix.lengths < self.totals).nonzero()[:, 0]

    def round(self, rows: Tensor) -> None:
        """One round for rows ``[R]``."""
        at_start = self.search.positions(rows) == 0
        for members, order in ((rows[at_start], self.policy.first), (rows[~at_start], self.order)):
            if len(members):
                self._round(members, order)

    def _round(self, rows: Tensor, order: Proposer) -> None:
        search = self.search
        left = self.limit - search.count[rows]
        sizes = torch.minimum(self.policy.sizes(search.rounds[rows]), left).clamp(min=1)
        began = time.monotonic()
        places_left = self.totals[rows] - search.positions(rows)
        for trial, orders in round_of(search, order, rows, sizes, places_left, beside=_BESIDE):
            now = time.monotonic()
            for row in trial.rows.tolist():
                self.texts[row].forwards += not trial.again
                self.spent[row] += now - began
            began = now
            self._remember(trial, orders)
            yes, no = trial.verified, ~trial.verified
            self._settle(trial.rows[yes], trial.best[yes], trial.tried[yes], verified=True)
            self._give_up(trial.rows[no], trial.tried[no])

    def _give_up(self, rows: Tensor, tried: Tensor) -> None:
        """Where nothing certifies a token, take the best, so that later ones can be looked for."""
        if not len(rows):
            return
        likely = self.calibration.plausible[self.search.positions(rows).clamp(max=1)]
        near = self.best_residuals[rows, 0] <= likely
        patient = self.search.rounds[rows] < self.policy.PATIENCE
        doubted = self.look_back.doubts(rows, tried) & ~near
        ended = (tried >= self.limit) | (near & ~patient) | doubted
        for row in rows[ended & doubted].tolist():
            self._reconsider(row)
        rows, tried = rows[ended & ~doubted], tried[ended & ~doubted]
        if len(rows):
            chosen = self.best_ids[rows, 0]
            self.search.accept(rows, chosen)
            self._settle(rows, chosen, tried, verified=False)

    def _reconsider(self, row: int) -> None:
        """Nothing follows the uncertain token before: put another plausible one in its place."""
        rows = torch.tensor([row], device=self.totals.device)
        token = self.look_back.next(row, float(self.best_residuals[row, 0]))
        self.search.take_back(rows)
        self.order.take_back(rows)
        ids = torch.full_like(rows, token)
        self.search.accept(rows, ids)
        self.order.advance(rows, ids)
        self.texts[row].tokens[-1] = (
            self.texts[row].tokens[-1].instead(token, self.look_back.residual(row, token))
        )
        self.best_residuals[row] = torch.inf

    def _remember(self, trial: Trial, orders: tuple[str, ...]) -> None:
        """Keep the best candidates of each row's place."""
        rows = trial.rows
        names = [self._name(order) for order in orders]
        columns = torch.tensor(names, device=rows.device).expand(trial.ids.shape)
        all_ids = torch.cat([self.best_ids[rows], trial.ids], dim=1)
        all_residuals = torch.cat([self.best_residuals[rows], trial.residuals], dim=1)
        all_names = torch.cat([self.best_orders[rows], columns], dim=1)
        order = all_residuals.argsort(dim=1, stable=True)[:, : self.best_ids.shape[1]]
        self.best_ids[rows] = all_ids.gather(1, order)
        self.best_residuals[rows] = all_residuals.gather(1, order)
        self.best_orders[rows] = all_names.gather(1, order)

    def _name(self, order: str) -> int:
        if order not in self.names:
            self.names.append(order)
        return self.names.index(order)

    def _settle(self, rows: Tensor, ids: Tensor, tried: Tensor, verified: bool) -> None:
        """Write certificates; the rows have gone on to their next token."""
        places = (self.search.prefix.lengths[rows] - 1).clamp(max=1)
        thresholds = self.calibration.threshold[places].tolist()
        likely = self.calibration.plausible[places].tolist()
        first_duplicate = self.embedding.first_duplicate
        now = time.monotonic()
        for number, (row, token) in enumerate(zip(rows.tolist(), ids.tolist(), strict=True)):
            same = (first_duplicate == first_duplicate[token]).nonzero()[:, 0].tolist()
            others = [
                (other, residual)
                for other, residual in zip(
                    self.best_ids[row].tolist(), self.best_residuals[row].tolist(), strict=True
                )
                if other not in same and residual != float("inf")
            ]
            residual = float(self.best_residuals[row, 0])
            self.texts[row].tokens.append(
                TokenCertificate(
                    id=token,
                    verified=verified,
                    residual=residual,
                    threshold=thresholds[number],
                    runner_up=others[0][1] if others else None,
                    candidates=int(tried[number]),
                    order=self.names[int(self.best_orders[row, 0])],
                    seconds=self.spent[row],
                    duplicates=tuple(other for other in same if other != token),
                    alternatives=() if verified else (token, *(other for other, _ in others)),
                )
            )
            self.texts[row].seconds = now - self.began
            self.spent[row] = 0.0
            plausible = [(token, residual), *others]
            self.look_back.settle(
                row,
                [] if verified else [pair for pair in plausible if pair[1] <= likely[number]],
            )
        self.order.advance(rows, ids)
        self.best_residuals[rows] = torch.inf
