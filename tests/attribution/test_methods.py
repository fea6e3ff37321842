"""The methods: Captum's numbers, whatever the batch, the padding, the cache and the call.

Parity is to 1e-5 in float32 with an independent implementation.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    MambaConfig,
    MistralConfig,
    PreTrainedModel,
)

from lightning_inversion.attribution.config import Reduce
from lightning_inversion.attribution.measures import TokenMeasure
from lightning_inversion.attribution.methods import (
    CleanPass,
    Task,
    clean_pass,
    gradient_times_input,
    integrated_gradients,
    occlusion,
)
from lightning_inversion.attribution.model import LogitReader
from tests.attribution import captum_reference as captum
from tests.tiny import FAMILIES, each, shared_tiny_model

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
REPLACEMENT = 5


def task_of(
    model: PreTrainedModel, ids: Tensor, at: Tensor, targets: Tensor, batch_size: int | None = None
) -> Task:
    reader = LogitReader(model)
    measure = TokenMeasure(targets, None, "logprob", "drop")
    return Task(reader, reader.embed(ids), at, measure, batch_size)


def last_of(model: PreTrainedModel, ids: Tensor, target: int = 4) -> Task:
    return task_of(model, ids, torch.tensor([len(ids) - 1]), torch.tensor([target]))


def predicted(model: PreTrainedModel, ids: Tensor) -> int:
    with torch.no_grad():
        return int(model(input_ids=ids[None]).logits[0, -1].argmax())


@pytest.mark.parametrize("reduce", ["sum", "l1", "l2"])
def test_gradient_times_input(model: PreTrainedModel, ids: Tensor, reduce: Reduce) -> None:
    target = predicted(model, ids)
    ours = gradient_times_input(last_of(model, ids, target), reduce)[0]
    products = captum.gradient_times_embedding(model, ids, target)
    theirs = {
        "sum": products.sum(-1),
        "l1": products.abs().sum(-1),
        "l2": products.norm(dim=-1),
    }[reduce]
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_occlusion(model: PreTrainedModel, ids: Tensor) -> None:
    target = predicted(model, ids)
    task = last_of(model, ids, target)
    ours = occlusion(task, task.reader.embed(torch.tensor([REPLACEMENT]))[0])[0]
    torch.testing.assert_close(ours, captum.ablation(model, ids, target, REPLACEMENT), **CLOSE)


def test_integrated_gradients(model: PreTrainedModel, ids: Tensor) -> None:
    target = predicted(model, ids)
    task = last_of(model, ids, target)
    baseline = task.reader.embed(torch.tensor([REPLACEMENT]))[0]
    ours = integrated_gradients(task, baseline, steps=20)
    theirs = captum.integrated(model, ids, target, REPLACEMENT, steps=20)
    torch.testing.assert_close(ours.scores[0], theirs, **CLOSE)
    torch.testing.assert_close(ours.rise - ours.scores.sum(1), ours.missing, **CLOSE)


@each(FAMILIES)
def test_shared_prefix_gives_the_plain_scores(family: str, ids: Tensor) -> None:
    at = torch.tensor([11, len(ids) - 1])
    task = task_of(shared_tiny_model(family), ids, at, torch.tensor([4, 9]))
    shared = clean_pass(task.reader, task.embeds, at)
    plain = CleanPass(shared.outputs, None)
    assert shared.prefix is not None, shared.why_plain
    ours, whole = (occlusion(task, task.embeds[0], clean) for clean in (shared, plain))
    torch.testing.assert_close(ours, whole, equal_nan=True, **CLOSE)


@pytest.mark.parametrize(
    "rows", [5, *(pytest.param(n, marks=pytest.mark.integration) for n in (1, 64))]
)
def test_batch_size(model: PreTrainedModel, ids: Tensor, rows: int) -> None:
    at, targets = torch.arange(len(ids)), ids.roll(-1)
    given, chosen = (task_of(model, ids, at, targets, size) for size in (rows, None))
    for method in (
        lambda task: occlusion(task, task.embeds[0]),
        gradient_times_input,  # rows of every length together: those that are shorter are padded
    ):
        torch.testing.assert_close(method(given), method(chosen), equal_nan=True, **CLOSE)


def test_every_position_at_once_is_each_text_alone(model: PreTrainedModel, ids: Tensor) -> None:
    targets = ids.roll(-1)
    task = task_of(model, ids, torch.arange(len(ids)), targets)
    replacement = task.embeds[0]
    occluded, gradient = occlusion(task, replacement), gradient_times_input(task)
    for last in (0, 9, len(ids) - 1):
        alone = last_of(model, ids[: last + 1], int(targets[last]))
        expected = occlusion(alone, replacement)[0]
        torch.testing.assert_close(occluded[last, : last + 1], expected, **CLOSE)
        expected = gradient_times_input(alone)[0]
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
    task = last_of(AutoModelForCausalLM.from_config(config).eval(), ids)
    shared = clean_pass(task.reader, task.embeds, task.at)
    assert shared.prefix is not None
    ours, whole = (
        occlusion(task, task.embeds[0], clean)
        for clean in (shared, CleanPass(shared.outputs, None))
    )
    torch.testing.assert_close(ours, whole, **CLOSE)


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
    task = last_of(model, ids)
    clean = clean_pass(task.reader, task.embeds, task.at)
    assert clean.prefix is None
    assert "off by" in clean.why_plain


def test_a_model_without_a_cache_of_keys_and_values_is_run_plainly(ids: Tensor) -> None:
    config = MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4)
    task = last_of(AutoModelForCausalLM.from_config(config).eval(), ids)
    clean = clean_pass(task.reader, task.embeds, task.at)
    assert clean.prefix is None
    assert clean.why_plain
    assert occlusion(task, task.embeds[0]).isfinite().all()


def test_memory_that_runs_out_makes_batches_smaller(
    llama: PreTrainedModel, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = last_of(llama, ids)
    expected = occlusion(task, task.embeds[0])
    read = task.reader.read

    def small(rows: Tensor, *args: object) -> Tensor:
        if rows.shape[0] > 2:
            raise torch.OutOfMemoryError("too much")
        return read(rows, *args)

    monkeypatch.setattr(task.reader, "read", small)
    batches: list[int] = []
    scores = occlusion(task, task.embeds[0], advance=batches.append)
    torch.testing.assert_close(scores, expected, **CLOSE)
    assert sum(batches) == len(ids)
    assert max(batches) <= 2
