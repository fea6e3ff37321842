"""The one search behind ``fit`` and ``predict``: propose, run, verify, move on or go back.

``PrefixSearch`` holds where each prompt of a batch stands. A ``Proposals`` object names candidates
for the next token; ``step`` runs them behind the tokens found so far and compares their features
with the target.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_inversion.recovery.evidence import Evidence
from lightning_inversion.recovery.measurements import Measurements
from lightning_inversion.recovery.rivals import NearTokens
from lightning_inversion.recovery.verification import Judgement, Verifier
from lightning_inversion.transformer.embedding import best_tokens
from lightning_inversion.transformer.prefix import KnownPrefix

_STORED = ("tried", "count", "rounds", "reach", "_rivals", "_rival_residuals")
_FARTHEST = 64
"""The most positions that are run together, and the number for a new prompt."""
CANDIDATES_OF_A_FORWARD = 4096
"""Candidates of one forward over all rows, which bounds the memory."""


@dataclass(frozen=True)
class Candidates:
    """Tokens to run.

    Attributes:
        ids: ``[R, K]``, the most likely first; ``[R, W, K]`` for W positions.
        proposers: the name of the proposer of each of the K columns.
    """

    ids: Tensor
    proposers: tuple[str, ...]


@dataclass(frozen=True)
class Trial:
    """What running candidates at one position has shown.

    Attributes:
        rows: ``[R]`` rows of the batch.
        ids: ``[R, K]`` the candidates.
        residuals: ``[R, K]`` distance of each candidate to the target, see ``Calibration``.
        threshold: ``[R]`` the residual up to which a candidate passes.
        best: ``[R]`` the candidate with the smallest residual.
        verified: ``[R]`` bool; the search of such a row has moved on behind ``best``.
        group: ``[R]`` bool; several tokens reproduce the target, and none is verified. The search
            has moved on behind ``best`` here too.
        rivals: ``[R]`` the nearest other token that was compared; -1 without one.
        rival_residuals: ``[R]`` its residual; infinite without one.
        tried: ``[R]`` tokens run at this position so far, these included.
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
    proposers: tuple[str, ...] = ()
    same_forward: bool = False

    @property
    def settled(self) -> Tensor:
        """``[R]`` bool; True where the search has moved on."""
        return self.verified | self.group


class Proposals(ABC):
    """A proposer at work on one batch: it ranks the vocabulary for the next token of each prompt.

    Args:
        search: of the batch.
        name: the proposer's, as certificates show it.
    """

    def __init__(self, search: PrefixSearch, name: str) -> None:
        self.search, self.name = search, name

    def update(self, rows: Tensor) -> None:  # noqa: B027 - most need nothing
        """A round begins for ``rows`` [R]: use what earlier rounds have shown."""

    def accept(self, rows: Tensor, ids: Tensor) -> None:  # noqa: B027
        """Each of ``rows`` [R] continues with its token of ``ids`` [R]."""

    def take_back(self, rows: Tensor) -> None:  # noqa: B027
        """The last token of each of ``rows`` [R] was wrong; ``accept`` gives another one next."""

    def ahead(self, rows: Tensor, width: int, count: int) -> Candidates | None:
        """The ``count`` best tokens of each of the next ``width`` positions.

        None where the tokens in between must be known. A position may lie behind a prompt's end;
        its candidates are ignored.
        """
        return None

    @abstractmethod
    def scores(self, rows: Tensor) -> Tensor:
        """Log-likelihood ``[R, V]`` of each token, up to a constant a row. Changes nothing."""

    def propose(self, rows: Tensor, count: int) -> Candidates:
        """The ``count`` best tokens that were not tried yet."""
        ids = best_untried(self.scores(rows), self.search.tried[rows], count)
        return Candidates(ids, (self.name,) * ids.shape[1])


def best_untried(scores: Tensor, tried: Tensor, count: int) -> Tensor:
    """The untried tokens ``[R, count]`` with the best of scores ``[R, V]``.

    A row with fewer left repeats tried ones at its end.
    """
    scores = scores.masked_fill(tried, -torch.inf)
    return best_tokens(scores, min(count, scores.shape[1])).indices


