"""Recovery as it goes: texts that grow token by token on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any

from lightning import LightningModule, Trainer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lightning_inversion.callbacks.live_display import LiveDisplay
from lightning_inversion.callbacks.shown_tokens import shown_tokens
from lightning_inversion.data.batch import PromptBatch
from lightning_inversion.errors import InputError
from lightning_inversion.module import InputInversion
from lightning_inversion.recovery.certificate import RecoveredPrompt

_SECONDS = 5.0
"""Between two plain lines at least, where there is no terminal."""


class RecoveryDisplay(LiveDisplay):
    """Shows what ``predict`` has recovered so far: verified tokens green, others yellow.

    Args:
        prompts: how many texts of a batch are shown.
        show: the display; False leaves it out.
    """

    def __init__(self, prompts: int = 8, show: bool = True) -> None:
        if prompts < 1:
            raise InputError(f"display.prompts must be at least 1, and is {prompts}.")
        super().__init__("tokens", show)
        self.prompts = prompts
        self._said_at = time.monotonic()
        self._said = ""

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """A bar for the batch."""
        assert isinstance(pl_module, InputInversion)
        if not self.show or not trainer.is_global_zero:
            return
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        task = self._bar.add_task("recovered", total=sum(batch.lengths))
        self._open(trainer)
        module = pl_module

        def watch(texts: list[RecoveredPrompt]) -> None:
            done = sum(len(text.ids) for text in texts)
            self._bar.update(task, completed=done)
            if self._live is not None:
                self._live.update(Group(self._bar, self._table(module, batch, texts)))
            else:
                self._say(f"{done} of {sum(batch.lengths)} tokens")

        pl_module.watch = watch

    def _say(self, line: str) -> None:
        """Print a line that is news, if the last one was some time ago."""
        if line == self._said or time.monotonic() - self._said_at < _SECONDS:
            return
        self._said_at, self._said = time.monotonic(), line
        print(line, file=sys.stderr, flush=True)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the live display."""
        self._close()

    def _table(self, module: InputInversion, batch: PromptBatch, texts: list[Any]) -> Table:
        table = Table(box=None, show_header=False, pad_edge=False)
        tokenizer = module.frozen.tokenizer
        for row, recovered in enumerate(texts[: self.prompts]):
            text = Text()
            for place, piece in enumerate(shown_tokens(tokenizer, recovered.ids)):
                proof = place - len(recovered.known)
                sure = proof < 0 or recovered.tokens[proof].verified
                text.append(piece, "green" if sure else "yellow")
            table.add_row(f"{batch.index[row] + 1}", text)
        return table
