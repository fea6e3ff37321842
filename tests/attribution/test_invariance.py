"""The numbers depend neither on batches, nor on padding, nor on what is cached, nor on the call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig, PreTrainedModel

from lightning_inversion.attribution.gradient import gradient_times_input
from lightning_inversion.attribution.model import LogitReader, check_gradients, undisturbed
from lightning_inversion.attribution.occlusion import clean_pass, occlusion
from lightning_inversion.attribution.scores import TokenMeasure
from lightning_inversion.errors import InputError
from tests.tiny import FAMILIES, tiny_model

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def measure(tokens: Tensor) -> TokenMeasure:
    return TokenMeasure(tokens, None, "logprob", "drop")


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prefix_gives_the_plain_scores(family: str, ids: Tensor) -> None:
    reader = LogitReader(tiny_model(family))
    embeds = reader.embed(ids)
    at = torch.tensor([11, len(ids) - 1])
    measured, replacement = measure(torch.tensor([4, 9])), embeds[0]
    shared, plain = clean_pass(reader, embeds, at), clean_pass(reader, embeds, at, share=False)
    assert shared.prefix is not None, shared.why_plain
    assert plain.prefix is None

    ours = occlusion(reader, embeds, at, measured, replacement, clean=shared)
    whole = occlusion(reader, embeds, at, measured, replacement, clean=plain)
    torch.testing.assert_close(ours, whole, equal_nan=True, **CLOSE)


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_batch_size(model: PreTrainedModel, ids: Tensor, rows: int) -> None:
    reader = LogitReader(model)
    embeds, at = reader.embed(ids), torch.arange(len(ids))
    measured, replacement = measure(ids.roll(-1)), embeds[0]
    for method in (
        lambda size: occlusion(reader, embeds, at, measured, replacement, size),
        # Rows of every length together: those that are shorter are padded.
        lambda size: gradient_times_input(reader, embeds, at, measured, "l1", size),
    ):
        torch.testing.assert_close(method(rows), method(None), equal_nan=True, **CLOSE)


def test_every_position_at_once_is_each_text_alone(model: PreTrainedModel, ids: Tensor) -> None:
    reader = LogitReader(model)
    embeds, targets, replacement = reader.embed(ids), ids.roll(-1), reader.embed(ids[:1])[0]
    at = torch.arange(len(ids))
    occluded = occlusion(reader, embeds, at, measure(targets), replacement)
    gradient = gradient_times_input(reader, embeds, at, measure(targets))
    for last in (0, 9, len(ids) - 1):
        text, end = embeds[: last + 1], torch.tensor([last])
        alone = measure(targets[last : last + 1])
        expected = occlusion(reader, text, end, alone, replacement)[0]
        torch.testing.assert_close(occluded[last, : last + 1], expected, **CLOSE)
        expected = gradient_times_input(reader, text, end, alone)[0]
        torch.testing.assert_close(gradient[last, : last + 1], expected, **CLOSE)
        assert occluded[last, last + 1 :].isnan().all()
        assert gradient[last, last + 1 :].isnan().all()


def test_attention_that_slides_over_less_than_the_text(ids: Tensor) -> None:
    config = MistralConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        sliding_window=6,
        pad_token_id=0,
    )
    reader = LogitReader(AutoModelForCausalLM.from_config(config).eval())
    embeds, at = reader.embed(ids), torch.tensor([len(ids) - 1])
    measured = measure(torch.tensor([4]))
    scores = [
        occlusion(
            reader, embeds, at, measured, embeds[0], clean=clean_pass(reader, embeds, at, share)
        )
        for share in (True, False)
    ]
    torch.testing.assert_close(scores[0], scores[1], **CLOSE)


def test_a_model_whose_cache_is_wrong_is_run_plainly(ids: Tensor) -> None:
    """Here attention ignores the cache: a continued pass is not the whole one."""
    model = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    ).eval()
    whole = model.forward

    def forgetful(*args: object, past_key_values: object = None, **kwargs: object) -> object:
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            past_key_values = None
        return whole(*args, past_key_values=past_key_values, **kwargs)

    model.forward = forgetful
    reader = LogitReader(model)
    clean = clean_pass(reader, reader.embed(ids), torch.tensor([len(ids) - 1]))
    assert clean.prefix is None
    assert "off by" in clean.why_plain


def test_a_model_without_a_cache_of_keys_and_values_is_run_plainly(ids: Tensor) -> None:
    from transformers import MambaConfig

    config = MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4)
    reader = LogitReader(AutoModelForCausalLM.from_config(config).eval())
    embeds, at = reader.embed(ids), torch.tensor([len(ids) - 1])
    clean = clean_pass(reader, embeds, at)
    assert clean.prefix is None
    assert clean.why_plain
    scores = occlusion(reader, embeds, at, measure(torch.tensor([4])), embeds[0])
    assert scores.isfinite().all()


def test_the_model_is_left_as_it_was(ids: Tensor) -> None:
    model = tiny_model("llama")
    model.train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    before = state_of(model)
    reader = LogitReader(model)
    with torch.inference_mode(), undisturbed(model):
        scores = gradient_times_input(
            reader, reader.embed(ids), torch.tensor([23]), measure(torch.tensor([4]))
        )
    assert scores.isfinite().all()
    assert state_of(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


def state_of(model: nn.Module) -> list[object]:
    return [
        *(
            (name, module.training, len(module._forward_hooks))
            for name, module in model.named_modules()
        ),
        *(
            (name, p.requires_grad, p._version, float(p.detach().sum()))
            for name, p in model.named_parameters()
        ),
    ]


def test_memory_that_runs_out_makes_batches_smaller(
    llama: PreTrainedModel, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = LogitReader(llama)
    embeds, at = reader.embed(ids), torch.tensor([len(ids) - 1])
    expected = occlusion(reader, embeds, at, measure(torch.tensor([4])), embeds[0])
    read = reader.read

    def small(rows: Tensor, *args: object) -> Tensor:
        if rows.shape[0] > 2:
            raise torch.OutOfMemoryError("too much")
        return read(rows, *args)

    monkeypatch.setattr(reader, "read", small)
    batches: list[int] = []
    scores = occlusion(
        reader, embeds, at, measure(torch.tensor([4])), embeds[0], advance=batches.append
    )
    torch.testing.assert_close(scores, expected, **CLOSE)
    assert sum(batches) == len(ids)
    assert max(batches) <= 2


def test_4_bit_layers_that_repack_their_weights_are_refused() -> None:
    layer = nn.Linear(2, 2)
    check_gradients(layer)
    layer.support_avx512bf16_for_cpu = True  # as bitsandbytes marks its Linear4bit
    with pytest.raises(InputError, match="--method occlusion"):
        check_gradients(nn.Sequential(layer))
