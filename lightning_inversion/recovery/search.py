"""Where the recovery of a batch of texts stands: what is known, and what was tried."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from lightning_inversion.recovery.measurements import Measurements
from torch import Tensor

from lightning_inversion.transformer.prefix import KnownPrefix

_KEPT = 16
"""Wrong candidates that correct the guess, the closest ones."""
_STATE = ("tried", "count", "rounds", "reach", "_errors", "_closest", "_corrected")
_FARTHEST = 64
"""Places of one run at most, and of the first."""


@dataclass(frozen=True)
class Trial:
    """What running candidates has shown, for the rows they were run for.

    Attributes:
        rows: ``[R]``.
        ids: ``[R, K]`` the candidates.
        residuals: ``[R, K]`` how far each is from the target, see ``Calibration``.
        threshold: ``[R]`` the residual up to which one is verified.
        best: ``[R]`` the candidate that came closest.
        verified: ``[R]`` bool, True where it is verified: the row has gone on behind it.
        tried: ``[R]`` tokens run at this place so far, these among them.
        again: True where an earlier trial has counted the forward that showed this.
    """

    rows: Tensor
    ids: Tensor
    residuals: Tensor
    threshold: Tensor
    best: Tensor
    verified: Tensor
    tried: Tensor
    again: bool = False


class PrefixSearch:
    """The next unknown token of each of B texts.

    Args:
        measurements: of the model.
        target: ``[B, T, F]`` features to reproduce.
        prefix: where its known tokens are kept; default a new one.

    Attributes:
        prefix: the tokens known so far.
        tried: ``[B, V]`` bool, tokens that were run at the row's position.
        count: ``[B]`` how many these are.
        rounds: ``[B]`` rounds of candidates at the row's position alone.
        reach: ``[B]`` for how many places first guesses are worth running together: twice as many
            as before where all were right, else half.
    """

    def __init__(
        self, measurements: Measurements, target: Tensor, prefix: KnownPrefix | None = None
    ) -> None:
        self.measurements, self.target = measurements, target
        self.transformer, self.probe = measurements.transformer, measurements.probe
        B, device, embedding = len(target), target.device, self.transformer.embedding
        self.prefix = prefix or KnownPrefix(self.transformer, B)
        self.tried = torch.zeros(B, embedding.vocabulary_size, dtype=torch.bool, device=device)
        self.count = torch.zeros(B, dtype=torch.long, device=device)
        self.rounds = torch.zeros(B, dtype=torch.long, device=device)
        self.reach = torch.full((B,), _FARTHEST, device=device)
        self._errors = torch.full((B, _KEPT), torch.inf, device=device)
        self._closest = torch.zeros(B, _KEPT, embedding.width, device=device)
        self._corrected = torch.zeros_like(self._closest)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold, beside the prefix, to go on from here."""
        return {name: getattr(self, name) for name in _STATE}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from ``state``."""
        for name in _STATE:
            setattr(self, name, state[name].to(self.target.device))

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
        """``[R, D]`` what the probe makes of the target."""
        return self.probe(self.target_at(rows), self.positions(rows))

    def guess(self, rows: Tensor) -> Tensor:
        """``[R, D]`` the linear guess, corrected by the wrong candidates that came closest.

        Each wrong candidate shows by how much the probe misses in this context: what the probe
        makes of such a token on average, plus its difference between target and candidate, is a
        guess without that miss (a secant step). The closer a candidate came, the more it counts.
        A first token has no context, so that what another one shows says nothing of it.
        """
        errors = self._errors[rows]
        known = torch.isfinite(errors)
        squares = errors.square()
        middle = squares.masked_fill(~known, torch.nan).nanmedian(dim=1, keepdim=True).values
        weights = torch.softmax(-squares / (0.3 * middle).clamp_min(1e-12), dim=1)
        weights = weights.masked_fill(~known, 0.0)
        corrected = (weights[..., None] * self._corrected[rows]).sum(1)
        in_context = known.any(1) & (self.positions(rows) > 0)
        return torch.where(in_context[:, None], corrected, self.linear_guess(rows))

    def closest(self, rows: Tensor, count: int) -> Tensor:
        """``[R, K, D]`` embeddings of the wrong candidates that came closest, nearest first.

        The corrected guess stands in for those that there are not yet. K is ``count``, or 16.
        """
        known = torch.isfinite(self._errors[rows, :count])[..., None]
        return torch.where(known, self._closest[rows, :count], self.guess(rows)[:, None])

    def try_out(self, rows: Tensor, ids: Tensor) -> Trial:
        """Run candidates ``[R, K]``; learn from them; go on behind one that is verified."""
        return next(self.run_ahead(rows, ids[:, None], torch.ones_like(rows)))

    @torch.no_grad()
    def run_ahead(self, rows: Tensor, ids: Tensor, left: Tensor) -> Iterator[Trial]:
        """Run candidates ``[R, W, K]`` of the next W places together (speculative decoding).

        Those of a place stand behind the first ones of the places before, and show something as
        long as these are verified.

        Args:
            rows: ``[R]``.
            ids: ``[R, W, K]``.
            left: ``[R]`` places that each has still to find; what is run behind them is ignored.

        Yields:
            One trial a place, of the rows that have come as far; they have gone on, or have learned
            that none of these is right.
        """
        W, K = ids.shape[1:]
        features = self.prefix.ahead(rows, self.transformer.embedding(ids))
        each = torch.arange(len(rows), device=rows.device)
        on_course = torch.ones_like(each, dtype=torch.bool)
        came = torch.zeros_like(each)
        for place in range(W):
            some = each[on_course]
            if not len(some):
                break
            trial, chosen = self._judge(rows[some], ids[some, place], features[some, place])
            kept = torch.full_like(each, -1)
            kept[some] = torch.where(trial.verified, place * K + chosen, -1)
            self.prefix.keep(rows, kept)
            if W == 1:
                self.rounds[trial.rows] += 1
            self._leave(trial.rows[trial.verified])
            on_course[some] = trial.verified & (chosen == 0)
            came += on_course
            on_course &= left > place + 1
            if place == W - 1 or not on_course.any():
                self._learn_reach(rows, came, W)
            yield replace(trial, again=place > 0)

    def _learn_reach(self, rows: Tensor, came: Tensor, width: int) -> None:
        """Rows that came as far as they were run may be run farther, others less far."""
        farther = torch.where(came == width, 2 * width, came.clamp(min=width // 2))
        self.reach[rows] = farther.clamp(1, _FARTHEST)

    def _judge(self, rows: Tensor, ids: Tensor, features: Tensor) -> tuple[Trial, Tensor]:
        """What candidates ``[R, K]`` with features ``[R, K, F]`` show, and which was closest."""
        positions, calibration = self.positions(rows), self.measurements.calibration
        places = positions[:, None].expand(ids.shape)
        residuals = calibration.residual(features, self.target_at(rows)[:, None], places)
        count = self.count[rows] + (~self.tried[rows[:, None], ids]).sum(1)
        closest, chosen = residuals.min(dim=1)
        threshold = calibration.threshold[positions.clamp(max=1)]
        verified = closest <= threshold
        wrong = ~verified
        # A row that goes on forgets what was tried: most do with their first token.
        self.tried[rows[wrong, None], ids[wrong]] = True
        self.count[rows[wrong]] = count[wrong]
        self._learn(rows[wrong], ids[wrong], features[wrong])
        best = ids.gather(1, chosen[:, None])[:, 0]
        return Trial(rows, ids, residuals, threshold, best, verified, count), chosen

    def accept(self, rows: Tensor, ids: Tensor) -> None:
        """Go on behind tokens ``[R]`` that nothing certifies."""
        self.prefix.candidates(rows, self.transformer.embedding(ids[:, None]))
        self.prefix.keep(rows, torch.zeros_like(rows))
        self._leave(rows)

    def _learn(self, rows: Tensor, ids: Tensor, features: Tensor) -> None:
        """Note what wrong tokens ``[R, K]`` with features ``[R, K, F]`` tell of the right one."""
        if not len(rows):
            return
        positions = self.positions(rows)[:, None].expand(ids.shape)
        target = self.target_at(rows)[:, None]
        distance = self.probe.standardize(features, positions) - self.probe.standardize(
            target, positions[:, :1]
        )
        errors = torch.linalg.vector_norm(distance, dim=-1)
        closest = errors.topk(min(_KEPT, ids.shape[1]), dim=1, largest=False).indices
        pick = torch.arange(len(rows), device=rows.device)[:, None]
        vectors = self.transformer.embedding(ids[pick, closest])
        corrected = (
            self.probe.expected(vectors, positions[pick, closest])
            + self.linear_guess(rows)[:, None]
            - self.probe(features[pick, closest], positions[pick, closest])
        )
        errors = torch.cat([self._errors[rows], errors[pick, closest]], dim=1)
        order = errors.argsort(dim=1, stable=True)[:, :_KEPT]
        self._errors[rows] = errors.gather(1, order)
        self._closest[rows] = torch.cat([self._closest[rows], vectors], dim=1)[pick, order]
        self._corrected[rows] = torch.cat([self._corrected[rows], corrected], dim=1)[pick, order]

    def take_back(self, rows: Tensor) -> None:
        """The last token of each of ``rows`` [R] is to be found again."""
        self.prefix.take_back(rows)
        self._leave(rows)

    def _leave(self, rows: Tensor) -> None:
        """A new position begins in ``rows``."""
        self.tried[rows[self.count[rows] > 0]] = False
        self.count[rows] = 0
        self.rounds[rows] = 0
        self._errors[rows] = torch.inf
