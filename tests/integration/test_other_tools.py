"""Captured by another tool, recovered here: twenty prompts at depth 8 of the real model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_inversion import recover
from lightning_inversion.__main__ import main as run
from lightning_inversion.api.recovered import Recoveries
from lightning_inversion.recovery.diagnosis import diagnose
from lightning_inversion.recovery.policy import Targets
from lightning_inversion.recovery.reading import Reading
from lightning_inversion.recovery.variants import OtherCuts
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.truncated import TruncatedTransformer
from lightning_inversion.verification.measurements import Measurements
from tests.benchmarks.planted_mistakes import kinds

pytestmark = pytest.mark.integration
DEPTH = 8
PROMPTS = (Path(__file__).parents[2] / "configs" / "prompts.txt").read_text().splitlines()
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return TransformerSpec().load_causal_lm()


@pytest.fixture(scope="module")
def hidden_states(loaded: Loaded) -> list[tuple[Tensor, ...]]:
    """Hugging Face's tuple of each prompt."""
    model, tokenizer = loaded
    return [
        model(tokenizer(text, return_tensors="pt").input_ids, output_hidden_states=True)
        .hidden_states
        for text in PROMPTS
    ]  # fmt: skip


def recovered(loaded: Loaded, states: Any, **told: Any) -> Recoveries:
    found = recover(*loaded, states, depth=DEPTH, **told)
    assert [prompt.text for prompt in found] == PROMPTS
    assert all(prompt.verified for prompt in found)
    return found


def test_hugging_faces_tuples(loaded: Loaded, hidden_states: list[tuple[Tensor, ...]]) -> None:
    assert len(hidden_states) == 20
    recovered(loaded, hidden_states)


@pytest.mark.parametrize("folded", [False, True])
def test_caches_of_transformer_lens(
    loaded: Loaded, hidden_states: list[tuple[Tensor, ...]], folded: bool
) -> None:
    """A model whose weights were folded writes a residual stream without its mean."""
    caches = []
    for states in hidden_states:
        if folded:
            states = tuple(layer - layer.mean(-1, keepdim=True) for layer in states)
        cache = {f"blocks.{at}.hook_resid_pre": layer for at, layer in enumerate(states[:-1])}
        cache |= {f"blocks.{at}.hook_resid_post": layer for at, layer in enumerate(states[1:-1])}
        caches.append({"blocks.0.hook_attn_out": states[1] - states[0], **cache})
    recovered(loaded, caches, centred=folded)


def test_files_of_vllm_whose_token_ids_lie(
    hidden_states: list[tuple[Tensor, ...]], tmp_path: Path, messages: list[str]
) -> None:
    folder = tmp_path / "requests"
    folder.mkdir()
    for number, states in enumerate(hidden_states):
        layers = torch.stack([states[4][0], states[DEPTH][0]], dim=1)
        wrong = torch.arange(len(layers)) + 1000
        file = folder / f"request-{number:02}.safetensors"
        save_file({"hidden_states": layers, "token_ids": wrong}, file)
    arguments = [
        "predict",
        f"--data.targets={folder}",
        "--data.layout.depths=[4,8]",
        f"--model.transformer.depth={DEPTH}",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    assert run(arguments) == 0
    (file,) = tmp_path.glob("lightning_logs/*/results.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["recovered"] for row in rows] == PROMPTS
    assert all(row["verified"] for row in rows)
    assert any("holds token ids (token_ids) beside the hidden states" in line for line in messages)
    assert any("20 prompts, 4 to 20 positions, depth 8" in line for line in messages)


def test_batches_padded_on_the_left(loaded: Loaded) -> None:
    model, tokenizer = loaded
    batches = []
    for start in range(0, 20, 5):
        given = tokenizer(
            PROMPTS[start : start + 5], padding=True, padding_side="left", return_tensors="pt"
        )
        states = model(**given, output_hidden_states=True).hidden_states
        batches.append({"hidden_states": states, "attention_mask": given.attention_mask})
    recovered(loaded, batches)


def test_rows_in_unknown_order(loaded: Loaded, hidden_states: list[tuple[Tensor, ...]]) -> None:
    states, places = [], []
    generator = torch.Generator().manual_seed(0)
    for own in hidden_states[:5]:
        order = torch.randperm(own[DEPTH].shape[1], generator=generator)
        states.append(own[DEPTH][0, order])
        places.append(tuple(order.argsort().tolist()))
    found = recover(*loaded, states, depth=DEPTH, order="unknown")
    assert [prompt.text for prompt in found] == PROMPTS[:5]
    assert [prompt.order for prompt in found] == places
    assert found.verified


def test_mistakes_are_named_and_right_features_are_not(loaded: Loaded) -> None:
    model, tokenizer = loaded

    def cut(depths: tuple[int, ...], final_norm: bool) -> TruncatedTransformer:
        return TruncatedTransformer.from_model(
            model, tokenizer, layers=depths, final_norm=final_norm
        )

    transformer = cut((DEPTH,), False)
    measurements = Measurements.measure(transformer, first_alone=True)
    ids = tokenizer(PROMPTS[7] + " " + PROMPTS[9], return_tensors="pt").input_ids[0]
    for name, (features, wanted) in kinds(cut, DEPTH, 30).items():
        target = features(ids)
        (found,) = diagnose(measurements, Targets(target[None], [len(target)]), OtherCuts(cut, 30))
        if name == "none":
            assert found is None
            continue
        assert found is not None
        assert (found.way_out or "").startswith(wanted)
        assert wanted or found.way_out is None, name


def test_rows_behind_an_unknown_prefix_are_read(loaded: Loaded) -> None:
    model, tokenizer = loaded
    unknown = tokenizer("You are a helpful assistant. ").input_ids
    states, right = [], []
    for text in PROMPTS[:5]:
        ids = unknown + tokenizer(text).input_ids
        output = model(torch.tensor([ids]), output_hidden_states=True)
        states.append(output.hidden_states[DEPTH][0, len(unknown) :])
        right += ids[len(unknown) :]
    found = recover(*loaded, states, depth=DEPTH, policy=Reading(0))
    read = [token for prompt in found for token in prompt.tokens]
    named = sum(token.id == own for token, own in zip(read, right, strict=True))
    assert named >= 0.9 * len(right)
    assert {token.state for token in read} == {"read"}
    assert not any(prompt.verified for prompt in found)


def test_rows_behind_a_known_prefix(loaded: Loaded) -> None:
    """What a server with a prefix cache stores: the rows of the shared beginning are missing."""
    model, tokenizer = loaded
    known = tokenizer("You are a helpful assistant. ").input_ids
    states = []
    for text in PROMPTS:
        ids = torch.tensor([known + tokenizer(text).input_ids])
        states.append(model(ids, output_hidden_states=True).hidden_states[DEPTH][0, len(known) :])
    found = recover(*loaded, states, depth=DEPTH, known_prefix=known, first_position=len(known))
    assert [prompt.ids[len(known) :] for prompt in found] == [
        tokenizer(text).input_ids for text in PROMPTS
    ]
    assert all(prompt.verified for prompt in found)


@pytest.mark.parametrize("depth", [0, DEPTH])
def test_caches_of_keys_and_values(loaded: Loaded, depth: int) -> None:
    model, tokenizer = loaded
    caches = [
        model(tokenizer(text, return_tensors="pt").input_ids).past_key_values for text in PROMPTS
    ]
    found = recover(model, tokenizer, caches, depth=depth)
    assert [prompt.text for prompt in found] == PROMPTS
    assert all(prompt.verified for prompt in found)
