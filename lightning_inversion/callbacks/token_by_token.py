"""Snapping: a token that is verified is fixed, and each later one solves an easier problem."""

import sys
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_inversion.data.batch import PromptBatch
from lightning_inversion.errors import InputError
from lightning_inversion.inputs import EmbeddingInput
from lightning_inversion.module import InputInversion
from lightning_inversion.recovery.linear_map import ProbeProposer
from lightning_inversion.recovery.optimized_input import NearestToInput
from lightning_inversion.recovery.proposals import Mixture
from lightning_inversion.recovery.rounds import round_of
from lightning_inversion.recovery.search import PrefixSearch, Trial


class TokenByToken(Callback):
    """Runs likely tokens behind the verified prefix, before the first iteration and every few after.

    A token whose features reproduce the target is fixed to its exact embedding. The objective looks
    only at the few positions behind the prefix, because later ones settle in wrong minima while
    what they attend to is wrong. A row whose tokens are all verified has ended. Candidates come from
    the linear map, corrected by those that failed, and, once it has moved, in equal shares from the
    input.

    Where the threshold cannot tell right tokens from wrong ones (targets with much noise), nothing
    can be verified: that is said, and the input is optimised as a whole.

    Args:
        every: iterations between two rounds of candidates; 0 turns the callback off.
        candidates: tokens run for a row once its first few at a position have failed.
        most: tokens of a round at most; a position that stays unproven gets four times as many
            every few rounds, so that the whole vocabulary is tried in the end.
        window: positions behind the prefix that are optimised.
    """

    FIRST = 8
    """Tokens of the first round at a position: mostly one of them is right."""
    GROWS_EVERY = 4
    """Rounds without proof after which a position starts again from what the candidates taught,
    with more of them."""

    def __init__(
        self, every: int = 5, candidates: int = 64, most: int = 512, window: int = 2
    ) -> None:
        if every < 0 or min(candidates, most, window) < 1 or most < candidates:
            raise InputError(
                "token_by_token.every must not be negative, candidates and window at least 1, and "
                f"most not below candidates; they are {every}, {candidates}, {window} and {most}."
            )
        self.every, self.candidates, self.most, self.window = every, candidates, most, window
        self._search: PrefixSearch | None = None
        self._map = ProbeProposer()
        self._index: tuple[int, ...] | None = None
        self._stored: dict[str, Tensor] | None = None
        self._said = False

    def check(self, module: InputInversion) -> None:
        """Refuse what cannot be verified token by token, before the model is loaded."""
        if not self.every:
            return
        if not isinstance(module.learnable, EmbeddingInput):
            raise InputError(
                "token_by_token fixes embeddings; set --token_by_token.every 0 for "
                f"--model.learnable {type(module.learnable).__name__}."
            )
        if not module.spec.causal:
            raise InputError(
                "token_by_token proves tokens from left to right; set --token_by_token.every 0 for "
                "--model.transformer.causal false."
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check again where no command line did."""
        assert isinstance(pl_module, InputInversion)
        self.check(pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PromptBatch, batch_idx: int
    ) -> None:
        """A round of candidates for the input as it stands, before the iteration moves it on.

        Prompts that are verified by what the linear map says of them need no iteration at all.
        """
        assert isinstance(pl_module, InputInversion)
        if not self.every or not pl_module.take_up(batch, batch_idx):
            return
        if not self._can_prove(pl_module):
            return
        with pl_module.giving_up_if_too_large():
            search = self._search_of(pl_module)
            if batch_idx % self.every == 0:
                self._advance(pl_module, search, trainer.optimizers[0])
            self._focus(pl_module)

    def _can_prove(self, module: InputInversion) -> bool:
        able = bool((module.measurements.calibration.threshold > 0).all())
        if not able and not self._said:
            print(
                "token_by_token: what happened to the targets hides which token is right: none can "
                "be verified, and the input is optimised as a whole.",
                file=sys.stderr,
            )
            self._said = True
        return able

    def _search_of(self, module: InputInversion) -> PrefixSearch:
        assert module.batch is not None
        if self._search is None or self._index != module.batch.index:
            self._index = module.batch.index
            self._search = PrefixSearch(module.measurements, module.target, module.prefix)
            self._map.begin(self._search)
            if self._stored is not None:
                self._search.restore(self._stored)
                self._stored = None
        return self._search

    @torch.no_grad()
    def _advance(self, module: InputInversion, search: PrefixSearch, optimizer: Optimizer) -> None:
        """Prove as many tokens as the input gives away, then restart the positions that stall."""
        assert module.batch is not None
        totals = module.batch.mask.sum(1)
        rows = self._unfinished(module, totals)
        # Where every token was tried, the gradient is left.
        rows = rows[search.count[rows] < module.embedding.vocabulary_size]
        vectors = module.learnable(module.embedding)
        # Before the first step the input knows nothing that the map does not.
        input_order = [NearestToInput(vectors)] if module.iteration else []
        order = Mixture([self._map, *input_order], alone=1.0)
        if len(rows):
            lengths = module.progress.verified[rows].sum(1)
            search.prefix.begin(rows, vectors[rows], lengths)
        while len(rows):
            first = search.rounds[rows] == 0
            sizes = self._sizes(search.rounds[rows])
            verified = torch.zeros_like(first)
            places_left = totals[rows] - search.positions(rows)
            for trial, _ in round_of(search, order, rows, sizes, places_left):
                verified |= torch.isin(rows, trial.rows[trial.verified])
                self._fix(module, trial)
            left = search.positions(rows) < totals[rows]
            # On to the next token, or to the candidates behind the first few.
            rows = rows[(verified | first) & left]
        module.stop_rows(module.progress.verified.sum(1) == totals)
        self._restart(module, search, optimizer, self._unfinished(module, totals))

    def _sizes(self, rounds: Tensor) -> Tensor:
        growth = 4 ** (rounds // self.GROWS_EVERY).clamp(max=8)
        sizes = (self.candidates * growth).clamp(max=self.most)
        return torch.where(rounds == 0, min(self.FIRST, self.candidates), sizes)

    @staticmethod
    def _fix(module: InputInversion, trial: Trial) -> None:
        """Certified tokens stand in the input from now on."""
        rows, ids = trial.rows[trial.verified], trial.best[trial.verified]
        places = module.progress.verified[rows].sum(1)
        module.learnable.values[rows, places] = module.learnable.encode(ids, module.embedding)
        module.learnable.held[rows, places] = True
        module.progress.verified[rows, places] = True

    @staticmethod
    def _unfinished(module: InputInversion, totals: Tensor) -> Tensor:
        moving = (module.progress.verified.sum(1) < totals) & ~module.progress.stopped
        return moving.nonzero()[:, 0]

    def _restart(
        self, module: InputInversion, search: PrefixSearch, optimizer: Optimizer, rows: Tensor
    ) -> None:
        """Positions that stall start again at the corrected guess; the optimiser forgets them."""
        rounds = search.rounds[rows]
        stalled = rows[(rounds > 0) & (rounds % self.GROWS_EVERY == 0)]
        if not len(stalled):
            return
        positions = module.progress.verified[stalled].sum(1)
        values = module.learnable.values
        values[stalled, positions] = search.guess(stalled)
        for moment in optimizer.state.get(values, {}).values():
            if isinstance(moment, Tensor) and moment.shape == values.shape:
                moment[stalled, positions] = 0

    def _focus(self, module: InputInversion) -> None:
        """The next iteration's objective looks at the window behind each prefix."""
        verified = module.progress.verified.sum(1, keepdim=True)
        positions = torch.arange(module.progress.verified.shape[1], device=verified.device)
        module.progress.focus = (positions >= verified) & (positions < verified + self.window)

    def state_dict(self) -> dict[str, Any]:
        """The candidates tried so far."""
        return {} if self._search is None else self._search.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Taken up when the resumed batch goes on."""
        self._stored = state_dict or None
