"""Schedules: which positions are optimised, and which are fixed to a token.

A schedule is a part of the experiment like the objective. The module calls it before each iteration
and after each batch. It changes the batch's ``BatchState`` and nothing else.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from lightning_inversion.decoding import TopTokens
from lightning_inversion.errors import InputError
from lightning_inversion.inputs import EmbeddingInput, LearnableInput
from lightning_inversion.proposers.mixture import MixedProposals
from lightning_inversion.proposers.nearest_to_input import NearestToInput
from lightning_inversion.proposers.probe_proposer import ProbeProposer
from lightning_inversion.recovery.search import PrefixSearch
from lightning_inversion.state import BatchState
from lightning_inversion.transformer.embedding import TokenEmbedding
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.verification.measurements import Measurements

_log = logging.getLogger(__name__)


class Experiment(Protocol):
    """What a schedule uses of the experiment that it is a part of."""

    spec: TransformerSpec
    learnable: LearnableInput
    isolated: bool

    @property
    def embedding(self) -> TokenEmbedding:
        """The frozen token embedding."""

    @property
    def measurements(self) -> Measurements:
        """What was measured for the frozen model."""

    def top_tokens(self, k: int) -> TopTokens:
        """The k best tokens of each position as the input stands."""


class Schedule(ABC):
    """Decides before each iteration which positions are optimised and which are fixed."""

    def check(self, experiment: Experiment) -> None:  # noqa: B027 - most fit any experiment
        """Refuse contradictory options, before a model is loaded.

        Raises:
            InputError: names the options, and the way out.
        """

    def check_length(self, longest: int, iterations: int) -> None:  # noqa: B027
        """Refuse prompts of up to ``longest`` tokens that so many iterations cannot finish.

        Raises:
            InputError: the iterations are too few; names the number that is needed.
        """

    def period(self, iterations: int) -> int:
        """Iterations after which the learning rate starts again."""
        return iterations

    @abstractmethod
    def before_iteration(self, state: BatchState, experiment: Experiment) -> Tensor | None:
        """Fix tokens, stop rows and set the focus of the iteration that follows.

        Returns:
            ``[B, T]`` bool, positions that start again, whose moments the optimiser clears;
            None for none.
        """

    def after_batch(self, state: BatchState) -> None:  # noqa: B027
        """The batch has ended; release what only its iterations needed."""


class AllPositions(Schedule):
    """Optimises all positions together, and fixes none: the source's own way."""

    def before_iteration(self, state: BatchState, experiment: Experiment) -> Tensor | None:
        """Nothing changes."""
        return None


class LeftToRight(Schedule):
    """Optimises one position at a time (the source's 'Sequential Input Representation').

    A position that has had its iterations is fixed to the token it decodes to, right or wrong. The
    next one is optimised after it; its learning rate and its optimiser start again. A row stops
    after its last position. Nothing is verified. In the source a token has no prefix at all
    (``model.isolated``); here it has the one that was recovered.

    Args:
        iterations: iterations of each position; the source's are 2000.
    """

    def __init__(self, iterations: int = 2000) -> None:
        if iterations < 1:
            raise InputError(
                f"--model.schedule.iterations must be at least 1, and is {iterations}."
            )
        self.iterations = iterations

    def check(self, experiment: Experiment) -> None:
        """Refuse isolated positions, which have no prefix to be fixed."""
        _check_not_isolated(self, experiment)

    def check_length(self, longest: int, iterations: int) -> None:
        """Every position must have its iterations."""
        needed = self.iterations * longest
        if iterations < needed:
            raise InputError(
                f"--model.iterations {iterations} end before the last position; with "
                f"{self.iterations} iterations of each it must be {needed} or more."
            )

    def period(self, iterations: int) -> int:
        """The learning rate starts again with each position."""
        return self.iterations

    @torch.no_grad()
    def before_iteration(self, state: BatchState, experiment: Experiment) -> Tensor | None:
        """Fix the position whose iterations are over, and focus on the next."""
        position, elapsed = divmod(state.iteration, self.iterations)
        length = state.batch.mask.shape[1]
        here = torch.arange(length, device=state.fixed.device) == position
        state.focus = here.expand_as(state.fixed)
        if elapsed or not 0 < position <= length:
            return None
        rows = torch.arange(len(state.fixed), device=state.fixed.device)
        done = torch.full_like(rows, position - 1)
        ids = experiment.top_tokens(1).best[:, position - 1]
        state.fix(rows, done, experiment.learnable.encode(ids, experiment.embedding))
        state.stop(state.lengths <= position)
        return torch.ones_like(state.fixed)


