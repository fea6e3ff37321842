"""The one call: targets, methods, fallbacks, and what the result says of itself."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lightning_inversion.attribution.attribute import attribute
from lightning_inversion.attribution.config import Choices, Display
from lightning_inversion.attribution.result import AttributionResult
from lightning_inversion.errors import InputError
from lightning_inversion.transformer.truncated import TruncatedTransformer
from tests.attribution.conftest import SENTENCE
from tests.tiny import tiny_model


@pytest.fixture
def run(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast):
    def attribution(text: str = SENTENCE, **choices: object) -> AttributionResult:
        return attribute(llama, tokenizer, text, Choices(**choices))

    return attribution


@pytest.mark.parametrize("method", ["gradient", "occlusion", "combined", "integrated"])
def test_each_method_scores_each_token(run, method: str) -> None:
    result = run(method=method)
    assert result.method == method
    assert result.scores.shape == (1, len(result.ids))
    assert result.scores.isfinite().all()
    assert "".join(result.tokens) == SENTENCE


def test_combined_keeps_its_parts_raw(run) -> None:
    combined, gradient = run(method="combined", weight=0.25), run(method="gradient")
    occluded = run(method="occlusion")
    assert torch.equal(combined.parts["gradient"], gradient.scores)
    assert torch.equal(combined.parts["occlusion"], occluded.scores)
    sizes = [part.scores.abs() / part.scores.abs().max() for part in (occluded, gradient)]
    torch.testing.assert_close(combined.scores, 0.25 * sizes[0] + 0.75 * sizes[1])
    assert not combined.signed


def test_the_prediction_is_the_models_own(run, llama: PreTrainedModel) -> None:
    result = run()
    with torch.no_grad():
        logits = llama(torch.tensor([result.ids])).logits[0, -1]
    assert result.queries[0].token == result.predictions[0].token == int(logits.argmax())
    assert result.predictions[0].probability == pytest.approx(float(logits.softmax(-1).max()))


def test_integrated_gradients_add_up_to_what_replacing_all_tokens_changes(run) -> None:
    # Not the padding of a new Llama, which is 0: after a norm the whole way from 0 is one leap.
    result = run(method="integrated", steps=64, replacement="s")
    assert result.signed
    assert not result.notes  # it would say what is missing
    # The rise of a probability is small; what is missing is compared with it.
    coarse = run(method="integrated", steps=1, replacement="s", scalar="prob")
    (note,) = coarse.notes
    assert note.startswith("Integrated gradients miss ")


@pytest.mark.parametrize("scalar", ["logprob", "prob"])
def test_integrated_gradients_note_what_they_miss_of_the_rise(run, scalar: str) -> None:
    # The probability rises by less than 1e-3, of which a single step misses a large part.
    (note,) = run(method="integrated", steps=1, replacement="s", scalar=scalar, token="e").notes
    assert "raise --steps" in note


def test_a_given_token_and_a_contrast(run) -> None:
    result = run(token="id:70", against="s", method="occlusion")
    assert result.queries[0].token == 70
    assert result.queries[0].against == "s"
    plain = run(token="id:70", method="occlusion", scalar="logit")
    other = run(token="s", method="occlusion", scalar="logit")
    torch.testing.assert_close(result.scores, plain.scores - other.scores, atol=1e-5, rtol=1e-5)


def test_a_map_of_every_token(run) -> None:
    result = run(every_token=True)
    T = len(result.ids)
    assert result.scores.shape == (T, T)
    assert [query.token for query in result.queries[:-1]] == list(result.ids[1:])
    assert result.scores.isnan().equal(torch.ones(T, T, dtype=torch.bool).triu(1))
    torch.testing.assert_close(result.scores[-1], run().scores[0], atol=1e-5, rtol=1e-4)


def test_auto_drops_occlusion_above_its_limit_and_reports_it(run) -> None:
    long = run(occlusion_limit=3)
    assert long.method == "gradient"
    assert "occlusion_limit" in long.notes[0]
    assert run(occlusion_limit=100).method == "combined"


def test_the_number_of_forwards_is_logged_before_they_start(
    run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise InterruptedError

    monkeypatch.setattr("lightning_inversion.attribution.methods.occlusion", stop)
    with caplog.at_level("INFO", "lightning_inversion"), pytest.raises(InterruptedError):
        run(method="occlusion")
    assert f"occlusion: {len(run(method='gradient').ids)} forwards" in caplog.messages[0]


def test_features_of_a_depth(run, llama: PreTrainedModel, tokenizer) -> None:
    whole = run(depth=2)
    assert whole.predictions == ()
    truncated = TruncatedTransformer.from_model(llama, tokenizer, depth=2)
    given = attribute(truncated, tokenizer, SENTENCE, Choices(depth=2))
    torch.testing.assert_close(given.scores, whole.scores)
    assert run(depth=2, every_token=True).scores.shape == (len(whole.ids), len(whole.ids))


def test_enough_probes_give_the_norm_of_the_jacobian_exactly(
    run, llama: PreTrainedModel, tokenizer
) -> None:
    result = run(depth=1, method="gradient", probes=32)
    truncated = TruncatedTransformer.from_model(llama, tokenizer, depth=1)
    embeds = truncated.embedding(torch.tensor([result.ids]))
    jacobian = torch.autograd.functional.jacobian(lambda a: truncated(a)[0, -1], embeds)[:, 0]
    expected = torch.einsum("ftd,td->tf", jacobian, embeds[0]).norm(dim=-1)
    torch.testing.assert_close(result.scores[0], expected, atol=1e-4, rtol=1e-4)
    few = run(depth=1, method="gradient", probes=16).scores[0]
    assert float(torch.corrcoef(torch.stack([few, expected]))[0, 1]) > 0.9


def test_a_replacement_that_the_tokenizer_lacks_falls_back_and_is_reported(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    without_pad = copy.deepcopy(tokenizer)
    without_pad.pad_token = None
    result = attribute(llama, without_pad, SENTENCE, Choices(method="occlusion"))
    assert result.replacement.startswith("eos")
    assert "no pad token" in result.notes[0]


@pytest.mark.parametrize("replacement", ["zero", "s", "id:7", "bos"])
def test_replacements(run, replacement: str) -> None:
    assert run(method="occlusion", replacement=replacement).scores.isfinite().all()


def test_the_original_preset_is_the_choice_of_the_source(run, llama, tokenizer) -> None:
    result = attribute(llama, tokenizer, SENTENCE, preset="original")
    embeds = llama.get_input_embeddings()(torch.tensor([result.ids])).detach().requires_grad_()
    output = llama(inputs_embeds=embeds).logits[:, -1]
    (gradient,) = torch.autograd.grad(output.sum(), embeds)
    torch.testing.assert_close(result.parts["gradient"], (gradient * embeds).abs().sum(-1).detach())
    for token in range(len(result.ids)):
        ids = list(result.ids)
        ids[token] = tokenizer.pad_token_id
        with torch.no_grad():
            distance = (llama(torch.tensor([ids])).logits[:, -1] - output).abs().sum()
        torch.testing.assert_close(result.parts["occlusion"][0, token], distance.detach())
    assert result.display == Display(normalise="minmax", palette="original")
    assert "--preset=original" in result.command
    assert "--scalar" not in result.command


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_low_precision_runs(tokenizer: PreTrainedTokenizerFast, attention: str) -> None:
    model = tiny_model("llama", attention).to(torch.bfloat16)
    low = attribute(model, tokenizer, SENTENCE, Choices(token="s"))
    high = attribute(model.float(), tokenizer, SENTENCE, Choices(token="s"))
    assert low.model["dtype"] == "bfloat16"
    assert float(torch.corrcoef(torch.cat([low.scores, high.scores]))[0, 1]) > 0.95


def test_json_and_records_hold_everything(run) -> None:
    result = run(every_token=True, method="occlusion")
    data = json.loads(result.to_json())
    assert data["scores"][0][1] is None
    assert data["scores"][3][2] == pytest.approx(float(result.scores[3, 2]))
    assert data["choices"]["method"] == "occlusion"
    records = result.to_records()
    T = len(result.ids)
    assert len(records) == T * (T + 1) // 2
    assert records[-1]["score"] == pytest.approx(float(result.scores[-1, -1]))


@pytest.mark.parametrize(
    ("text", "choices", "message"),
    [
        ("", {}, "empty"),
        ("a" * 400, {}, "128"),
        (SENTENCE, {"token": "wipers on"}, "--token"),
        (SENTENCE, {"against": "id:300"}, "--against"),
        (SENTENCE, {"replacement": "two words"}, "--replacement"),
    ],
)
def test_wrong_input_names_the_way_out(run, text: str, choices: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(text, **choices)


def test_no_text_is_refused(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="text is an empty list"):
        attribute(llama, tokenizer, [])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "gpt2"}, "model is a str; give a causal language model of transformers"),
        ({"tokenizer": None}, "tokenizer is a NoneType; give a tokenizer of transformers"),
        ({"text": 3}, "text is a int; give a text, or a list of texts"),
        ({"text": ["a", 3]}, "text is a int; give a text"),
    ],
)
def test_an_argument_of_another_kind_is_refused(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, given: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        attribute(**{"model": llama, "tokenizer": tokenizer, "text": SENTENCE, **given})


def test_scores_that_are_not_finite_are_noted(llama: PreTrainedModel, tokenizer) -> None:
    broken = copy.deepcopy(llama)
    with torch.no_grad():
        broken.lm_head.weight[5] = torch.inf
    result = attribute(broken, tokenizer, SENTENCE)
    T = len(result.ids)
    assert f"{T} of {T} scores are not finite" in result.notes[-1]
    assert json.loads(result.to_json())["scores"] == [[None] * T]
    assert "not finite" in result.to_html()
