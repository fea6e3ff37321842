"""What ``predict`` leaves of each text: its tokens, and a certificate for each, as a flat row."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lightning_inversion.data.batch import PromptBatch
from lightning_inversion.recovery.certificate import RecoveredText
from lightning_inversion.results import Row
from lightning_inversion.transformer.tokens import token_texts

SIGNIFICANT = 4
"""Digits that are kept of residuals, margins and seconds."""


def recovered_rows(
    batch: PromptBatch,
    texts: Sequence[RecoveredText],
    tokenizer: PreTrainedTokenizerBase | None,
    shared: Row,
) -> list[Row]:
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
        known = [True] * len(text.known)
        rows.append(
            {
                "index": batch.index[number],
                "prompt": batch.prompts[number],
                "error": None,
                "recovered": tokenizer.decode(ids) if tokenizer else None,
                "recovered_tokens": token_texts(tokenizer, ids) if tokenizer else None,
                "exact": all(right) if right else None,
                "token_accuracy": sum(right) / len(right) if right else None,
                "verified": text.certified,
                "verified_tokens": sum(token.certified for token in tokens) + len(known),
                "unresolved": [
                    place + len(known) for place, t in enumerate(tokens) if not t.certified
                ],
                "certified": known + [token.certified for token in tokens],
                "token_residuals": [rounded(token.residual) for token in tokens],
                "tolerances": [rounded(token.tolerance) for token in tokens],
                "margins": [rounded(token.margin) for token in tokens],
                "candidates": [token.candidates for token in tokens],
                "orders": [token.order for token in tokens],
                "token_seconds": [rounded(token.seconds) for token in tokens],
                "alternatives": [list(token.alternatives) for token in tokens],
                "indistinguishable": [
                    place + len(known) for place, t in enumerate(tokens) if t.indistinguishable
                ],
                "known_tokens": len(known),
                "forwards": text.forwards,
                "seconds": rounded(text.seconds),
                "ids": truth,
                "recovered_ids": ids,
                **shared,
            }
        )
    return rows


def nothing_recovered(index: int, prompt: str | None, reason: str) -> Row:
    """What the rows of either command say of a prompt that could not be run."""
    return {
        "index": index,
        "prompt": prompt,
        "error": reason,
        "recovered": None,
        "recovered_tokens": None,
        "exact": False,
        "token_accuracy": 0.0,
        "verified": False,
        "verified_tokens": 0,
        "unresolved": [],
        "token_residuals": [],
        "tolerances": [],
        "indistinguishable": [],
        "seconds": 0.0,
        "ids": [],
        "recovered_ids": [],
    }


def bad_recovered_row(index: int, prompt: str | None, reason: str, shared: Row) -> Row:
    """The row of a text that could not be recovered: why, and nothing beside it.

    Args:
        index: of the prompt.
        prompt: its text, if it is known.
        reason: why it could not be run.
        shared: the settings and versions of the run.
    """
    lists = ("certified", "margins", "candidates", "orders", "token_seconds", "alternatives")
    return {
        **nothing_recovered(index, prompt, reason),
        **{key: [] for key in lists},
        "known_tokens": 0,
        "forwards": 0,
        **shared,
    }


def rounded(value: float | None) -> float | None:
    """To a few significant digits: a row is read by people too."""
    return None if value is None else float(f"{value:.{SIGNIFICANT}g}")
