"""What a batch leaves of each prompt, as rows of ``results.jsonl``."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import lightning_inversion
from lightning_inversion.data.batch import PromptBatch
from lightning_inversion.data.storage import Storage
from lightning_inversion.decoding import TopTokens
from lightning_inversion.metrics import exact_match, token_accuracy, top_k_accuracy
from lightning_inversion.module import InputInversion
from lightning_inversion.recovery.policy import RecoveredPrompt
from lightning_inversion.results import ResultRow
from lightning_inversion.transformer.embedding import TokenEmbedding
from lightning_inversion.transformer.tokens import decoded, is_text_of, token_texts
from lightning_inversion.verification.certificate import Certificate
from lightning_inversion.verification.judgement import Verdict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SIGNIFICANT = 4
"""Digits that are kept of residuals and margins."""
_NOT_FINITE = (
    "has features that are not finite numbers; set --model.transformer.dtype to float32 or bfloat16"
)


def settings_of_fit(module: InputInversion, top_k: int) -> dict[str, Any]:
    """The settings and versions that made a row of a fit."""
    return {**_of_target(module), **options_of_fit(module, top_k), **_versions()}


def options_of_fit(module: InputInversion, top_k: int) -> dict[str, Any]:
    """The settings of a fit beside those of the model."""
    return {
        "command": "fit",
        "learnable": type(module.learnable).__name__,
        "initializer": type(module.learnable.initializer).__name__,
        "objective": type(module.objective).__name__,
        "decoder": type(module.decoder).__name__ if module.decoder else None,
        "schedule": type(module.schedule).__name__,
        "iterations_limit": module.iterations,
        "top_k": top_k,
        "seed": module.seed,
    }


def settings_of_predict(module: InputInversion) -> dict[str, Any]:
    """The settings and versions that made a row of ``predict``."""
    return {**_of_target(module), **options_of_predict(module), **_versions()}


def options_of_predict(module: InputInversion) -> dict[str, Any]:
    """The settings of ``predict`` beside those of the model."""
    return {"command": "predict", "policy": module.recovery.name, "seed": module.seed}


def _of_target(module: InputInversion) -> dict[str, Any]:
    """What the features are of, and what happened to them since."""
    stored = module.channel.summary if isinstance(module.channel, Storage) else None
    return {**module.frozen.description, "storage": stored}


def _versions() -> dict[str, str]:
    """The packages that a result may depend on."""
    packages = ("torch", "lightning", "transformers")
    return {
        "version": lightning_inversion.__version__,
        **{f"version_{name}": version(name) for name in packages},
        "version_python": platform.python_version(),
    }


def fitted_rows(
    module: InputInversion, top: TopTokens, verdict: Verdict | None, seconds: float
) -> list[ResultRow]:
    """The rows of a batch that was optimised.

    Args:
        module: the experiment, with the batch's state.
        top: the decoded tokens.
        verdict: of the best tokens, run through the model; None where they were not compared.
        seconds: wall time of the batch.
    """
    state, batch = module.state, module.state.batch
    shared = settings_of_fit(module, top.ids.shape[-1])
    duplicated = _duplicated(module.embedding)
    tokenizer = module.frozen.tokenizer
    rows = []
    for row, length in enumerate(batch.lengths):
        ids = top.best[row, :length].tolist()
        met_at, stopped_at = int(state.criterion_met_at[row]), int(state.stopped_at[row])
        rows.append(
            ResultRow(
                index=batch.index[row],
                prompt=batch.prompts[row],
                recovered=None if tokenizer is None else decoded(tokenizer, ids),
                recovered_tokens=token_texts(tokenizer, ids) if tokenizer else None,
                same_text=_same_text(tokenizer, ids, batch.prompts[row]),
                **_scores(batch, top, row),
                **_shown(verdict, row, len(batch.known_prefix), length),
                duplicates=[t for t, token in enumerate(ids) if token in duplicated],
                known_tokens=len(batch.known_prefix),
                distance_ratio=finite(float(state.ratio[row])),
                criterion_met=met_at >= 0,
                criterion_met_at=met_at if met_at >= 0 else None,
                iterations=stopped_at if stopped_at >= 0 else state.iteration + 1,
                seconds=round(seconds, 3),
                ids=None if batch.ids is None else batch.ids[row, :length].tolist(),
                recovered_ids=ids,
                recovered_scores=[finite(s) for s in top.scores[row, :length, 0].tolist()],
                top_k_ids=top.ids[row, :length].tolist(),
                **shared,
            )
        )
    return rows


def _shown(verdict: Verdict | None, row: int, known: int, length: int) -> dict[str, Any]:
    """What comparing a row's tokens with the target has shown; nothing where they were not."""
    if verdict is None:
        return {}
    residuals = [finite(r) for r in verdict.residuals[row, :length].tolist()]
    verified = [False] * known + verdict.verified[row, known:length].tolist()
    states = [verdict.state(row, position) for position in range(known, length)]
    return {
        "error": _NOT_FINITE if None in residuals else None,
        "verified": all(verified[known:]),
        "verified_tokens": sum(verified),
        "token_verified": verified,
        "token_states": ["given"] * known + states,
        "unresolved": [t for t in range(known, length) if not verified[t]],
        "token_residuals": residuals,
        "thresholds": [finite(t) for t in verdict.thresholds[row, :length].tolist()],
    }


