"""Progress on the terminal: a bar and what stands below it, and the prompts that are recovered."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING

from lightning import Callback, LightningModule, Trainer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lightning_inversion.data.batch import PromptBatch
from lightning_inversion.errors import InputError
from lightning_inversion.module import InputInversion
from lightning_inversion.recovery.policy import RecoveredPrompt
from lightning_inversion.transformer.tokens import shown_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
_SECONDS = 5.0
"""The least time between two plain lines, where there is no terminal."""


class LiveDisplay(Callback):
    """A bar on stderr while a run lasts; leaves the terminal in order, however it ends.

    Args:
        unit: what the bar counts.
        show: False leaves the display out.
    """

    def __init__(self, unit: str, show: bool) -> None:
        self.show = show
        self.console = Console(stderr=True)
        self._live: Live | None = None
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(),
            console=self.console,
        )

    def _open(self, trainer: Trainer) -> None:
        """Start it in the first process, where there is a terminal."""
        wanted = self.show and self.console.is_terminal and trainer.is_global_zero
        if wanted and self._live is None:
            self._live = Live(self._bar, console=self.console, refresh_per_second=4)
            self._live.start()

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the terminal in order."""
        self._close()


class RecoveryDisplay(LiveDisplay):
    """Shows what ``predict`` has recovered so far: verified tokens green, others yellow.

    Args:
        prompts: how many prompts of a batch are shown.
        show: the display; False leaves it out.
    """

    def __init__(self, prompts: int = 8, show: bool = True) -> None:
        if prompts < 1:
            raise InputError(f"display.prompts must be at least 1, and is {prompts}.")
        super().__init__("tokens", show)
        self.prompts = prompts
        self._batch: PromptBatch | None = None
        self._printed_at = time.monotonic()
        self._printed = ""

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the rounds of the first process."""
        assert isinstance(pl_module, InputInversion)
        if self.show and trainer.is_global_zero:
            pl_module.after_each_round(
                partial(self._show_round, trainer, pl_module.frozen.tokenizer)
            )

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show a bar for the batch."""
        self._batch = batch
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self._bar.add_task("recovered", total=sum(batch.lengths))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the live display."""
        self._close()

    def _show_round(
        self,
        trainer: Trainer,
        tokenizer: PreTrainedTokenizerBase | None,
        prompts: list[RecoveredPrompt],
    ) -> None:
        assert self._batch is not None
        self._open(trainer)  # not before: measuring the model shows a bar of its own
        done = sum(len(prompt.ids) for prompt in prompts)
        self._bar.update(self._bar.task_ids[0], completed=done)
        if self._live is not None:
            self._live.update(Group(self._bar, self._table(tokenizer, prompts)))
            return
        line = f"{done} of {sum(self._batch.lengths)} tokens"
        if line != self._printed and time.monotonic() - self._printed_at > _SECONDS:
            self._printed_at, self._printed = time.monotonic(), line
            _log.info(line)

    def _table(
        self, tokenizer: PreTrainedTokenizerBase | None, prompts: list[RecoveredPrompt]
    ) -> Table:
        assert self._batch is not None
        table = Table(box=None, show_header=False, pad_edge=False)
        for row, prompt in enumerate(prompts[: self.prompts]):
            text = Text()
            verified = [token.verified for token in prompt.tokens]
            for piece, is_sure in zip(
                shown_tokens(tokenizer, prompt.ids),
                [True] * len(prompt.known) + verified,
                strict=True,
            ):
                text.append(piece, "green" if is_sure else "yellow")
            table.add_row(f"{self._batch.index[row] + 1}", text)
        return table
