"""Candidates behind a kept prefix equal plain forwards of the whole text, in every family."""

from __future__ import annotations

import pytest
import torch

from lightning_inversion.transformer.known_prefix import KnownPrefix
from lightning_inversion.transformer.surgery import Surgery
from lightning_inversion.transformer.truncated import TruncatedTransformer
from tests.tiny import FAMILIES, VOCABULARY, tiny_model

TEXTS = torch.arange(3 * 7).reshape(3, 7) * 13 % VOCABULARY
OTHERS = torch.arange(3 * 4).reshape(3, 4) * 29 % VOCABULARY


def walked(transformer: TruncatedTransformer, rows: torch.Tensor) -> torch.Tensor:
    """Features of each token of TEXTS, found by keeping one of four candidates at each place.

    Row 1 is left two tokens behind, so that rows of different lengths are run together.
    """
    prefix = KnownPrefix(transformer, len(TEXTS))
    found = torch.zeros(*TEXTS.shape, transformer.feature_size)
    while len(rows):
        at = prefix.lengths[rows]
        right = TEXTS[rows, at]
        ids = OTHERS[rows].clone()
        places = at % ids.shape[1]
        ids[torch.arange(len(rows)), places] = right
        features = prefix.candidates(rows, transformer.embedding(ids))
        found[rows, at] = features[torch.arange(len(rows)), places]
        waits = (rows == 1) & (prefix.lengths[0] < 2)
        prefix.keep(rows, torch.where(waits, -1, places), right)
        rows = rows[prefix.lengths[rows] < TEXTS.shape[1]]
    assert prefix.ids[:, : TEXTS.shape[1]].tolist() == TEXTS.tolist()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_plain_forwards(family: str) -> None:
    transformer = TruncatedTransformer.from_model(tiny_model(family), depth=3)
    found = walked(transformer, torch.arange(3))
    torch.testing.assert_close(found, transformer.features_of(TEXTS), atol=2e-4, rtol=1e-4)


def test_most_families_keep_keys_and_values() -> None:
    kept = {
        family: TruncatedTransformer.from_model(tiny_model(family), depth=2).caches
        for family in ("gpt2", "gptj", "llama", "qwen3", "gemma2", "opt", "bloom")
    }
    assert kept == {**dict.fromkeys(kept, True), "bloom": False}  # ALiBi takes the keys' order


def test_surgery_runs_plainly() -> None:
    first = TruncatedTransformer.from_model(
        tiny_model("llama"), depth=3, surgery=Surgery(repeat_first=True)
    )
    assert not first.caches
    torch.testing.assert_close(
        walked(first, torch.arange(3)), first.features_of(TEXTS), atol=2e-4, rtol=1e-4
    )


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_gradient_of_a_candidate(family: str) -> None:
    transformer = TruncatedTransformer.from_model(tiny_model(family), depth=2)
    prefix = KnownPrefix(transformer, 2)
    prefix.start(TEXTS[:2, :5])
    embeds = transformer.embedding(TEXTS[:2, 5:6]).requires_grad_()
    prefix.candidates(torch.arange(2), embeds).square().sum().backward()
    whole = transformer.embedding(TEXTS[:2, :6]).requires_grad_()
    transformer(whole)[:, 5].square().sum().backward()
    assert embeds.grad is not None
    assert whole.grad is not None
    torch.testing.assert_close(embeds.grad[:, 0], whole.grad[:, 5], atol=1e-5, rtol=1e-4)


def test_rows_can_start_with_known_tokens() -> None:
    transformer = TruncatedTransformer.from_model(tiny_model("llama"), depth=2)
    prefix = KnownPrefix(transformer, 2)
    prefix.start(TEXTS[:2, :3])
    features = prefix.candidates(torch.tensor([1]), transformer.embedding(TEXTS[1:2, 3:4]))
    torch.testing.assert_close(
        features[0, 0], transformer.features_of(TEXTS[1:2, :4])[0, 3], atol=2e-5, rtol=1e-4
    )
