"""The sequential experiment with what the document's lacks: tokens see their recovered prefix."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from lightning_inversion.callbacks.token_by_token import TokenByToken
from lightning_inversion.data.prompts import PromptDataModule
from lightning_inversion.errors import InputError
from lightning_inversion.module import InputInversion


class PositionByPosition(Callback):
    """Optimises one position at a time, left to right (section 'Sequential Input Representation').

    A position that has had its iterations is fixed to the token it decodes to, right or wrong, and
    the next one is optimised behind it; the learning rate and the optimiser start again. A row ends
    with its last position. Nothing is verified (TokenByToken does that). The document's own way,
    without any prefix, is ``model.alone``.

    Args:
        iterations: iterations of each position; 0 turns the callback off. The document's is 2000.
    """

    def __init__(self, iterations: int = 0) -> None:
        if iterations < 0:
            raise InputError(
                f"position_by_position.iterations must not be negative, and is {iterations}."
            )
        self.iterations = iterations

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what contradicts, or would end before its last position, before a model loads."""
        assert isinstance(pl_module, InputInversion)
        sequential = bool(self.iterations) or pl_module.alone
        if sequential and any(isinstance(c, TokenByToken) and c.every for c in trainer.callbacks):  # type: ignore[attr-defined]
            raise InputError(
                "token_by_token chooses the positions itself; set --token_by_token.every 0 for "
                "--position_by_position.iterations or --model.alone."
            )
        if self.iterations and pl_module.alone:
            raise InputError(
                "--model.alone gives a token no prefix and --position_by_position.iterations its "
                "recovered one; choose one of them."
            )
        data: Any = getattr(trainer, "datamodule", None)
        if not self.iterations or stage != "fit" or not isinstance(data, PromptDataModule):
            return
        needed = self.iterations * max(batch.mask.shape[1] for batch in data.batches)
        if pl_module.iterations < needed:
            raise InputError(
                f"--model.iterations {pl_module.iterations} end before the last position; with "
                f"--position_by_position.iterations {self.iterations} it must be {needed} or more."
            )
        pl_module.period = self.iterations

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Fix the position whose time is over, and look at the next."""
        assert isinstance(pl_module, InputInversion)
        if not self.iterations:
            return
        module, batch = pl_module, pl_module.batch
        assert batch is not None
        position, elapsed = divmod(module.iteration, self.iterations)
        if 0 < position <= batch.mask.shape[1] and not elapsed:
            done = position - 1
            ids = module.top_tokens(1).best[:, done]
            module.learnable.values[:, done] = module.learnable.encode(ids, module.embedding)
            module.learnable.held[:, done] = True
            module.stop_rows(batch.mask.sum(1) <= position)
            optimizer.state.clear()
        here = torch.arange(batch.mask.shape[1], device=batch.mask.device) == position
        module.progress.focus = here.expand_as(batch.mask)
