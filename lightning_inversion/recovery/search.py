"""The one search of ``fit`` and ``predict``: propose, run, verify, move on or go back.

A ``Proposals`` object names candidates for the next token of each prompt of a batch; ``step`` runs
them after the tokens found so far and compares their features with the target.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_inversion.proposers.open_positions import FARTHEST, OpenPositions
from lightning_inversion.proposers.proposals import Candidates, Proposals
from lightning_inversion.transformer.prefix import FixedPrefix
from lightning_inversion.verification.judgement import Judgement
from lightning_inversion.verification.measurements import Measurements
from lightning_inversion.verification.rivals import NearTokens
from lightning_inversion.verification.verifier import Verifier

_FEW_ROWS = 32
"""Rows up to which all are run at one width."""
CANDIDATES_OF_A_FORWARD = 4096
"""Candidates of one forward over all rows, which bounds the memory."""
_CHALLENGERS = 512
"""The same where they lie side by side after a prefix: attention takes the square of them."""


@dataclass(frozen=True)
class Trial:
    """What running candidates at one position has shown.

    Attributes:
        rows: ``[R]`` rows of the batch.
        ids: ``[R, K]`` the candidates.
        residuals: ``[R, K]`` distance of each candidate to the target, see ``Calibration``.
        threshold: ``[R]`` the residual up to which a candidate passes.
        best: ``[R]`` the candidate with the smallest residual.
        verified: ``[R]`` bool; the search of such a row has moved on after ``best``.
        group: ``[R]`` bool; several tokens reproduce the target, and none is verified. The search
            has moved on after ``best`` here too.
        rivals: ``[R]`` the nearest other token that was compared; -1 without one.
        rival_residuals: ``[R]`` its residual; infinite without one.
        tried: ``[R]`` tokens run at this position so far, these included.
        risks: ``[R]`` a bound for the chance that another token is right; nan without told noise.
        proposers: the proposer of each column of ``ids``.
        same_forward: True where an earlier trial has counted the forward.
    """

    rows: Tensor
    ids: Tensor
    residuals: Tensor
    threshold: Tensor
    best: Tensor
    verified: Tensor
    group: Tensor
    rivals: Tensor
    rival_residuals: Tensor
    tried: Tensor
    risks: Tensor
    proposers: tuple[str, ...] = ()
    same_forward: bool = False

    @property
    def settled(self) -> Tensor:
        """``[R]`` bool; True where the search has moved on."""
        return self.verified | self.group


class PrefixSearch(OpenPositions):
    """Runs candidates for the next unknown token of each of B prompts.

    Args:
        measurements: of the model.
        target: ``[B, T, F]`` features to reproduce.
        prefix: keeps the keys and values of the tokens found; default a new one.
        exhaustive: compare a token that passes with the whole vocabulary before it is verified.
    """

    def __init__(
        self,
        measurements: Measurements,
        target: Tensor,
        prefix: FixedPrefix | None = None,
        exhaustive: bool = False,
    ) -> None:
        super().__init__(measurements, target, prefix)
        self.exhaustive, self.verifier = exhaustive, measurements.derived(Verifier)

    def step(
        self,
        proposals: Proposals,
        rows: Tensor,
        sizes: Tensor,
        remaining: Tensor,
        at_least: int = 1,
    ) -> Iterator[Trial]:
        """Run each row's best untried tokens; rows that are alike are run together.

        Where first candidates have been right for several positions in a row, the next positions
        are run with theirs in one forward (speculative decoding).

        Args:
            proposals: name the candidates.
            rows: ``[R]``.
            sizes: ``[R]`` candidates of each row.
            remaining: ``[R]`` positions that each row has still to find.
            at_least: candidates of each position where several are run together.

        Yields:
            One trial a position. Verified rows have moved on.
        """
        # A row's first rounds at a position may be proposed otherwise than later ones.
        stages = self.rounds[rows].clamp(max=proposals.stages)
        kinds = torch.stack([stages, sizes, self._widths(rows, remaining)], dim=1)
        for kind in torch.unique(kinds, dim=0):
            alike = (kinds == kind).all(dim=1).nonzero()[:, 0]
            size, widest = int(kind[1]), int(torch.minimum(kind[2], remaining[alike].max()))
            for some in torch.split(alike, self.transformer.embedding.at_a_time):
                members = rows[some]
                proposals.update(members)
                proposed = self._proposed(proposals, members, size, widest, at_least)
                ids = proposed.ids.view(len(members), -1, len(proposed.proposers))
                at_a_time = max(1, CANDIDATES_OF_A_FORWARD // ids[0].numel())
                for part in torch.split(torch.arange(len(members), device=rows.device), at_a_time):
                    trials = self._run(members[part], ids[part], remaining[some[part]])
                    for trial in trials:
                        more = trial.ids.shape[1] - ids.shape[2]
                        names = proposed.proposers + (NearTokens.__name__,) * more
                        yield replace(trial, proposers=names)

    def run(self, rows: Tensor, ids: Tensor) -> list[Trial]:
        """Run candidates ``[R, K]`` at each row's next position."""
        return list(self._run(rows, ids[:, None], torch.ones_like(rows)))

    def accept(self, rows: Tensor, ids: Tensor) -> None:
        """Move on after tokens ``[R]`` that nothing verifies."""
        self.prefix.candidates(rows, self.transformer.embedding(ids[:, None]))
        self.prefix.keep(rows, torch.zeros_like(rows))
        self.leave(rows)

    def take_back(self, rows: Tensor) -> None:
        """Go back: the last token of each of ``rows`` [R] is to be found again."""
        self.prefix.take_back(rows)
        self.leave(rows)

    def _widths(self, rows: Tensor, remaining: Tensor) -> Tensor:
        """Positions ``[R]`` to run together: a power of two, so that many rows are alike.

        Few rows all run as many: a forward of few tokens takes as long as one of ``_FEW_ROWS``.
        """
        fresh = self.count[rows] == 0
        reach = torch.minimum(self.reach[rows], remaining).clamp(min=1).double()
        if len(rows) <= _FEW_ROWS:
            reach[fresh] = reach[fresh].mean()
        powers = 2 ** reach.log2().ceil().long()
        return torch.where(fresh, powers, 1)

    def _proposed(
        self, proposals: Proposals, rows: Tensor, size: int, width: int, at_least: int
    ) -> Candidates:
        """Candidates of the next ``width`` positions, of fewer, or of the next one."""
        while width > 1:
            count = max(at_least, size // width)
            if self.prefix.reaches(rows, width, count):
                ahead = proposals.ahead(rows, width, count)
                return proposals.propose(rows, size) if ahead is None else ahead
            width //= 2
        return proposals.propose(rows, size)

    @torch.no_grad()
    def _run(self, rows: Tensor, ids: Tensor, remaining: Tensor) -> Iterator[Trial]:
        """Run candidates ``[R, W, K]`` of the next W positions together.

        Candidates of a position come after the first ones of the positions before, and show
        something as long as those are verified. Yields one trial a position, of the rows that came
        so far. A row whose best candidate has near tokens that were not run has its trial last,
        with them.
        """
        W, K = ids.shape[1:]
        features = self.prefix.ahead(rows, self.transformer.embedding(ids))
        if not self.exhaustive:
            self.verifier.near.prepare(ids[:, :, 0])
        each = torch.arange(len(rows), device=rows.device)
        on_course = torch.ones_like(each, dtype=torch.bool)
        came = torch.zeros_like(each)
        challenged: list[tuple[int, Tensor, Tensor, Tensor]] = []
        for offset in range(W):
            some = each[on_course]
            if not len(some):
                break
            here, at = rows[some], self.positions(rows[some])
            target, tokens, found = self.target_at(here), ids[some, offset], features[some, offset]
            residuals = self._residuals(found, target, at)
            judged = self._judge(here, tokens, residuals, at)
            settled = judged.verified | judged.group
            kept = torch.full_like(each, -1)
            kept[some] = torch.where(settled, offset * K + judged.best, -1)
            self.prefix.keep(rows, kept)
            waits = torch.tensor([rest is not None for rest in judged.missing], device=rows.device)
            for number in waits.nonzero()[:, 0].tolist():
                rest = judged.missing[number]
                assert rest is not None
                challenged.append((int(here[number]), rest, tokens[number], residuals[number]))
            if W == 1:
                self.rounds[here[~waits]] += 1
            now = ~waits
            if now.any():
                yield replace(
                    self._trial(
                        here[now], tokens[now], residuals[now], _of(judged, now), found[now]
                    ),
                    same_forward=offset > 0,
                )
            on_course[some] = judged.verified & (judged.best == 0)
            came += on_course
            on_course &= remaining > offset + 1
            if offset == W - 1 or not on_course.any():
                # Rows that came as far as they were run may be run farther, others less far.
                farther = torch.where(came == W, 2 * W, came.clamp(min=W // 2))
                self.reach[rows] = farther.clamp(1, FARTHEST)
        for alike in _of_equal_size(challenged):
            yield from self._challenge(*alike)

    def _challenge(
        self, rows: Tensor, rest: Tensor, ids: Tensor, residuals: Tensor
    ) -> Iterator[Trial]:
        """Run the tokens ``[R, N]`` near the best of candidates ``[R, K]`` too; then judge.

        The nearest of them may have near tokens of its own, which are run in turn.
        """
        at, target = self.positions(rows), self.target_at(rows)
        for some in torch.split(rest, max(1, _CHALLENGERS // len(rows)), dim=1):
            features = self.prefix.candidates(rows, self.transformer.embedding(some))
            residuals = torch.cat([residuals, self._residuals(features, target, at)], dim=1)
            ids = torch.cat([ids, some], dim=1)
        judged = self._judge(rows, ids, residuals, at)
        waits = torch.tensor([more is not None for more in judged.missing], device=rows.device)
        now = ~waits
        if now.any():
            here, decided = rows[now], _of(judged, now)
            self.rounds[here] += 1
            best = ids[now].gather(1, decided.best[:, None])
            self.prefix.candidates(here, self.transformer.embedding(best))
            settled = decided.verified | decided.group
            self.prefix.keep(here, torch.where(settled, 0, -1))
            yield self._trial(here, ids[now], residuals[now], decided, None)
        for number in waits.nonzero()[:, 0].tolist():
            more = judged.missing[number]
            assert more is not None
            one = slice(number, number + 1)
            yield from self._challenge(rows[one], more[None], ids[one], residuals[one])

    def _residuals(self, features: Tensor, target: Tensor, positions: Tensor) -> Tensor:
        """Residuals ``[R, K]`` of features ``[R, K, F]`` to targets ``[R, F]``."""
        at = positions[:, None].expand(features.shape[:2])
        residuals = self.measurements.calibration.residual(features, target[:, None], at)
        return residuals.nan_to_num(nan=torch.inf)  # of features that overflow

    def _judge(self, rows: Tensor, ids: Tensor, residuals: Tensor, positions: Tensor) -> Judgement:
        compared = None
        if self.exhaustive:
            compared = self.count_with(rows, ids)
        judged = self.verifier.judge(
            ids, residuals, positions, self.target_at(rows),
            self.rivals(rows), compared,
        )  # fmt: skip
        if compared is None:
            return judged
        # A token that passes waits for all that were not run yet.
        vocabulary = self.transformer.embedding.vocabulary_size
        smallest = residuals.min(dim=1).values
        passes = self.measurements.calibration.passes(smallest, positions)
        for row in (passes & (compared < vocabulary)).nonzero()[:, 0].tolist():
            left = ~self.tried[rows[row]]
            left[ids[row]] = False
            judged.missing[row] = left.nonzero()[:, 0]
            judged.group[row] = False
        return judged

    def _trial(
        self,
        rows: Tensor,
        ids: Tensor,
        residuals: Tensor,
        judged: Judgement,
        features: Tensor | None,
    ) -> Trial:
        """Record what candidates ``[R, K]`` with features ``[R, K, F]`` have shown.

        Rows that are settled leave their position, whose prefix is kept already.
        """
        settled = judged.verified | judged.group
        # The prefix of a settled row is one longer already.
        positions = self.positions(rows) - settled.long()
        count = self.count[rows] + (~self.tried[rows[:, None], ids]).sum(1)
        threshold = self.measurements.calibration.limit(positions)
        best = ids.gather(1, judged.best[:, None])[:, 0]
        smallest = residuals.gather(1, judged.best[:, None])[:, 0]
        wrong = ~settled
        shown = None if features is None else features[wrong]
        vocabulary = self.transformer.embedding.vocabulary_size
        self.stay(rows[wrong], ids[wrong], best[wrong], smallest[wrong], shown)
        self.leave(rows[settled])
        return Trial(
            rows, ids, residuals, threshold, best, judged.verified, judged.group,
            judged.rivals, judged.rival_residuals,
            torch.where(judged.scanned & settled, vocabulary, count), judged.risks,
        )  # fmt: skip


def _of(judged: Judgement, some: Tensor) -> Judgement:
    """The judgement of some positions."""
    return Judgement(
        judged.best[some],
        judged.rivals[some],
        judged.rival_residuals[some],
        judged.verified[some],
        judged.group[some],
        [],
        judged.scanned[some],
        judged.risks[some],
    )


def _of_equal_size(
    challenged: list[tuple[int, Tensor, Tensor, Tensor]],
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Rows with as many tokens to run are run together: rows ``[R]``, and what each has stacked."""
    sizes = sorted({len(rest) for _, rest, *_ in challenged})
    for size in sizes:
        rows, *parts = zip(*(one for one in challenged if len(one[1]) == size), strict=True)
        first, *others = (torch.stack(part) for part in parts)
        tokens, residuals = others
        yield torch.tensor(rows, device=first.device), first, tokens, residuals
