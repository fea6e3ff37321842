"""Gradient inversion in one call, and what recovered prompts show."""

from __future__ import annotations

import json

import pytest
import torch

from lightning_inversion.api import capture, invert, recover, verify
from lightning_inversion.errors import InputError
from lightning_inversion.inputs import EmbeddingInput, NormalInitializer, VocabularyInput
from lightning_inversion.objectives import L2
from lightning_inversion.schedules import AllPositions
from tests.tiny import shared_tiny_model, tiny_tokenizer

PROMPTS = ["The sky is blue.", "A quick brown fox jumps"]


@pytest.fixture
def captured() -> list[torch.Tensor]:
    return capture(shared_tiny_model("llama"), tiny_tokenizer(), PROMPTS, depth=2)


def test_what_is_captured_is_the_models_own(captured: list[torch.Tensor]) -> None:
    model, tokenizer = shared_tiny_model("llama"), tiny_tokenizer()
    for prompt, rows in zip(PROMPTS, captured, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        own = model(ids, output_hidden_states=True).hidden_states[2][0]
        torch.testing.assert_close(rows, own, atol=1e-5, rtol=1e-5)
    (rounded,) = capture(model, tokenizer, PROMPTS[0], depth=2, store="bfloat16")
    assert rounded.dtype == torch.bfloat16
    with pytest.raises(InputError, match="Prompt 2 is empty"):
        capture(model, tokenizer, ["a", ""], depth=2)
    with pytest.raises(InputError, match="needs the tokenizer"):
        capture(model, None, "a", depth=2)


def test_the_recommended_recipe(captured: list[torch.Tensor]) -> None:
    model, tokenizer = shared_tiny_model("llama"), tiny_tokenizer()
    found = invert(model, tokenizer, captured, depth=2, iterations=40)
    assert found.texts == PROMPTS
    assert found.verified
    assert (
        repr(found[0]) == f"Inverted('The sky is blue.', {found[0].verified_count} tokens verified)"
    )
    for prompt, rows in zip(found, captured, strict=True):
        assert len(prompt.distances) == prompt.iterations
        assert verify(prompt.certificate, model, rows).holds


def test_an_objective_alone_comes_nearer(captured: list[torch.Tensor]) -> None:
    model = shared_tiny_model("llama")
    (found,) = invert(
        model, tiny_tokenizer(), captured[0], depth=2,
        learnable=EmbeddingInput(NormalInitializer(0, 0.1)), objective=L2(),
        schedule=AllPositions(), iterations=15,
    )  # fmt: skip
    assert found.iterations == len(found.distances) == 15
    assert found.distances[-1] < 0.9 * found.distances[0]
    assert found.values.shape == captured[0].shape
    assert json.loads(found.to_json())["iterations"] == 15


def test_parts_that_contradict_are_refused(captured: list[torch.Tensor]) -> None:
    with pytest.raises(InputError, match=r"^schedule VerifiedPrefix fixes embeddings"):
        invert(shared_tiny_model("llama"), None, captured, depth=2, learnable=VocabularyInput())


def test_a_recovery_is_shown_and_kept(captured: list[torch.Tensor]) -> None:
    model, tokenizer = shared_tiny_model("llama"), tiny_tokenizer()
    given = tokenizer(PROMPTS[1])["input_ids"][:2]
    (found,) = recover(model, tokenizer, captured[1], depth=2, known_prefix=given)
    assert found.text == PROMPTS[1]
    assert [token.position for token in found.tokens] == list(range(2, len(found)))
    assert (
        "".join([found.given_text or "", *(token.text or "" for token in found.tokens)])
        == (PROMPTS[1])
    )
    stored = json.loads(found.to_json())
    assert stored["given"] == given
    assert stored["tokens"][0]["state"] == "verified"
    assert stored["tokens"][0]["residual"] <= stored["tokens"][0]["threshold"]
    table = found.to_pandas()
    assert list(table["id"]) == found.ids[2:]
    page, element = found.to_html(), found._repr_html_()
    assert page.startswith("<!doctype html>")
    assert page.count('class="tok v"') > element.count('class="tok v"') >= 1
    assert "<script" not in page + element


def test_text_is_escaped_and_padded_prompts_are_cut(captured: list[torch.Tensor]) -> None:
    model, tokenizer = shared_tiny_model("llama"), tiny_tokenizer()
    rows = capture(model, tokenizer, ["<script>alert(1)</script>", "ab"], depth=2)
    mask = torch.tensor(
        [[1] * len(rows[0]), [1] * len(rows[1]) + [0] * (len(rows[0]) - len(rows[1]))]
    )
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    found = recover(model, tokenizer, padded, depth=2, attention_mask=mask)
    assert found.texts == ["<script>alert(1)</script>", "ab"]
    assert repr(found).startswith("Recoveries(2 prompts, ")
    assert "<script" not in found.to_html() + found._repr_html_()
    assert "&lt;" in found.to_html()
    assert [row["text"] for row in json.loads(found.to_json())] == found.texts
    assert set(found.to_pandas()["prompt"]) == {1, 2}


def test_without_a_tokenizer_tokens_are_shown_by_their_ids(captured: list[torch.Tensor]) -> None:
    model = shared_tiny_model("llama")
    (found,) = recover(model, None, captured[0], depth=2)
    assert found.text is found.tokens[0].text is None
    assert f"[{found.ids[0]}]" in found.to_html()
    assert repr(found).startswith("Recovered(no text, ")