class PrefixSearch:
    """The next unknown token of each of B prompts.

    Args:
        measurements: of the model.
        target: ``[B, T, F]`` features to reproduce.
        prefix: keeps the keys and values of the tokens found; default a new one.
        exhaustive: compare a token that passes with the whole vocabulary before it is verified.

    Attributes:
        prefix: the tokens found so far.
        tried: ``[B, V]`` bool, tokens that were run at the row's position.
        count: ``[B]`` how many these are.
        rounds: ``[B]`` rounds of candidates at the row's position.
        reach: ``[B]`` how many positions are worth running together: twice as many as before where
            all first candidates were right, else half.
    """

    def __init__(
        self,
        measurements: Measurements,
        target: Tensor,
        prefix: KnownPrefix | None = None,
        exhaustive: bool = False,
    ) -> None:
        self.measurements, self.target, self.exhaustive = measurements, target, exhaustive
        self.transformer, self.probe = measurements.transformer, measurements.probe
        self.verifier = measurements.derived(Verifier)
        B, device, embedding = len(target), target.device, self.transformer.embedding
        self.prefix = prefix or KnownPrefix(self.transformer, B)
        self.tried = torch.zeros(B, embedding.vocabulary_size, dtype=torch.bool, device=device)
        self.count = torch.zeros(B, dtype=torch.long, device=device)
        self.rounds = torch.zeros(B, dtype=torch.long, device=device)
        self.reach = torch.full((B,), _FARTHEST, device=device)
        self.evidence = Evidence(self.probe, embedding, B, device)
        self._rivals = torch.full((B,), -1, device=device)
        self._rival_residuals = torch.full((B,), torch.inf, device=device)

    def to_checkpoint(self) -> dict[str, Tensor]:
        """What a checkpoint holds, beside the tokens found, to continue from here."""
        stored = {name: getattr(self, name) for name in _STORED}
        return {**stored, **self.evidence.to_checkpoint()}

    def restore(self, stored: dict[str, Tensor]) -> None:
        """Continue from what a checkpoint holds."""
        for name in _STORED:
            setattr(self, name, stored[name].to(self.target.device))
        self.evidence.restore(stored)

    # -- where a row stands ------------------------------------------------------------------

    def positions(self, rows: Tensor) -> Tensor:
        """The position ``[R]`` of each row's next token."""
        return self.prefix.lengths[rows]

    def target_at(self, rows: Tensor) -> Tensor:
        """The features ``[R, F]`` that each row's next token must reproduce."""
        return self.target[rows, self.positions(rows)]

    def linear_guess(self, rows: Tensor) -> Tensor:
        """The linear probe's embedding ``[R, D]`` of each row's next token."""
        return self.probe(self.target_at(rows), self.positions(rows))

    def guess(self, rows: Tensor) -> Tensor:
        """The linear guess ``[R, D]``, corrected by the wrong candidates that came closest."""
        guess, positions = self.linear_guess(rows), self.positions(rows)
        return self.evidence.corrected(rows, positions, guess)

    def closest(self, rows: Tensor, count: int) -> Tensor:
        """Embeddings ``[R, K, D]`` of the wrong candidates that came closest, nearest first.

        The corrected guess fills the entries that do not exist yet. K is ``count``, or 16.
        """
        return self.evidence.closest(rows, count, self.guess(rows))

    # -- one round ---------------------------------------------------------------------------

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
        # A row's first round at a position may be proposed otherwise than later ones.
        kinds = torch.stack(
            [(self.rounds[rows] > 0).long(), sizes, self._widths(rows, remaining)], dim=1
        )
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
        """Move on behind tokens ``[R]`` that nothing verifies."""
        self.prefix.candidates(rows, self.transformer.embedding(ids[:, None]))
        self.prefix.keep(rows, torch.zeros_like(rows))
        self._leave(rows)

    def take_back(self, rows: Tensor) -> None:
        """Go back: the last token of each of ``rows`` [R] is to be found again."""
        self.prefix.take_back(rows)
        self._leave(rows)

    def _widths(self, rows: Tensor, remaining: Tensor) -> Tensor:
        """Positions ``[R]`` to run together: a power of two, so that many rows are alike."""
        fresh = self.count[rows] == 0
        reach = torch.minimum(self.reach[rows], remaining).clamp(min=1)
        powers = 2 ** reach.double().log2().ceil().long()
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

        Candidates of a position stand behind the first ones of the positions before, and show
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
                self.reach[rows] = farther.clamp(1, _FARTHEST)
        for alike in _of_equal_size(challenged):
            yield from self._challenge(*alike)

    def _challenge(
        self, rows: Tensor, rest: Tensor, ids: Tensor, residuals: Tensor
    ) -> Iterator[Trial]:
        """Run the tokens ``[R, N]`` near the best of candidates ``[R, K]`` too; then judge.

        The nearest of them may have near tokens of its own, which are run in turn.
        """
        at, target = self.positions(rows), self.target_at(rows)
        for some in torch.split(rest, max(1, CANDIDATES_OF_A_FORWARD // len(rows)), dim=1):
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
            compared = self.count[rows] + self._new(rows, ids)
        judged = self.verifier.judge(
            ids, residuals, positions, self.target_at(rows),
            (self._rivals[rows], self._rival_residuals[rows]), compared,
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

    def _new(self, rows: Tensor, ids: Tensor) -> Tensor:
        """How many of candidates ``[R, K]`` were not run before, ``[R]``."""
        fresh = torch.zeros_like(self.tried[rows]).scatter_(1, ids, True)
        return (fresh & ~self.tried[rows]).sum(1)

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
        wrong = ~settled
        # Only rows that stay need a record of what was tried: most move on with their first token.
        self.tried[rows[wrong, None], ids[wrong]] = True
        self.count[rows[wrong]] = count[wrong]
        best = ids.gather(1, judged.best[:, None])[:, 0]
        smallest = residuals.gather(1, judged.best[:, None])[:, 0]
        nearer = wrong & (smallest < self._rival_residuals[rows])
        self._rivals[rows[nearer]] = best[nearer]
        self._rival_residuals[rows[nearer]] = smallest[nearer]
        if features is not None:
            here = rows[wrong]
            self.evidence.keep(
                here, positions[wrong], self.target_at(here), ids[wrong], features[wrong]
            )
        self._leave(rows[settled])
        return Trial(
            rows, ids, residuals, threshold, best, judged.verified, judged.group,
            judged.rivals, judged.rival_residuals, count,
        )  # fmt: skip

    def _leave(self, rows: Tensor) -> None:
        """A new position begins in ``rows``."""
        self.tried[rows[self.count[rows] > 0]] = False
        self.count[rows] = 0
        self.rounds[rows] = 0
        self.evidence.forget(rows)
        self._rivals[rows] = -1
        self._rival_residuals[rows] = torch.inf


def _of(judged: Judgement, some: Tensor) -> Judgement:
    """The judgement of some positions."""
    return Judgement(
        judged.best[some],
        judged.rivals[some],
        judged.rival_residuals[some],
        judged.verified[some],
        judged.group[some],
        [],
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
