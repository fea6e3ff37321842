"""What ``predict`` leaves of each text: its tokens, and a certificate for each, as a flat row."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lightning_inversion.data.batch import PromptBatch
from lightning_inversion.files import Record
from lightning_inversion.recovery.certificate import RecoveredPrompt
from lightning_inversion.results import ResultRow
from lightning_inversion.transformer.tokens import token_texts

SIGNIFICANT = 4
"""Digits that are kept of residuals, margins and seconds."""


def recovered_rows(
    batch: PromptBatch,
    texts: Sequence[RecoveredPrompt],
    tokenizer: PreTrainedTokenizerBase | None,
    shared: Record,
) -> list[ResultRow]:
    """One flat row a text, lists with one entry a token where a fit's row has them too.

    Args:
        batch: the prompts, known or not.
        texts: what was recovered of them.
        tokenizer: to write the texts out.
        shared: the settings and versions that made them.
    """
    rows = []
    for number, text in enumerate(texts):
        ids, tokens, length = text.ids, text.tokens, batch.lengths[number]
        truth = None if batch.ids is None else batch.ids[number, :length].tolist()
        right = [ours == theirs for ours, theirs in zip(ids, truth or (), strict=truth is not None)]
        known = len(text.known)
        given: list[float | None] = [None] * known
        rows.append(
            ResultRow(
                index=batch.index[number],
                prompt=batch.prompts[number],
                recovered=tokenizer.decode(ids) if tokenizer else None,
                recovered_tokens=token_texts(tokenizer, ids) if tokenizer else None,
                exact=all(right) if right else None,
                token_accuracy=sum(right) / len(right) if right else None,
                verified=text.verified,
                verified_tokens=sum(token.verified for token in tokens),
                token_verified=[False] * known + [token.verified for token in tokens],
                unresolved=[
                    position + known for position, t in enumerate(tokens) if not t.verified
                ],
                token_residuals=given + [rounded(token.residual) for token in tokens],
                thresholds=given + [rounded(token.threshold) for token in tokens],
                margins=given + [rounded(token.margin) for token in tokens],
                candidates=[0] * known + [token.candidates for token in tokens],
                proposers=["given"] * known + [token.order for token in tokens],
                token_seconds=[0.0] * known + [round(token.seconds, 4) for token in tokens],
                alternatives=[[] for _ in range(known)] + [list(t.alternatives) for t in tokens],
                duplicates=[position + known for position, t in enumerate(tokens) if t.duplicates],
                known_tokens=known,
                forwards=text.forwards,
                seconds=round(text.seconds, 4),
                ids=truth,
                recovered_ids=ids,
                **shared,
            )
        )
    return rows


def rounded(value: float | None) -> float | None:
    """To a few significant digits: a row is read by people too."""
    return None if value is None else float(f"{value:.{SIGNIFICANT}g}")
