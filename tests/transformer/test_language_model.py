"""Text of a model's own, kept by its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_inversion.transformer.language_model import (
    LanguageModel,
    own_text,
    weights_checksum,
)
from tests.tiny import VOCABULARY, tiny_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIGHTNING_INVERSION_CACHE", str(tmp_path))
    return tmp_path


def texts_in(cache: Path) -> list[Path]:
    return sorted(cache.glob("measured/OwnText-*.safetensors"))


def test_a_fine_tuned_model_has_a_text_of_its_own(cache: Path) -> None:
    base, tuned = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        tuned.base_model.layers[3].mlp.down_proj.weight[5, 7] += 1e-3
    assert torch.equal(*(m.get_input_embeddings().weight for m in (base, tuned)))
    first = own_text(LanguageModel(base, caches=True), rows=3, length=8)
    again = own_text(LanguageModel(tiny_model("llama"), caches=True), rows=3, length=8)
    assert torch.equal(first, again)
    assert len(texts_in(cache)) == 1
    own_text(LanguageModel(tuned, caches=True), rows=3, length=8)
    assert len(texts_in(cache)) == 2
    assert first.shape == (3, 8)
    assert int(first.max()) < VOCABULARY


@pytest.mark.parametrize("content", [b"", b"not a tensor", None])
def test_a_damaged_text_is_sampled_again(cache: Path, content: bytes | None) -> None:
    model = LanguageModel(tiny_model("llama"), caches=True)
    text = own_text(model, rows=3, length=8).clone()  # not a view of the file
    (file,) = texts_in(cache)
    file.write_bytes(file.read_bytes()[:-8] if content is None else content)
    assert torch.equal(own_text(model, rows=3, length=8), text)
    assert len(texts_in(cache)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_checksum_is_of_every_weight(dtype: torch.dtype) -> None:
    module = torch.nn.Module()
    memory = torch.arange(24).to(dtype)
    module.register_buffer("weight", memory[1:22].view(3, 7))  # 21 entries, not aligned
    before = weights_checksum(module)
    module.register_buffer("weight", memory[1:22].clone().view(3, 7))
    assert weights_checksum(module) == before
    for place in (0, 10, 20):
        module.weight.view(-1)[place] += 1
        assert weights_checksum(module) != before
        module.weight.view(-1)[place] -= 1
    long = torch.arange(300_000).to(dtype)
    sums = []
    for order in (slice(None), torch.arange(300_000).roll(8)):
        module.register_buffer("weight", long[order].clone())
        sums.append(weights_checksum(module))
    assert sums[0] != sums[1]
    module.register_buffer("weight", memory[1:22].clone().view(7, 3))
    assert weights_checksum(module) != before


def test_a_head_for_fewer_tokens_gives_the_others_no_probability() -> None:
    model = tiny_model("llama")
    model.lm_head = torch.nn.Linear(32, VOCABULARY - 10)
    language_model = LanguageModel(model, caches=True)
    scores = language_model.log_probabilities(torch.tensor([[5, 9, 77]]))
    assert scores.shape == (1, 3, VOCABULARY)
    assert torch.isneginf(scores[..., -10:]).all()
    torch.testing.assert_close(scores.exp().sum(-1), torch.ones(1, 3))
    assert int(language_model.sample_text(2, 8).max()) < VOCABULARY


def test_a_model_that_takes_no_cache_writes_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    language_model = LanguageModel(tiny_model("llama"), caches=True)
    assert language_model._continues()
    kept = language_model.sample_text(3, 8)
    monkeypatch.setattr(language_model, "_own_cache", lambda: object())
    assert not language_model._continues()
    assert torch.equal(language_model.sample_text(3, 8), kept)
