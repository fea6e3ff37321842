"""What a run leaves: one whole row a prompt in ``results.jsonl``, a table, metrics, HParams."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_inversion.callbacks.hparams import readable_settings
from lightning_inversion.callbacks.rows import (
    bad_row,
    fitted_rows,
    hypothesis,
    options_of_fit,
    options_of_predict,
    recovered_rows,
    settings_of_fit,
    settings_of_predict,
)
from lightning_inversion.callbacks.stopping import StoppingCriterion
from lightning_inversion.callbacks.summary import mean, print_rows
from lightning_inversion.data.batch import PromptBatch
from lightning_inversion.data.prompts import PromptDataModule
from lightning_inversion.errors import InputError
from lightning_inversion.files import printable, readable_time
from lightning_inversion.module import InputInversion
from lightning_inversion.results import (
    CERTIFICATE,
    FILE,
    ResultRow,
    append_rows,
    check_rows,
    read_rows,
    sort_rows,
)
from lightning_inversion.strategy import ROWS_ARE_WRITTEN, IndependentPrompts

_log = logging.getLogger(__name__)


class ResultWriter(Callback):
    """Writes ``results.jsonl`` in the run's folder when a batch ends, and prints its rows.

    A row is appended whole or not at all. Rows that are there already, of a run that was killed and
    resumed, are not written again. A prompt that could not be run has a row too, which holds the
    error. When the run ends the rows of all processes are put in the order of the prompts.

    Rows of other prompts, another model or other settings in the same file are refused.

    Args:
        top_k: how many tokens of each position are kept and counted in top-k accuracy.
        verify: compare a fit's decoded tokens with the target, which measures the model once; False
            leaves out of its rows which tokens are verified.

    Attributes:
        asked: the settings that decide the rows, from the command line; None for those that a row
            holds.
    """

    def __init__(self, top_k: int = 5, verify: bool = True) -> None:
        if top_k < 1:
            raise InputError(f"--results.top_k must be at least 1, and is {top_k}.")
        self.top_k, self.verify = top_k, verify
        self.asked: dict[str, Any] | None = None
        self._fingerprints: list[str] = []
        self._path = Path(FILE)
        self._finished: set[int] = set()
        self._weights: set[str | None] = set()
        self._counts: Counter[str] = Counter()
        self._batch_began = self._run_began = time.monotonic()

    def path(self, trainer: Trainer) -> Path:
        """Where the rows of this run are written. Every process must call it, or none."""
        return Path(trainer.log_dir or trainer.default_root_dir) / FILE

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the data the numbers of the rows that are there already."""
        self._path = self.path(trainer)
        if stage != "validate":
            assert isinstance(pl_module, InputInversion)
            predicts = stage == "predict"
            self._fingerprints = self.fingerprints(pl_module, _data(trainer).questions, predicts)
            rows = check_rows(self._path, self._fingerprints)
            self._weights = {row.weights_sha256 for row in rows}
            self._finished = {row.index for row in rows}
            _data(trainer).finished |= self._finished

    def fingerprints(
        self, module: InputInversion, questions: Sequence[str], predicts: bool
    ) -> list[str]:
        """sha256 of each question of the data with the settings that decide its answer."""
        asked = self.asked
        if asked is None:
            asked = options_of_predict(module) if predicts else options_of_fit(module, self.top_k)
            asked = {**module.spec.description, **asked}
        settings = json.dumps(asked, sort_keys=True, default=str)
        return [
            hashlib.sha256(f"{settings} {question}".encode()).hexdigest() for question in questions
        ]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; write the rows of prompts that cannot be run."""
        assert isinstance(pl_module, InputInversion)
        weights = pl_module.frozen.description["weights_sha256"]
        if self._weights - {weights}:
            raise InputError(
                f"{str(self._path)!r} holds rows of a model with other weights; restore the model, "
                "or give the run another folder."
            )
        self._run_began = time.monotonic()
        self._write(trainer, pl_module, [], own=trainer.is_global_zero)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of a batch."""
        self._batch_began = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the rows of the batch that ended."""
        assert isinstance(pl_module, InputInversion)
        if pl_module.state.is_empty:  # it was too large, and comes again
            self._write(trainer, pl_module, [])
            return
        rows = self._rows(trainer, pl_module)
        self._write(trainer, pl_module, rows)
        pl_module.report(_final(rows))
        self._report_progress(trainer, pl_module.state.batch)

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
        """Write the rows of the prompts that were recovered."""
        assert isinstance(pl_module, InputInversion)
        tokenizer = pl_module.frozen.tokenizer
        rows = recovered_rows(
            batch, outputs, tokenizer, pl_module.embedding, settings_of_predict(pl_module)
        )
        path = self._path.with_name(CERTIFICATE)
        if not path.exists():  # before the first row, which it belongs to: a run may end any time
            hypothesis(pl_module).write(path)
        self._write(trainer, pl_module, rows)
        pl_module.report(_final(rows))
        self._report_progress(trainer, batch)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        """Score a stored input."""
        assert isinstance(pl_module, InputInversion)
        rows = self._rows(trainer, pl_module)
        pl_module.report(_final(rows))
        print_rows(rows)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sort the rows; give TensorBoard's HParams the settings beside their means."""
        assert isinstance(pl_module, InputInversion)
        if stage == "validate":
            return
        trainer.strategy.barrier(ROWS_ARE_WRITTEN)
        if not trainer.is_global_zero:
            return
        metrics = _final(sort_rows(self._path))
        if metrics and isinstance(trainer.logger, TensorBoardLogger):
            asked = self.asked or self._settings(trainer, pl_module)
            trainer.logger.log_hyperparams(readable_settings(asked), metrics)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Report what is finished, and how to resume."""
        has_data = isinstance(trainer.datamodule, PromptDataModule)  # type: ignore[attr-defined]
        prompts = len(_data(trainer).prompts) if has_data else 0
        rows = len(read_rows(self._path))
        if isinstance(exception, SIGTERMException):
            exception.code = 1  # Lightning would end as if all were done
        stopped = isinstance(exception, SIGTERMException | KeyboardInterrupt)
        if trainer.is_global_zero and (rows or stopped):
            _log.warning(
                "%d of %d prompts are finished, in %s; resume with the same command and "
                "--ckpt_path last.",
                rows,
                prompts,
                self._path,
            )

    def show(self) -> None:
        """Print the rows of the run, and where they are."""
        rows = read_rows(self._path)
        if rows:
            print_rows(rows)
        print(printable(str(self._path)))

    def _rows(self, trainer: Trainer, module: InputInversion) -> list[ResultRow]:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StoppingCriterion):
                callback.judge(module)  # the rows hold its verdict, whichever callback runs first
        top = module.top_tokens(self.top_k)
        seconds = time.monotonic() - self._batch_began
        verdict = module.verify(top.best) if self.verify else None
        return fitted_rows(module, top, verdict, seconds)

    def _write(
        self, trainer: Trainer, module: InputInversion, rows: list[ResultRow], own: bool = True
    ) -> None:
        """Append what is not there yet, and the prompts that have turned out impossible."""
        data = _data(trainer)
        rows = [row for row in rows if row.index not in self._finished]
        settings = self._settings(trainer, module)
        rows += [
            bad_row(index, data.prompts[index], reason, settings)
            for index, reason in data.bad.items()
            if index not in self._finished
        ]
        for row in rows:
            row.fingerprint = self._fingerprints[row.index]
        self._finished |= {row.index for row in rows}
        if rows and own:
            append_rows(self._path, rows)

    def _settings(self, trainer: Trainer, module: InputInversion) -> dict[str, Any]:
        if trainer.predicting:
            return settings_of_predict(module)
        return settings_of_fit(module, self.top_k)

    def _report_progress(self, trainer: Trainer, batch: PromptBatch) -> None:
        """How many prompts all processes have finished, and how long the others will take."""
        data = _data(trainer)
        todo = [b for b in data.batches if not data.finished.issuperset(b.index)]
        if len(todo) < 2:
            return
        rows = self._count(trainer, "rows", len(batch.index))
        tokens = self._count(trainer, "tokens", batch.size)
        elapsed = time.monotonic() - self._run_began
        left = sum(b.size for b in todo) - tokens
        if left <= 0:
            return
        _log.info(
            "%d of %d prompts, about %s left",
            len(data.finished | set(data.bad)) + rows,
            len(data.prompts),
            readable_time(elapsed * left / tokens),
        )

    def _count(self, trainer: Trainer, key: str, more: int) -> int:
        """What all processes have counted."""
        self._counts[key] += more
        if isinstance(trainer.strategy, IndependentPrompts):
            return trainer.strategy.count(key, more)
        return self._counts[key]


def _final(rows: list[ResultRow]) -> dict[str, float]:
    return {f"final/{name}": value for name, value in mean(rows).items()}


def _data(trainer: Trainer) -> PromptDataModule:
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, PromptDataModule), "ResultWriter needs a PromptDataModule"
    return data
