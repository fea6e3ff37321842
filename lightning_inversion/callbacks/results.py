"""What a run leaves: one whole row a prompt in ``results.jsonl``, a table, metrics, HParams."""

import platform
import sys
import time
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
from lightning_inversion.prompts import PromptBatch
from lightning_inversion.recovery.verification import TOLERANCE, Verdict, verify_text
from lightning_inversion.result_files import Row, append_rows, read_rows

SCHEMA = 1
"""Version of a row's keys."""


class Results(Callback):
    """Writes ``results.jsonl`` in the run's folder when a batch ends, and prints what was read.

    A row is appended whole or not at all, and rows that are there already (of a run that was
    killed and resumed) are not written again.

    Args:
        top_k: how many tokens of each position are kept and counted in top-k accuracy.
        file: name of the file in the run's folder.
    """

    def __init__(self, top_k: int = 5, file: str = "results.jsonl") -> None:
        self.top_k, self.file = top_k, file
        self._began = time.monotonic()

    def path(self, trainer: Trainer) -> Path:
        """Where the rows of this run go."""
        return Path(trainer.log_dir or trainer.default_root_dir) / self.file

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of a batch."""
        self._began = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the rows of the batch that ended."""
        assert isinstance(pl_module, InputInversion)
        rows = self._rows(pl_module)
        path = self.path(trainer)
        finished = {row["index"] for row in read_rows(path)}
        append_rows(path, [row for row in rows if row["index"] not in finished])
        self._log(trainer, rows)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        """Score a stored input."""
        assert isinstance(pl_module, InputInversion)
        rows = self._rows(pl_module)
        self._log(trainer, rows)
        print_rows(rows)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give TensorBoard's HParams the run's settings beside what came of them."""
        assert isinstance(pl_module, InputInversion)
        rows = read_rows(self.path(trainer))
        if rows and isinstance(trainer.logger, TensorBoardLogger):
            settings = {k: v for k, v in describe(pl_module).items() if v is not None}
            trainer.logger.log_hyperparams(
                settings, {f"final/{k}": v for k, v in mean(rows).items()}
            )

    def show(self, trainer: Trainer) -> None:
        """Print every row of the run, and where they are."""
        path = self.path(trainer)
        rows = read_rows(path)
        if rows:
            print_rows(rows)
        print(path)

    def _rows(self, module: InputInversion) -> list[Row]:
        batch = module.batch
        assert batch is not None
        top = module.top_tokens(self.top_k)
        verdict = verify_text(
            module.features_of(module.learnable.encode(top.best, module.embedding)),
            module.target,
            batch.mask,
            module.frozen,
        )
        seconds = time.monotonic() - self._began
        return result_rows(module, batch, top, verdict, seconds)

    def _log(self, trainer: Trainer, rows: list[Row]) -> None:
        if trainer.logger is not None:
            metrics = {f"final/{name}": value for name, value in mean(rows).items()}
            trainer.logger.log_metrics(metrics, trainer.global_step)


def describe(module: InputInversion) -> Row:
    """The settings and versions that made a row, flat."""
    return {
        **module.frozen.description,
        "learnable": type(module.learnable).__name__,
        "start": type(module.learnable.start).__name__,
        "objective": type(module.objective).__name__,
        "decoder": type(module.decoder).__name__ if module.decoder else None,
        "iterations_limit": module.iterations,
        "seed": module.seed,
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
    accuracy = token_accuracy(top.best, batch.ids, batch.mask)
    exact = exact_match(top.best, batch.ids, batch.mask)
    in_top_k = top_k_accuracy(top.ids, batch.ids, batch.mask)
    tokenizer = module.frozen.tokenizer
    rows = []
    for row, length in enumerate(batch.lengths):
        ids = top.best[row, :length].tolist()
        met_at, stopped_at = int(module.progress.met_at[row]), int(module.progress.stopped_at[row])
        ratio = float(module.progress.ratio[row])
        verified = verdict.verified[row, :length].tolist()
        rows.append(
            {
                "schema": SCHEMA,
                "index": batch.index[row],
                "prompt": batch.prompts[row],
                "recovered": tokenizer.decode(ids) if tokenizer else None,
                "recovered_tokens": token_texts(tokenizer, ids) if tokenizer else None,
                "exact": bool(exact[row]),
                "token_accuracy": float(accuracy[row]),
                "top_k": top.ids.shape[-1],
                "top_k_accuracy": float(in_top_k[row]),
                "hamming": 1 - float(in_top_k[row]),
                "verified": all(verified),
                "verified_tokens": sum(verified),
                "unresolved": [t for t, proven in enumerate(verified) if not proven],
                "relative_residuals": [float(r) for r in verdict.residuals[row, :length]],
                "tolerance": TOLERANCE,
                "indistinguishable": [t for t, token in enumerate(ids) if token in twins],
                "distance_ratio": None if ratio != ratio else ratio,  # nan is no JSON
                "criterion_met": met_at >= 0,
                "criterion_met_at": met_at if met_at >= 0 else None,
                "iterations": stopped_at if stopped_at >= 0 else module.iteration + 1,
                "seconds": round(seconds, 3),
                "ids": batch.ids[row, :length].tolist(),
                "recovered_ids": ids,
                "recovered_scores": top.scores[row, :length, 0].tolist(),
                "top_k_ids": top.ids[row, :length].tolist(),
                **shared,
            }
        )
    return rows


def mean(rows: list[Row]) -> dict[str, float]:
    """The run's metrics over its rows, by torchmetrics."""
    # A collection's groups join metrics that agree on the first row, for good: none of these may.
    metrics = {
        "top_1": MetricCollection([TokenAccuracy(), ExactMatch()], compute_groups=False),
        "top_k": MetricCollection([TopKAccuracy(), Hamming()], compute_groups=False),
    }
    for row in rows:
        ids = torch.tensor([row["ids"]])
        mask = torch.ones_like(ids, dtype=torch.bool)
        metrics["top_1"].update(torch.tensor([row["recovered_ids"]]), ids, mask)
        metrics["top_k"].update(torch.tensor([row["top_k_ids"]]), ids, mask)
    ratios = [row["distance_ratio"] for row in rows if row["distance_ratio"] is not None]
    values = {**metrics["top_1"].compute(), **metrics["top_k"].compute()}
    return {
        **{name: float(value) for name, value in values.items()},
        "Verified": sum(row["verified"] for row in rows) / len(rows),
        "Iterations": sum(row["iterations"] for row in rows) / len(rows),
        **({"DistanceRatio": sum(ratios) / len(ratios)} if ratios else {}),
    }


def print_rows(rows: list[Row]) -> None:
    """The recovered texts as a table on stdout; verified tokens green, others red."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("#", "recovered", "right", "verified", "iterations", "ratio"):
        table.add_column(column, justify="left" if column == "recovered" else "right")
    for row in rows:
        count = len(row["recovered_ids"])
        ratio = row["distance_ratio"]
        table.add_row(
            str(row["index"] + 1),
            Text(row["recovered"] or "", style="green" if row["verified"] else "red"),
            f"{round(row['token_accuracy'] * count)}/{count}",
            f"{row['verified_tokens']}/{count}",
            str(row["iterations"]),
            "" if ratio is None else f"{ratio:.2g}",
        )
    console = Console(file=sys.stdout)
    console.print(table)
    averages = mean(rows)
    console.print(
        f"token accuracy {averages['TokenAccuracy']:.3f}, exact {averages['ExactMatch']:.3f}, "
        f"verified {averages['Verified']:.3f} of {len(rows)} prompts"
    )