def _duplicated(embedding: TokenEmbedding) -> set[int]:
    return {token for group in embedding.duplicates() for token in group}


def _scores(batch: PromptBatch, top: TopTokens, row: int) -> dict[str, Any]:
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


def _same_text(
    tokenizer: PreTrainedTokenizerBase | None, ids: Sequence[int], prompt: str | None
) -> bool | None:
    if tokenizer is None or prompt is None:
        return None
    return is_text_of(tokenizer, ids, prompt)


def recovered_rows(
    batch: PromptBatch,
    prompts: Sequence[RecoveredPrompt],
    tokenizer: PreTrainedTokenizerBase | None,
    embedding: TokenEmbedding,
    shared: dict[str, Any],
) -> list[ResultRow]:
    """The rows of a batch that ``predict`` has recovered.

    Args:
        batch: the batch, whose prompts may be known or not.
        prompts: what was recovered of them.
        tokenizer: decodes the tokens; None where the model has none.
        embedding: of the model.
        shared: the settings and versions that made them.
    """
    rows = []
    duplicated = _duplicated(embedding)
    for number, prompt in enumerate(prompts):
        if not prompt.finite:
            rows.append(bad_row(batch.index[number], batch.prompts[number], _NOT_FINITE, shared))
            continue
        ids, tokens, length = prompt.ids, prompt.tokens, batch.lengths[number]
        truth = None if batch.ids is None else batch.ids[number, :length].tolist()
        right = [ours == theirs for ours, theirs in zip(ids, truth or (), strict=False)]
        if truth is not None and len(ids) != len(truth):  # a policy may not know the length
            right = [False] * len(truth)
        known = len(prompt.known)
        given: list[float | None] = [None] * known
        rows.append(
            ResultRow(
                index=batch.index[number],
                prompt=batch.prompts[number],
                recovered=None if tokenizer is None else decoded(tokenizer, ids),
                recovered_tokens=token_texts(tokenizer, ids) if tokenizer else None,
                exact=all(right) if right else None,
                same_text=_same_text(tokenizer, ids, batch.prompts[number]),
                token_accuracy=sum(right) / len(right) if right else None,
                verified=prompt.verified,
                verified_tokens=sum(token.verified for token in tokens),
                token_verified=[False] * known + [token.verified for token in tokens],
                token_states=["given"] * known + [token.state for token in tokens],
                unresolved=[
                    position + known for position, t in enumerate(tokens) if not t.verified
                ],
                token_residuals=given + [rounded(token.residual) for token in tokens],
                thresholds=given + [rounded(token.threshold) for token in tokens],
                margins=given + [rounded(token.margin) for token in tokens],
                risks=given + [token.risk for token in tokens],
                probabilities=given + [rounded(token.probability) for token in tokens],
                rivals=[*([None] * known), *(token.rival for token in tokens)],
                candidates=[0] * known + [token.compared for token in tokens],
                proposers=["given"] * known + [token.proposer for token in tokens],
                token_seconds=[0.0] * known + [round(token.seconds, 4) for token in tokens],
                alternatives=[[] for _ in range(known)] + [list(t.alternatives) for t in tokens],
                refuted=[[] for _ in range(known)] + [list(t.refuted) for t in tokens],
                duplicates=[position for position, id in enumerate(ids) if id in duplicated],
                known_tokens=known,
                order=list(prompt.order),
                forwards=prompt.forwards,
                seconds=round(prompt.seconds, 4),
                ids=truth,
                recovered_ids=ids,
                **shared,
            )
        )
    return rows


def hypothesis(module: InputInversion) -> Certificate:
    """What the certificates of the rows of a ``predict`` rest on: one without tokens."""
    storage = module.channel if isinstance(module.channel, Storage) else Storage()
    return Certificate.of((), (), module.measurements, asdict(storage), module.recovery.rows)


def bad_row(index: int, prompt: str | None, reason: str, shared: dict[str, Any]) -> ResultRow:
    """The row of a prompt that could not be run: why, and nothing recovered."""
    return ResultRow(
        index=index, prompt=prompt, error=reason, exact=False, token_accuracy=0.0, **shared
    )


def finite(number: float) -> float | None:
    """The number, or None for what JSON has no number for."""
    return number if math.isfinite(number) else None


def rounded(value: float | None) -> float | None:
    """To a few significant digits; None for what JSON has no number for."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{_SIGNIFICANT}g}")
