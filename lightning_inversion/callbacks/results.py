"""What a run leaves: one whole row a prompt in ``results.jsonl``, a table, metrics, HParams."""

import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_inversion.callbacks.fitted_rows import (
    bad_row,
    describe,
    describe_recovery,
    result_rows,
)
from lightning_inversion.callbacks.recovered_rows import recovered_rows
from lightning_inversion.callbacks.summary import mean, print_rows
from lightning_inversion.data.batch import PromptBatch
from lightning_inversion.data.prompts import PromptDataModule
from lightning_inversion.errors import InputError
from lightning_inversion.files import readable_time
from lightning_inversion.module import InputInversion
from lightning_inversion.recovery.verification import verify_text
from lightning_inversion.results import FILE, ResultRow, append_rows, read_rows, sort_rows
from lightning_inversion.strategy import ROWS_ARE_WRITTEN, IndependentPrompts


class Results(Callback):
    """Writes ``results.jsonl`` in the run's folder when a batch ends, and prints what was read.

    A row is appended whole or not at all, and rows that are there already (of a run that was
    killed and resumed) are not written again. A prompt that could not be run has a row too, which
    says why. When the run ends the rows of all processes are put in the order of the prompts.

    Args:
        top_k: how many tokens of each position are kept and counted in top-k accuracy.
    """

    def __init__(self, top_k: int = 5) -> None:
        if top_k < 1:
            raise InputError(f"--results.top_k must be at least 1, and is {top_k}.")
        self.top_k = top_k
        self._path = Path(FILE)
        self._finished: set[int] = set()
        self._counts: Counter[str] = Counter()
        self._began = self._began_run = time.monotonic()

    def path(self, trainer: Trainer) -> Path:
        """Where the rows of this run go. Every process must ask, or none."""
        return Path(trainer.log_dir or trainer.default_root_dir) / FILE

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell the data which rows are there already."""
        self._path = self.path(trainer)
        if stage != "validate":
            self._finished = {row.index for row in read_rows(self._path)}
            _data(trainer).finished |= self._finished

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; write the rows of prompts that cannot be run."""
        assert isinstance(pl_module, InputInversion)
        self._began_run = time.monotonic()
        self._write(trainer, pl_module, [], own=trainer.is_global_zero)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of a batch."""
        self._began = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the rows of the batch that ended."""
        assert isinstance(pl_module, InputInversion)
        if pl_module.batch is None:  # it was too large, and comes again
            self._write(trainer, pl_module, [])
            return
        rows = self._rows(pl_module)
        self._write(trainer, pl_module, rows)
        self._log(trainer, pl_module, rows)
        self._say_how_far(trainer, pl_module.batch)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; write the rows of prompts that cannot be run."""
        self.on_fit_start(trainer, pl_module)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: PromptBatch,
        *_: Any,
        **__: Any,
    ) -> None:
        """Write the rows of the texts that were recovered."""
        assert isinstance(pl_module, InputInversion)
        tokenizer = pl_module.frozen.tokenizer
        rows = recovered_rows(batch, outputs, tokenizer, describe_recovery(pl_module))
        self._write(trainer, pl_module, rows)
        self._log(trainer, pl_module, rows)
        self._say_how_far(trainer, batch)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        """Score a stored input."""
        assert isinstance(pl_module, InputInversion)
        rows = self._rows(pl_module)
        self._log(trainer, pl_module, rows)
        print_rows(rows)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gather the rows; give TensorBoard's HParams the settings beside what came of them."""
        assert isinstance(pl_module, InputInversion)
        if stage == "validate":
            return
        trainer.strategy.barrier(ROWS_ARE_WRITTEN)
        if not trainer.is_global_zero:
            return
        rows = sort_rows(self._path)
        values = mean(rows)
        if values and isinstance(trainer.logger, TensorBoardLogger):
            described = describe_recovery(pl_module) if stage == "predict" else describe(pl_module)
            settings = {k: v for k, v in described.items() if v is not None}
            trainer.logger.log_hyperparams(settings, {f"final/{k}": v for k, v in values.items()})

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Say what is finished, and how to go on."""
        texts = len(trainer.datamodule.texts) if _has_data(trainer) else 0  # type: ignore[attr-defined]
        rows = len(read_rows(self._path))
        if isinstance(exception, SIGTERMException):
            exception.code = 1  # Lightning would end as if all were done
        if trainer.is_global_zero and (rows or isinstance(exception, SIGTERMException)):
            print(
                f"{rows} of {texts} prompts are finished, in {self._path}; the same command with "
                "--ckpt_path last goes on.",
                file=sys.stderr,
            )

    def show(self, trainer: Trainer) -> None:
        """Print every row of the run, and where they are."""
        rows = read_rows(self._path)
        if rows:
            print_rows(rows)
        print(self._path)

    def _write(
        self, trainer: Trainer, module: InputInversion, rows: list[ResultRow], own: bool = True
    ) -> None:
        """Append what is not there yet, and what has been found impossible meanwhile."""
        data = _data(trainer)
        rows = [row for row in rows if row.index not in self._finished]
        bad = [index for index in data.bad if index not in self._finished]
        rows += [self._bad_row(trainer, module, index) for index in bad]
        self._finished |= {row.index for row in rows}
        if rows and own:
            append_rows(self._path, rows)

    def _bad_row(self, trainer: Trainer, module: InputInversion, index: int) -> ResultRow:
        """Why a prompt could not be run, with the keys that the command's other rows have."""
        data = _data(trainer)
        prompt, reason = data.texts[index], data.bad[index]
        shared = describe_recovery(module) if trainer.predicting else describe(module)
        return bad_row(index, prompt, reason, shared)

    def _say_how_far(self, trainer: Trainer, batch: PromptBatch) -> None:
        """How many prompts all processes have finished, and how long the others will take."""
        data = _data(trainer)
        todo = [b for b in data.batches if not data.finished.issuperset(b.index)]
        if len(todo) < 2:
            return
        rows = self._count(trainer, "rows", len(batch.index))
        tokens = self._count(trainer, "tokens", batch.size)
        most = sum(b.size for b in todo)
        elapsed = time.monotonic() - self._began_run
        left = elapsed * max(0, most - tokens) / tokens
        print(
            f"{len(data.finished | set(data.bad)) + rows} of {len(data.texts)} prompts, "
            f"about {readable_time(left)} left",
            file=sys.stderr,
            flush=True,
        )

    def _count(self, trainer: Trainer, key: str, more: int) -> int:
        """What all processes have counted."""
        self._counts[key] += more
        if isinstance(trainer.strategy, IndependentPrompts):
            return trainer.strategy.count(key, more)
        return self._counts[key]

    def _rows(self, module: InputInversion) -> list[ResultRow]:
        batch = module.batch
        assert batch is not None
        top = module.top_tokens(self.top_k)
        verdict = verify_text(
            module.features_of_best(top.best),
            module.target,
            batch.mask,
            module.measurements,
        )
        seconds = time.monotonic() - self._began
        return result_rows(module, batch, top, verdict, seconds)

    def _log(self, trainer: Trainer, module: InputInversion, rows: list[ResultRow]) -> None:
        if trainer.logger is not None:
            metrics = {f"final/{name}": value for name, value in mean(rows).items()}
            trainer.logger.log_metrics(metrics, module.step)


def _has_data(trainer: Trainer) -> bool:
    return isinstance(trainer.datamodule, PromptDataModule)  # type: ignore[attr-defined]


def _data(trainer: Trainer) -> PromptDataModule:
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, PromptDataModule), "Results needs a PromptDataModule"
    return data