class VerifiedPrefix(Schedule):
    """Runs likely tokens after the verified prefix; one that reproduces the target is fixed.

    Candidates are run before the first iteration and every few after it. The objective compares
    only the few positions after the prefix, because later ones settle in wrong minima while what
    they attend to is wrong. A row whose tokens are all verified stops. Candidates come from the
    linear probe, corrected by those that failed, and, after the first iteration, in equal shares
    from the input.

    Where right and wrong tokens cannot be distinguished (targets with much noise), nothing is
    verified: a warning is logged, and the input is optimised as a whole.

    Args:
        every: iterations between two rounds of candidates.
        candidates: tokens run for a row once its first few at a position have failed.
        max_candidates: the most tokens of a round; a position that stays open gets four times as
            many every few rounds, so that the whole vocabulary is run in the end.
        window: positions after the prefix that are optimised.
    """

    FIRST = 8
    """Tokens of the first round at a position: mostly one of them is right."""
    GROWS_EVERY = 4
    """Rounds after which an open position starts again at the corrected guess, with more
    candidates."""

    def __init__(
        self, every: int = 5, candidates: int = 64, max_candidates: int = 512, window: int = 2
    ) -> None:
        if min(every, candidates, window) < 1 or max_candidates < candidates:
            raise InputError(
                "--model.schedule: every, candidates and window must be at least 1 and "
                f"max_candidates not below candidates; they are {every}, {candidates}, {window} "
                f"and {max_candidates}. Without verification choose --model.schedule AllPositions."
            )
        self.every, self.candidates, self.window = every, candidates, window
        self.max_candidates = max_candidates
        self._warned = False

    def check(self, experiment: Experiment) -> None:
        """Only embeddings after a causal prefix can be verified token by token."""
        if not isinstance(experiment.learnable, EmbeddingInput):
            raise InputError(
                "--model.schedule VerifiedPrefix fixes embeddings; choose --model.schedule "
                f"AllPositions for --model.learnable {type(experiment.learnable).__name__}."
            )
        if not experiment.spec.causal:
            raise InputError(
                "--model.schedule VerifiedPrefix verifies tokens from left to right; choose "
                "--model.schedule AllPositions for --model.transformer.causal false."
            )
        _check_not_isolated(self, experiment)

    @torch.no_grad()
    def before_iteration(self, state: BatchState, experiment: Experiment) -> Tensor | None:
        """Every few iterations a round of candidates; the focus follows the verified prefix."""
        if not experiment.measurements.calibration.verifies:
            if not self._warned:
                _log.warning(
                    "--model.schedule VerifiedPrefix: noise in the targets hides which token is "
                    "right. Nothing is verified, and the input is optimised as a whole."
                )
                self._warned = True
            return None
        search = state.search or self._begin(state, experiment)
        restarted = None
        if state.iteration % self.every == 0:
            self._verify(state, experiment, search)
            restarted = self._restart(state, search)
        prefix = state.prefix_lengths[:, None]
        positions = torch.arange(state.fixed.shape[1], device=prefix.device)
        state.focus = (positions >= prefix) & (positions < prefix + self.window)
        return restarted

    def after_batch(self, state: BatchState) -> None:
        """The search is no longer needed."""
        state.search = state.proposals = None

    @staticmethod
    def _begin(state: BatchState, experiment: Experiment) -> PrefixSearch:
        assert state.target is not None
        search = PrefixSearch(experiment.measurements, state.target, state.prefix)
        if state.stored_search:
            search.restore(state.stored_search)
        state.search, state.proposals = search, ProbeProposer().begin(search)
        return search

    def _verify(self, state: BatchState, experiment: Experiment, search: PrefixSearch) -> None:
        """Verify as many tokens as the candidates give."""
        rows = self._unfinished(state)
        # Where every token was run, only the gradient is left.
        rows = rows[search.count[rows] < experiment.embedding.vocabulary_size]
        vectors = experiment.learnable.embed(state.values, experiment.embedding)
        assert state.proposals is not None
        parts = [state.proposals]
        if state.iteration:  # before the first step the input adds nothing to the probe
            parts.append(NearestToInput(search, vectors))
        proposals = MixedProposals(search, parts, [0] * len(parts), share_alone=1.0)
        if len(rows):
            search.prefix.begin(rows, vectors[rows], state.prefix_lengths[rows])
        while len(rows):
            first = search.rounds[rows] == 0
            settled = torch.zeros_like(first)
            remaining = state.lengths[rows] - search.positions(rows)
            for trial in search.step(proposals, rows, self._sizes(search.rounds[rows]), remaining):
                found, ids = trial.rows[trial.settled], trial.best[trial.settled]
                settled |= torch.isin(rows, found)
                values = experiment.learnable.encode(ids, experiment.embedding)
                # The features do not show which of a group is right; the search goes on after one.
                verified = trial.verified[trial.settled]
                state.fix(found, state.prefix_lengths[found], values, verified)
            left = search.positions(rows) < state.lengths[rows]
            # On to the next token, or to the candidates after the first few.
            rows = rows[(settled | first) & left]
        state.stop(state.prefix_lengths == state.lengths)

    def _sizes(self, rounds: Tensor) -> Tensor:
        growth = 4 ** (rounds // self.GROWS_EVERY).clamp(max=8)
        sizes = (self.candidates * growth).clamp(max=self.max_candidates)
        return torch.where(rounds == 0, min(self.FIRST, self.candidates), sizes)

    def _restart(self, state: BatchState, search: PrefixSearch) -> Tensor | None:
        """Positions that stay open start again at the corrected guess."""
        rows = self._unfinished(state)
        rounds = search.rounds[rows]
        stalled = rows[(rounds > 0) & (rounds % self.GROWS_EVERY == 0)]
        if not len(stalled):
            return None
        positions = state.prefix_lengths[stalled]
        state.values[stalled, positions] = search.guess(stalled)
        restarted = torch.zeros_like(state.fixed)
        restarted[stalled, positions] = True
        return restarted

    @staticmethod
    def _unfinished(state: BatchState) -> Tensor:
        """Rows ``[R]`` that still move and have tokens to verify."""
        moving = (state.prefix_lengths < state.lengths) & ~state.stopped
        return moving.nonzero()[:, 0]


def _check_not_isolated(schedule: Schedule, experiment: Experiment) -> None:
    if experiment.isolated:
        raise InputError(
            f"--model.schedule {type(schedule).__name__} gives a token its prefix, and "
            "--model.isolated takes it away; choose --model.schedule AllPositions, or set "
            "--model.isolated false."
        )
