"""What ``fit`` leaves of each prompt, as a flat row; and what made it."""

import math
import platform

import lightning
import torch
import transformers

import lightning_inversion
from lightning_inversion.data.batch import PromptBatch
from lightning_inversion.decoding import TopTokens
from lightning_inversion.files import Record
from lightning_inversion.metrics import exact_match, token_accuracy, top_k_accuracy
from lightning_inversion.module import InputInversion
from lightning_inversion.recovery.verification import Verdict
from lightning_inversion.results import ResultRow
from lightning_inversion.transformer.tokens import token_texts

_NOT_FINITE = (
    "has features that are not finite numbers; set --model.transformer.dtype to float32 or bfloat16"
)


def describe(module: InputInversion) -> Record:
    """The settings and versions that made a row of a fit, flat."""
    return {
        **module.frozen.description,
        "learnable": type(module.learnable).__name__,
        "initializer": type(module.learnable.initializer).__name__,
        "objective": type(module.objective).__name__,
        "decoder": type(module.decoder).__name__ if module.decoder else None,
        "iterations_limit": module.iterations,
        "seed": module.seed,
        **versions(),
    }


def describe_recovery(module: InputInversion) -> Record:
    """The settings and versions that made a row of ``predict``, flat."""
    return {
        "command": "predict",
        **module.frozen.description,
        "policy": module.recovery.name,
        "seed": module.seed,
        **versions(),
    }


def versions() -> Record:
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
) -> list[ResultRow]:
    """One flat row a prompt.

    Args:
        module: the experiment.
        batch: its prompts.
        top: the decoded tokens.
        verdict: of the best tokens, run through the model.
        seconds: wall time of the batch.
    """
    shared = describe(module)
    duplicated = {token for group in module.embedding.duplicates() for token in group}
    tokenizer = module.frozen.tokenizer
    rows = []
    for row, length in enumerate(batch.lengths):
        ids = top.best[row, :length].tolist()
        met_at, stopped_at = int(module.progress.met_at[row]), int(module.progress.stopped_at[row])
        residuals = [finite(r) for r in verdict.residuals[row, :length].tolist()]
        verified = verdict.verified[row, :length].tolist()
        rows.append(
            ResultRow(
                index=batch.index[row],
                prompt=batch.prompts[row],
                error=_NOT_FINITE if None in residuals else None,
                recovered=tokenizer.decode(ids) if tokenizer else None,
                recovered_tokens=token_texts(tokenizer, ids) if tokenizer else None,
                **_scores(batch, top, row),
                top_k=top.ids.shape[-1],
                verified=all(verified),
                verified_tokens=sum(verified),
                token_verified=verified,
                unresolved=[t for t, is_verified in enumerate(verified) if not is_verified],
                token_residuals=residuals,
                thresholds=verdict.thresholds[row, :length].tolist(),
                duplicates=[t for t, token in enumerate(ids) if token in duplicated],
                distance_ratio=finite(float(module.progress.ratio[row])),
                criterion_met=met_at >= 0,
                criterion_met_at=met_at if met_at >= 0 else None,
                iterations=stopped_at if stopped_at >= 0 else module.iteration + 1,
                seconds=round(seconds, 3),
                ids=None if batch.ids is None else batch.ids[row, :length].tolist(),
                recovered_ids=ids,
                recovered_scores=[finite(s) for s in top.scores[row, :length, 0].tolist()],
                top_k_ids=top.ids[row, :length].tolist(),
                **shared,
            )
        )
    return rows


def _scores(batch: PromptBatch, top: TopTokens, row: int) -> Record:
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


def bad_row(index: int, prompt: str | None, reason: str, shared: Record) -> ResultRow:
    """The row of a prompt that could not be run: why, and nothing recovered."""
    return ResultRow(
        index=index, prompt=prompt, error=reason, exact=False, token_accuracy=0.0, **shared
    )


def finite(number: float) -> float | None:
    """The number, or None for what JSON has no number for."""
    return number if math.isfinite(number) else None
