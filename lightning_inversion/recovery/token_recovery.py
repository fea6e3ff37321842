"""Our policy: candidates by what is known of them, run together, proven by the target."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_inversion.errors import InputError
from lightning_inversion.recovery.certificate import RecoveredText, TokenCertificate
from lightning_inversion.recovery.first_token import FirstToken
from lightning_inversion.recovery.frontier import Frontier
from lightning_inversion.recovery.gradient_proxy import GradientProxy
from lightning_inversion.recovery.linear_map import LinearMap
from lightning_inversion.recovery.orders import CandidateOrder, Candidates, Mixture
from lightning_inversion.recovery.policy import Instruments, RecoveryPolicy
from lightning_inversion.recovery.prior import LanguageModelPrior

_AT_A_TIME = 4096
"""Candidates of one forward, over all rows: bounds the memory."""

_ALTERNATIVES = 5


class TokenRecovery(RecoveryPolicy):
    """Tries candidates for the next token of every text at once until one is certified.

    All texts advance together, each at its own place; the candidates of a round lie side by side in
    one forward behind the kept prefix. What a wrong candidate shows corrects the next round.

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

    GROWS_EVERY = 4
    """Rounds at a place after which its share of candidates doubles."""
    PATIENCE = 4
    """Rounds after which a token that may be right, and cannot be certified, is taken as it is."""

    def __init__(
        self,
        order: CandidateOrder | None = None,
        first: CandidateOrder | None = None,
        candidates: int = 16,
        most: int = 512,
        budget: int | None = None,
    ) -> None:
        if min(candidates, most, budget or 1) < 1:
            raise InputError(
                "--model.recovery: candidates, most and budget must be at least 1; they are "
                f"{candidates}, {most} and {budget}."
            )
        self.order = order or Mixture([LinearMap(), GradientProxy(), LanguageModelPrior()])
        self.first = first or FirstToken()
        self.candidates, self.most, self.budget = candidates, max(most, candidates), budget
        self.needs_language_model = self.order.needs_language_model

    @property
    def name(self) -> str:
        """With the order of its candidates."""
        return f"TokenRecovery({self.order.name})"

    def recover(
        self,
        instruments: Instruments,
        target: Tensor,
        lengths: list[int],
        known: Tensor | None = None,
    ) -> Iterator[list[RecoveredText]]:
        """Recover B texts; see ``RecoveryPolicy``."""
        batch = _Batch(self, instruments, target, lengths, known)
        while len(rows := batch.unfinished()):
            begun, tried = batch.frontier.positions(rows) > 0, batch.frontier.rounds[rows] > 0
            for kind in (~begun, begun & ~tried, begun & tried):
                members = rows[kind]
                sizes = self._sizes(batch.frontier.rounds[members])
                for size in torch.unique(sizes).tolist():
                    batch.round(members[sizes == size], int(size))
            yield batch.texts
        yield batch.texts

    def _sizes(self, rounds: Tensor) -> Tensor:
        growth = 2 ** (rounds // self.GROWS_EVERY).clamp(max=16)
        sizes = (self.candidates * growth).clamp(max=self.most)
        # Most tokens are among the first few, and a round costs as many tokens as it runs.
        return torch.where(rounds == 0, max(1, self.candidates // 4), sizes)


class _Batch:
    """The texts of one batch on their way."""

    def __init__(
        self,
        policy: TokenRecovery,
        instruments: Instruments,
        target: Tensor,
        lengths: list[int],
        known: Tensor | None,
    ) -> None:
        self.policy, self.calibration = policy, instruments.calibration
        self.transformer = instruments.transformer
        B, device = len(target), target.device
        self.frontier = Frontier(
            self.transformer,
            instruments.readout,
            target,
            instruments.language_model,
            instruments.text,
        )
        vocabulary = self.transformer.embedding.vocabulary_size
        self.limit = min(policy.budget or vocabulary, vocabulary)
        self.totals = torch.tensor(lengths, device=device)
        self.texts = [RecoveredText() for _ in range(B)]
        self.began = time.monotonic()
        self.spent = torch.zeros(B, dtype=torch.float64)
        shape = (B, 1 + _ALTERNATIVES)
        self.best_ids = torch.zeros(shape, dtype=torch.long, device=device)
        self.best_residuals = torch.full(shape, torch.inf, device=device)
        self.best_orders = torch.zeros(shape, dtype=torch.long, device=device)
        self.names: list[str] = []
        if known is None or not len(known):
            policy.first.begin(self.frontier)
        policy.order.begin(self.frontier)
        if known is not None and len(known):
            self._begin_with(known)

    def _begin_with(self, known: Tensor) -> None:
        rows = torch.arange(len(self.texts), device=known.device)
        self.frontier.prefix.start(known.expand(len(rows), -1))
        for token in known:
            self.policy.order.advance(rows, token.expand(len(rows)))
        for text in self.texts:
            text.known = tuple(known.tolist())

    def unfinished(self) -> Tensor:
        """``[R]`` rows with tokens to find."""
        return (self.frontier.prefix.lengths < self.totals).nonzero()[:, 0]

    def round(self, rows: Tensor, size: int) -> None:
        """One round of ``size`` candidates for rows that all are, or all are not, at position 0."""
        if not len(rows):
            return
        began = time.monotonic()
        at_start = int(self.frontier.positions(rows)[0]) == 0
        order = self.policy.first if at_start else self.policy.order
        left = self.limit - int(self.frontier.tried[rows].sum(1).max())
        proposed = order.propose(self.frontier, rows, max(1, min(size, left)))
        at_a_time = max(1, _AT_A_TIME // proposed.ids.shape[1])
        for part in torch.split(torch.arange(len(rows)), at_a_time):
            self._run(rows[part], Candidates(proposed.ids[part], proposed.orders))
        self.spent[rows.cpu()] += time.monotonic() - began

    def _run(self, rows: Tensor, proposed: Candidates) -> None:
        ids, frontier = proposed.ids, self.frontier
        features = frontier.prefix.candidates(rows, self.transformer.embedding(ids))
        positions = frontier.positions(rows)
        residuals = self.calibration.residual(
            features, frontier.target_at(rows)[:, None], positions[:, None].expand(ids.shape)
        )
        for row in rows.tolist():
            self.texts[row].forwards += 1
        self._remember(rows, ids, residuals, proposed.orders)
        frontier.learn(rows, ids, features)
        best = residuals.argmin(dim=1)
        certified = residuals.gather(1, best[:, None])[:, 0] <= self._tolerance(positions)
        chosen = ids.gather(1, best[:, None])[:, 0]
        frontier.prefix.keep(rows, torch.where(certified, best, -1), chosen)
        self._settle(rows[certified], chosen[certified], certified=True)
        open_rows = rows[~certified]
        self._give_up(open_rows[self._exhausted(open_rows)])

    def _tolerance(self, positions: Tensor) -> Tensor:
        return self.calibration.tolerance[positions.clamp(max=1)]

    def _exhausted(self, rows: Tensor) -> Tensor:
        """Rows whose budget is spent, or that nothing can certify and a likely token is there."""
        spent = self.frontier.tried[rows].sum(1) >= self.limit
        likely = self.calibration.plausible[self.frontier.positions(rows).clamp(max=1)]
        near = self.best_residuals[rows, 0] <= likely
        return spent | (near & (self.frontier.rounds[rows] >= self.policy.PATIENCE))

    def _give_up(self, rows: Tensor) -> None:
        """Take the best candidate, uncertified, so that later tokens can be looked for."""
        if not len(rows):
            return
        chosen = self.best_ids[rows, 0]
        self.frontier.prefix.candidates(rows, self.transformer.embedding(chosen[:, None]))
        self.frontier.prefix.keep(rows, torch.zeros_like(rows), chosen)
        self._settle(rows, chosen, certified=False)

    def _remember(
        self, rows: Tensor, ids: Tensor, residuals: Tensor, orders: tuple[str, ...]
    ) -> None:
        """Keep the best candidates of each row's place."""
        names = [self._name(order) for order in orders]
        columns = torch.tensor(names, device=ids.device).expand(ids.shape)
        all_ids = torch.cat([self.best_ids[rows], ids], dim=1)
        all_residuals = torch.cat([self.best_residuals[rows], residuals], dim=1)
        all_names = torch.cat([self.best_orders[rows], columns], dim=1)
        order = all_residuals.argsort(dim=1, stable=True)[:, : self.best_ids.shape[1]]
        self.best_ids[rows] = all_ids.gather(1, order)
        self.best_residuals[rows] = all_residuals.gather(1, order)
        self.best_orders[rows] = all_names.gather(1, order)

    def _name(self, order: str) -> int:
        if order not in self.names:
            self.names.append(order)
        return self.names.index(order)

    def _settle(self, rows: Tensor, ids: Tensor, certified: bool) -> None:
        """Write certificates; the rows go on to their next token."""
        if not len(rows):
            return
        places = self.frontier.prefix.lengths[rows] - 1
        tolerances = self._tolerance(places).tolist()
        twins = self.transformer.embedding.twins
        tried = self.frontier.tried[rows].sum(1).tolist()
        now = time.monotonic()
        for number, (row, token) in enumerate(zip(rows.tolist(), ids.tolist(), strict=True)):
            same = (twins == twins[token]).nonzero()[:, 0].tolist()
            others = [
                (other, residual)
                for other, residual in zip(
                    self.best_ids[row].tolist(), self.best_residuals[row].tolist(), strict=True
                )
                if other not in same and residual != float("inf")
            ]
            self.texts[row].tokens.append(
                TokenCertificate(
                    id=token,
                    certified=certified,
                    residual=float(self.best_residuals[row, 0]),
                    tolerance=tolerances[number],
                    runner_up=others[0][1] if others else None,
                    candidates=tried[number],
                    order=self.names[int(self.best_orders[row, 0])],
                    seconds=float(self.spent[row]),
                    indistinguishable=tuple(other for other in same if other != token),
                    alternatives=() if certified else (token, *(other for other, _ in others)),
                )
            )
            self.texts[row].seconds = now - self.began
        self.policy.order.advance(rows, ids)
        self.frontier.advance(rows)
        self.best_residuals[rows] = torch.inf
        self.spent[rows.cpu()] = 0.0
