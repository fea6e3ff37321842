"""Snapping: a token that is proven is fixed, and each later one solves an easier problem."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_inversion.errors import InputError
from lightning_inversion.inputs import EmbeddingInput
from lightning_inversion.module import InputInversion
from lightning_inversion.prompts import PromptDataModule
from lightning_inversion.recovery.token_search import TokenSearch


class TokenByToken(Callback):
    """Every few iterations, runs the tokens nearest to the input behind the proven prefix.

    A token whose features reproduce the target is fixed to its exact embedding. The objective looks
    only at the few positions behind the prefix, because later ones settle in wrong minima while
    what they attend to is wrong. A row whose tokens are all proven has ended.

    Args:
        every: iterations between two rounds of candidates; 0 turns the callback off.
        candidates: tokens run for a row in its first round at a position.
        most: tokens of a round at most, for a position that stays unproven.
        window: positions behind the prefix that are optimised.
    """

    RESTARTS_EVERY = TokenSearch.GROWS_EVERY
    """Rounds without proof after which a position starts again from what the candidates taught."""

    def __init__(
        self, every: int = 5, candidates: int = 64, most: int = 1024, window: int = 2
    ) -> None:
        if every < 0 or min(candidates, most, window) < 1 or most < candidates:
            raise InputError(
                "token_by_token.every must not be negative, candidates and window at least 1, and "
                f"most not below candidates; they are {every}, {candidates}, {window} and {most}."
            )
        self.every, self.candidates, self.most, self.window = every, candidates, most, window
        self._search: TokenSearch | None = None
        self._index: tuple[int, ...] | None = None
        self._stored: dict[str, Tensor] | None = None

    def check(self, module: InputInversion) -> None:
        """Refuse what cannot be proven token by token, before the model is loaded."""
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
        data: Any = getattr(trainer, "datamodule", None)
        captured = data.captured if isinstance(data, PromptDataModule) else None
        if self.every and stage == "fit" and captured is not None and not captured.storage.exact:
            raise InputError(
                "token_by_token proves tokens to the precision of float32, and --data.targets was "
                f"stored as {captured.storage.dtype} with noise {captured.storage.noise:g}; use "
                "predict, which measures its tolerance, or set --token_by_token.every 0."
            )

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """A round of candidates for the input as it stands, before it moves on."""
        assert isinstance(pl_module, InputInversion)
        if not self.every:
            return
        search = self._search_of(pl_module)
        if pl_module.iteration % self.every == 0:
            self._advance(pl_module, search, optimizer)
        self._focus(pl_module)

    def _search_of(self, module: InputInversion) -> TokenSearch:
        assert module.batch is not None
        if self._search is None or self._index != module.batch.index:
            self._index = module.batch.index
            self._search = TokenSearch(
                module.frozen, module.readout, module.target, self.candidates, self.most
            )
            if self._stored is not None:
                self._search.restore(self._stored)
                self._stored = None
        return self._search

    @torch.no_grad()
    def _advance(self, module: InputInversion, search: TokenSearch, optimizer: Optimizer) -> None:
        """Prove as many tokens as the input gives away, then restart the positions that stall."""
        batch, values = module.batch, module.learnable.values
        assert batch is not None
        totals = batch.mask.sum(1)
        rows = self._unfinished(module, totals)
        rows = rows[
            ~search.tested[rows].all(1)
        ]  # where every token was tried, the gradient is left
        if len(rows):
            known = module.known_vectors(rows, module.progress.proven[rows].sum(1))
        while len(rows):
            lengths = known.lengths_of(rows)
            proposal = search.propose(rows, known, values[rows, lengths])
            rows, lengths = rows[proposal.proven], lengths[proposal.proven]
            vectors = module.learnable.encode(proposal.ids[proposal.proven], module.embedding)
            if len(rows):
                known.append(rows, vectors)
            values[rows, lengths] = vectors
            module.learnable.held[rows, lengths] = True
            module.progress.proven[rows, lengths] = True
            rows = rows[lengths + 1 < totals[rows]]
        finished = module.progress.proven.sum(1) == totals
        module.stop_rows(finished)
        self._restart(module, search, optimizer, self._unfinished(module, totals))

    @staticmethod
    def _unfinished(module: InputInversion, totals: Tensor) -> Tensor:
        moving = (module.progress.proven.sum(1) < totals) & ~module.progress.stopped
        return moving.nonzero()[:, 0]

    def _restart(
        self, module: InputInversion, search: TokenSearch, optimizer: Optimizer, rows: Tensor
    ) -> None:
        """Positions that stall start again at the secant guess, and the optimiser forgets them."""
        rounds = search.rounds[rows]
        stalled = rows[(rounds > 0) & (rounds % self.RESTARTS_EVERY == 0)]
        if not len(stalled):
            return
        positions = module.progress.proven[stalled].sum(1)
        values = module.learnable.values
        values[stalled, positions] = search.secant(stalled)
        for moment in optimizer.state.get(values, {}).values():
            if isinstance(moment, Tensor) and moment.shape == values.shape:
                moment[stalled, positions] = 0

    def _focus(self, module: InputInversion) -> None:
        """The next iteration's objective looks at the window behind each prefix."""
        proven = module.progress.proven.sum(1, keepdim=True)
        positions = torch.arange(module.progress.proven.shape[1], device=proven.device)
        module.progress.focus = (positions >= proven) & (positions < proven + self.window)

    def state_dict(self) -> dict[str, Any]:
        """The candidates tried so far."""
        return {} if self._search is None else self._search.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Taken up when the search of the resumed batch begins."""
        self._stored = state_dict or None
