"""Candidates after a kept prefix equal plain forwards of the whole text, in every family."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_inversion.transformer.prefix import FixedPrefix
from lightning_inversion.transformer.truncated import TruncatedTransformer
from tests.architectures import tiny_config
from tests.tiny import CONFIGS, FAMILIES, VOCABULARY, each, shared_tiny_model, tiny_model

TEXTS = torch.arange(3 * 7).reshape(3, 7) * 13 % VOCABULARY
OTHERS = torch.arange(3 * 4).reshape(3, 4) * 29 % VOCABULARY


def walked(transformer: TruncatedTransformer, rows: torch.Tensor) -> torch.Tensor:
    """Features of each token of TEXTS, found by keeping one of four candidates at each position.

    Row 1 is left two tokens behind, so that rows of different lengths are run together.
    """
    prefix = FixedPrefix(transformer, len(TEXTS))
    found = torch.zeros(*TEXTS.shape, transformer.feature_size)
    while len(rows):
        at = prefix.lengths[rows]
        right = TEXTS[rows, at]
        ids = OTHERS[rows].clone()
        slots = at % ids.shape[1]
        ids[torch.arange(len(rows)), slots] = right
        features = prefix.candidates(rows, transformer.embedding(ids))
        found[rows, at] = features[torch.arange(len(rows)), slots]
        waits = (rows == 1) & (prefix.lengths[0] < 2)
        prefix.keep(rows, torch.where(waits, -1, slots))
        rows = rows[prefix.lengths[rows] < TEXTS.shape[1]]
    torch.testing.assert_close(prefix.vectors[:, : TEXTS.shape[1]], transformer.embedding(TEXTS))
    return found


@each(FAMILIES)
def test_equals_plain_forwards(family: str) -> None:
    transformer = TruncatedTransformer.from_model(shared_tiny_model(family), depth=3)
    found = walked(transformer, torch.arange(3))
    torch.testing.assert_close(found, transformer.features_of(TEXTS), atol=2e-4, rtol=1e-4)


def test_most_families_keep_keys_and_values() -> None:
    kept = {
        family: TruncatedTransformer.from_model(shared_tiny_model(family), depth=2).caches
        for family in ("gpt2", "gptj", "llama", "qwen3", "gemma2", "opt", "bloom")
    }
    assert kept == {**dict.fromkeys(kept, True), "bloom": False}  # ALiBi takes the keys' order


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_gradient_of_a_candidate(family: str) -> None:
    transformer = TruncatedTransformer.from_model(shared_tiny_model(family), depth=2)
    prefix = FixedPrefix(transformer, 2)
    prefix.begin(torch.arange(2), transformer.embedding(TEXTS[:2]), torch.tensor([5, 5]))
    embeds = transformer.embedding(TEXTS[:2, 5:6]).requires_grad_()
    prefix.candidates(torch.arange(2), embeds).square().sum().backward()
    whole = transformer.embedding(TEXTS[:2, :6]).requires_grad_()
    transformer(whole)[:, 5].square().sum().backward()
    assert embeds.grad is not None
    assert whole.grad is not None
    torch.testing.assert_close(embeds.grad[:, 0], whole.grad[:, 5], atol=1e-5, rtol=1e-4)


LENGTHS = torch.tensor([3, 0, 5])
SOME = torch.tensor([0, 1, 3])


@each(FAMILIES)
def test_what_follows_is_as_in_the_whole_text(family: str) -> None:
    transformer = TruncatedTransformer.from_model(shared_tiny_model(family), depth=2)
    ids = torch.randint(VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(1))
    vectors = transformer.embedding(ids).requires_grad_()
    whole = transformer(vectors)
    prefix = FixedPrefix(transformer, 4)
    prefix.begin(SOME, vectors[SOME], LENGTHS)

    pick = (SOME[:, None], LENGTHS[:, None] + torch.arange(2))
    after = prefix.followed_by(SOME, vectors[pick])
    torch.testing.assert_close(after, whole[pick], atol=1e-4, rtol=1e-4)
    (expected,) = torch.autograd.grad(whole[pick].square().sum(), vectors)
    (gradient,) = torch.autograd.grad(after.square().sum(), vectors)
    size = float(expected[pick].abs().max())
    torch.testing.assert_close(gradient[pick], expected[pick], atol=1e-4 * size, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_token_can_be_taken_back(family: str) -> None:
    transformer = TruncatedTransformer.from_model(shared_tiny_model(family), depth=2)
    rows = torch.arange(3)
    prefix = FixedPrefix(transformer, 3)
    prefix.begin(rows, transformer.embedding(TEXTS), torch.tensor([2, 3, 4]))
    prefix.candidates(rows[1:], transformer.embedding(OTHERS[1:]))
    prefix.keep(rows[1:], torch.tensor([2, 1]))
    assert prefix.lengths.tolist() == [2, 4, 5]
    prefix.take_back(rows[1:])
    next_ones = TEXTS[rows, [2, 3, 4]]
    features = prefix.candidates(rows, transformer.embedding(next_ones[:, None]))[:, 0]
    expected = transformer.features_of(TEXTS)[rows, [2, 3, 4]]
    torch.testing.assert_close(features, expected, atol=2e-5, rtol=1e-4)


def test_the_same_beginning_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    transformer = TruncatedTransformer.from_model(tiny_model("llama"), depth=2)
    vectors, lengths = transformer.embedding(TEXTS), torch.tensor([3, 3, 2])
    prefix, rows = FixedPrefix(transformer, 3), torch.arange(3)
    prefix.begin(rows, vectors, lengths)
    runs: list[None] = []
    monkeypatch.setattr(transformer, "run", lambda *args: runs.append(None))
    prefix.begin(rows, vectors, lengths)
    assert not runs


@pytest.mark.parametrize(
    ("family", "window"),
    [("mistral", "sliding_window"), ("llama4_text", "attention_chunk_size")],
)
def test_a_prefix_that_outgrows_a_window_is_run_plainly(family: str, window: str) -> None:
    config = tiny_config(family)
    setattr(config, window, 4)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    transformer = TruncatedTransformer.from_model(model, depth=2)
    found = walked(transformer, torch.arange(3))
    torch.testing.assert_close(found, transformer.features_of(TEXTS), atol=2e-4, rtol=1e-4)
    prefix = FixedPrefix(transformer, 3)
    vectors = transformer.embedding(TEXTS)
    prefix.begin(torch.arange(3), vectors, torch.tensor([3, 3, 3]))
    after = prefix.followed_by(torch.arange(3), vectors[:, 3:])
    whole = transformer.features_of(TEXTS)[:, 3:]
    torch.testing.assert_close(after, whole, atol=2e-4, rtol=1e-4)


def test_a_tree_that_is_too_wide_leaves_what_is_kept() -> None:
    config = CONFIGS["gpt2"]()
    config.n_positions = 16  # the causal mask's size: candidates side by side count one by one
    model = AutoModelForCausalLM.from_config(config).eval()
    transformer = TruncatedTransformer.from_model(model, depth=2)
    prefix, rows = FixedPrefix(transformer, 3), torch.arange(3)
    prefix.begin(rows, transformer.embedding(TEXTS), torch.tensor([3, 3, 2]))
    assert not prefix.reaches(rows, 8, 2)
    assert prefix.reaches(rows, 4, 2)


@pytest.mark.parametrize(("family", "limit"), [("gpt2", "n_positions"), ("gpt_neo", "window_size")])
def test_more_candidates_than_a_mask_has_room_for(family: str, limit: str) -> None:
    """They come in several forwards, and any of them can be kept."""
    config = CONFIGS[family]()
    setattr(config, limit, 8)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    transformer = TruncatedTransformer.from_model(model, depth=2)
    assert transformer.caches
    prefix, rows = FixedPrefix(transformer, 3), torch.arange(3)
    vectors = transformer.embedding(TEXTS)
    prefix.begin(rows, vectors, torch.tensor([3, 3, 2]))
    ids = torch.arange(3 * 12).reshape(3, 12) * 7
    ids[rows, 11 - 3 * rows] = TEXTS[rows, prefix.lengths]
    found = prefix.candidates(rows, transformer.embedding(ids))
    whole = transformer.features_of(TEXTS)
    torch.testing.assert_close(
        found[rows, 11 - 3 * rows], whole[rows, prefix.lengths], atol=2e-4, rtol=1e-4
    )
    prefix.keep(rows, 11 - 3 * rows)
    after = prefix.candidates(rows, vectors[rows, prefix.lengths][:, None])[:, 0]
    torch.testing.assert_close(after, whole[rows, prefix.lengths], atol=2e-4, rtol=1e-4)
