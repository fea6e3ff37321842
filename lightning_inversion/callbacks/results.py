"""What a run leaves: one whole row a prompt in ``results.jsonl``, a table, metrics, HParams."""

import math
import platform
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torchmetrics import MetricCollection

import lightning_inversion
from lightning_inversion.attribution.tokens import token_texts
from lightning_inversion.callbacks.recovered_rows import recovered_rows
from lightning_inversion.decoding import TopTokens
from lightning_inversion.metrics import (
    ExactMatch,
    Hamming,
    TokenAccuracy,
    TopKAccuracy,
    exact_match,
    token_accuracy,
    top_k_accuracy,
)
from lightning_inversion.module import InputInversion
from lightning_inversion.prompts import PromptBatch, PromptDataModule
from lightning_inversion.recovery.verification import Verdict, verify_text
from lightning_inversion.result_files import Row, append_rows, read_rows, settle_rows
from lightning_inversion.strategy import ROWS_ARE_WRITTEN, IndependentPrompts

SCHEMA = 3
"""Version of a row's keys."""

_NOT_FINITE = (
    "has features that are not finite numbers; set --model.transformer.dtype to float32 or bfloat16"
)


class Results(Callback):
    """Writes ``results.jsonl`` in the run's folder when a batch ends, and prints what was read.

    A row is appended whole or not at all, and rows that are there already (of a run that was
    killed and resumed) are not written again. A prompt that could not be run has a row too, which
    says why. When the run ends the rows of all processes are put in the order of the prompts.

    Args:
        top_k: how many tokens of each position are kept and counted in top-k accuracy.
        file: name of the file in the run's folder.
    """

    def __init__(self, top_k: int = 5, file: str = "results.jsonl") -> None:
        self.top_k, self.file = top_k, file
        self._path = Path(file)
        self._finished: set[int] = set()
        self._counts: Counter[str] = Counter()
        self._began = self._began_run = time.monotonic()

    def path(self, trainer: Trainer) -> Path:
        """Where the rows of this run go. Every process must ask, or none."""
        return Path(trainer.log_dir or trainer.default_root_dir) / self.file

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell the data which rows are there already."""
        self._path = self.path(trainer)
        if stage != "validate":
            self._finished = {row["index"] for row in read_rows(self._path)}
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
        self._log(trainer, rows)
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
        shared = {"schema": SCHEMA, "command": "predict", **describe_recovery(pl_module)}
        rows = recovered_rows(batch, outputs, tokenizer, shared)
        self._write(trainer, pl_module, rows)
        self._log(trainer, rows)
        self._say_how_far(trainer, batch)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        """Score a stored input."""
        assert isinstance(pl_module, InputInversion)
        rows = self._rows(pl_module)
        self._log(trainer, rows)
        print_rows(rows)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gather the rows; give TensorBoard's HParams the settings beside what came of them."""
        assert isinstance(pl_module, InputInversion)
        if stage == "validate":
            return
        trainer.strategy.barrier(ROWS_ARE_WRITTEN)
        if not trainer.is_global_zero:
            return
        rows = settle_rows(self._path)
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
        if trainer.is_global_zero and rows:
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
        self, trainer: Trainer, module: InputInversion, rows: list[Row], own: bool = True
    ) -> None:
        """Append what is not there yet, and what has been found impossible meanwhile."""
        data = _data(trainer)
        rows = [row for row in rows if row["index"] not in self._finished]
        bad = [index for index in data.bad if index not in self._finished]
        rows += [bad_row(module, index, data.texts[index], data.bad[index]) for index in bad]
        self._finished |= {row["index"] for row in rows}
        if rows and own:
            append_rows(self._path, rows)

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

    def _rows(self, module: InputInversion) -> list[Row]:
        batch = module.batch
        assert batch is not None
        top = module.top_tokens(self.top_k)
        verdict = verify_text(
            module.features_of_tokens(top.best),
            module.target,
            batch.mask,
            module.instruments,
        )
        seconds = time.monotonic() - self._began
        return result_rows(module, batch, top, verdict, seconds)

    def _log(self, trainer: Trainer, rows: list[Row]) -> None:
        if trainer.logger is not None:
            metrics = {f"final/{name}": value for name, value in mean(rows).items()}
            trainer.logger.log_metrics(metrics, trainer.global_step)


def _has_data(trainer: Trainer) -> bool:
    return isinstance(trainer.datamodule, PromptDataModule)  # type: ignore[attr-defined]


def _data(trainer: Trainer) -> PromptDataModule:
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, PromptDataModule), "Results needs a PromptDataModule"
    return data


def readable_time(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def describe(module: InputInversion) -> Row:
    """The settings and versions that made a row of a fit, flat."""
    return {
        **module.frozen.description,
        "learnable": type(module.learnable).__name__,
        "start": type(module.learnable.start).__name__,
        "objective": type(module.objective).__name__,
        "decoder": type(module.decoder).__name__ if module.decoder else None,
        "iterations_limit": module.iterations,
        "seed": module.seed,
        **versions(),
    }


def describe_recovery(module: InputInversion) -> Row:
    """The settings and versions that made a row of ``predict``, flat."""
    return {
        **module.frozen.description,
        "policy": module.recovery.name,
        "seed": module.seed,
        **versions(),
    }


def versions() -> Row:
    """Of what a result may depend on."""
    return {
        "version": lightning_inversion.__version__,
        "version_torch": torch.__version__,
        "version_lightning": lightning.__version__,
        "version_transformers": transformers.__version__,
        "version_python": platform.python_version(),
    }


def result_rows(
    module: InputInversion, batch: PromptBatch, top: TopTokens, verdict: Verdict, seconds: float
) -> list[Row]:
    """One flat row a prompt.

    Args:
        module: the experiment.
        batch: its prompts.
        top: the decoded tokens.
        verdict: of the best tokens, run through the model.
        seconds: wall time of the batch.
    """
    shared = describe(module)
    twins = {token for group in module.embedding.duplicates() for token in group}
    tokenizer = module.frozen.tokenizer
    rows = []
    for row, length in enumerate(batch.lengths):
        ids = top.best[row, :length].tolist()
        met_at, stopped_at = int(module.progress.met_at[row]), int(module.progress.stopped_at[row])
        residuals = [finite(r) for r in verdict.residuals[row, :length].tolist()]
        verified = verdict.verified[row, :length].tolist()
        rows.append(
            {
                "schema": SCHEMA,
                "index": batch.index[row],
                "prompt": batch.prompts[row],
                "error": _NOT_FINITE if None in residuals else None,
                "recovered": tokenizer.decode(ids) if tokenizer else None,
                "recovered_tokens": token_texts(tokenizer, ids) if tokenizer else None,
                **_scores(batch, top, row),
                "top_k": top.ids.shape[-1],
                "verified": all(verified),
                "verified_tokens": sum(verified),
                "unresolved": [t for t, proven in enumerate(verified) if not proven],
                "token_residuals": residuals,
                "tolerances": verdict.tolerances[row, :length].tolist(),
                "indistinguishable": [t for t, token in enumerate(ids) if token in twins],
                "distance_ratio": finite(float(module.progress.ratio[row])),
                "criterion_met": met_at >= 0,
                "criterion_met_at": met_at if met_at >= 0 else None,
                "iterations": stopped_at if stopped_at >= 0 else module.iteration + 1,
                "seconds": round(seconds, 3),
                "ids": None if batch.ids is None else batch.ids[row, :length].tolist(),
                "recovered_ids": ids,
                "recovered_scores": [finite(s) for s in top.scores[row, :length, 0].tolist()],
                "top_k_ids": top.ids[row, :length].tolist(),
                **shared,
            }
        )
    return rows


def _scores(batch: PromptBatch, top: TopTokens, row: int) -> Row:
    """How much of a row is right; None where its prompt is not known."""
    if batch.ids is None:
        return dict.fromkeys(("exact", "token_accuracy", "top_k_accuracy", "hamming"))
    here = slice(row, row + 1)
    ids, mask = batch.ids[here], batch.mask[here]
    in_top_k = float(top_k_accuracy(top.ids[here], ids, mask))
    return {
        "exact": bool(exact_match(top.best[here], ids, mask)),
        "token_accuracy": float(token_accuracy(top.best[here], ids, mask)),
        "top_k_accuracy": in_top_k,
        "hamming": 1 - in_top_k,
    }


def bad_row(module: InputInversion, index: int, prompt: str | None, reason: str) -> Row:
    """The row of a prompt that could not be run: why, and nothing recovered."""
    nothing = {"exact": False, "token_accuracy": 0.0, "verified": False, "verified_tokens": 0}
    empty: Row = {key: [] for key in ("ids", "recovered_ids", "recovered_scores", "top_k_ids")}
    return {
        "schema": SCHEMA, "index": index, "prompt": prompt, "error": reason, "recovered": None,
        **nothing, "iterations": 0, "seconds": 0.0, **empty, **describe(module),
    }  # fmt: skip


def finite(number: float) -> float | None:
    """The number, or None for what JSON has no number for."""
    return number if math.isfinite(number) else None


def mean(rows: list[Row]) -> dict[str, float]:
    """The run's metrics over the rows that could be run, by torchmetrics; {} where none could.

    Those that compare with the prompt are over the rows whose prompt is known, if any.
    """
    rows = [row for row in rows if row["recovered_ids"]]
    if not rows:
        return {}
    averages = _right(rows)
    averages["Verified"] = sum(row["verified"] for row in rows) / len(rows)
    for name, key in (("Iterations", "iterations"), ("DistanceRatio", "distance_ratio")):
        numbers = [row[key] for row in rows if row.get(key) is not None]
        if numbers:
            averages[name] = sum(numbers) / len(numbers)
    tried = [number for row in rows for number in row.get("candidates", ())]
    if tried:
        averages["Candidates"] = sum(tried) / len(tried)
    return averages


def _right(rows: list[Row]) -> dict[str, float]:
    rows = [row for row in rows if row["ids"]]
    if not rows:
        return {}
    # A collection's groups join metrics that agree on the first row, for good: none of these may.
    top_1 = MetricCollection([TokenAccuracy(), ExactMatch()], compute_groups=False)
    top_k = MetricCollection([TopKAccuracy(), Hamming()], compute_groups=False)
    for row in rows:
        ids = torch.tensor([row["ids"]])
        mask = torch.ones_like(ids, dtype=torch.bool)
        top_1.update(torch.tensor([row["recovered_ids"]]), ids, mask)
        if "top_k_ids" in row:
            top_k.update(torch.tensor([row["top_k_ids"]]), ids, mask)
    values = {**top_1.compute(), **(top_k.compute() if "top_k_ids" in rows[0] else {})}
    return {name: float(value) for name, value in values.items()}


def print_rows(rows: list[Row]) -> None:
    """The recovered texts as a table on stdout; verified tokens green, others red."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    predicted = "candidates" in rows[0]
    effort = ("candidates", "seconds") if predicted else ("iterations", "ratio")
    for column in ("#", "recovered", "right", "verified", *effort):
        table.add_column(column, justify="left" if column == "recovered" else "right")
    for row in rows:
        count = len(row["recovered_ids"])
        if row["error"]:
            table.add_row(str(row["index"] + 1), Text(row["error"], style="red"))
            continue
        if predicted:
            spent = (str(sum(row["candidates"])), f"{row['seconds']:.1f}")
        else:
            ratio = row["distance_ratio"]
            spent = (str(row["iterations"]), "" if ratio is None else f"{ratio:.2g}")
        table.add_row(
            str(row["index"] + 1),
            Text(row["recovered"] or "", style="green" if row["verified"] else "red"),
            _of(row["token_accuracy"], count),
            f"{row['verified_tokens']}/{count}",
            *spent,
        )
    console = Console(file=sys.stdout)
    console.print(table)
    averages = mean(rows)
    if not averages:
        return
    right = (
        f"token accuracy {averages['TokenAccuracy']:.3f}, exact {averages['ExactMatch']:.3f}, "
        if "TokenAccuracy" in averages
        else ""
    )
    console.print(f"{right}verified {averages['Verified']:.3f} of {len(rows)} prompts")


def _of(share: float | None, count: int) -> str:
    return "not known" if share is None else f"{round(share * count)}/{count}"
