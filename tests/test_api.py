"""Exact recovery in one call."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from lightning_inversion.api import capture, recover, verify
from lightning_inversion.data.storage import Storage
from lightning_inversion.errors import InputError
from lightning_inversion.proposers.proposals import Exhaustive
from lightning_inversion.recovery.token_recovery import TokenRecovery
from lightning_inversion.verification.certificate import Certificate
from lightning_inversion.verification.noise import NoiseName
from tests.tiny import shared_tiny_model, tiny_tokenizer

PROMPTS = ["The sky is blue.", "A quick brown fox jumps"]
POLICY = TokenRecovery(Exhaustive(), candidates=64)


def hidden_states(depth: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    model, tokenizer = shared_tiny_model("llama"), tiny_tokenizer()
    return [
        model(
            tokenizer(prompt, return_tensors="pt").input_ids, output_hidden_states=True
        ).hidden_states[depth].to(dtype)
        for prompt in PROMPTS
    ]  # fmt: skip


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.integration), torch.bfloat16]
)
def test_the_prompts_of_a_list_of_hidden_states(dtype: torch.dtype) -> None:
    model, tokenizer = shared_tiny_model("llama"), tiny_tokenizer()
    found = recover(model, tokenizer, hidden_states(2, dtype), depth=2, policy=POLICY)
    assert [prompt.text for prompt in found] == PROMPTS
    assert all(prompt.verified for prompt in found)


def test_an_output_of_the_model_and_a_centred_cache() -> None:
    model, tokenizer = shared_tiny_model("llama"), tiny_tokenizer()
    output = model(tokenizer(PROMPTS[0], return_tensors="pt").input_ids, output_hidden_states=True)
    centred = [layer - layer.mean(-1, keepdim=True) for layer in output.hidden_states]
    cache = {f"blocks.{i}.hook_resid_pre": layer for i, layer in enumerate(centred[:-1])}
    for held, told in ((output, False), (cache, True)):
        (found,) = recover(model, tokenizer, held, depth=2, centred=told, policy=POLICY)
        assert found.text == PROMPTS[0]
        assert found.verified


@pytest.mark.integration  # measures for itself
def test_rows_behind_a_prefix_that_is_left_out() -> None:
    model, tokenizer = shared_tiny_model("llama"), tiny_tokenizer()
    ids = tokenizer(PROMPTS[1])["input_ids"]
    (found,) = recover(
        model, None, hidden_states(2)[1][0, 2:] * 0.5, depth=2, known_prefix=ids[:2],
        first_position=2, scale=0.5, policy=POLICY,
    )  # fmt: skip
    assert found.ids == ids
    assert found.verified


def test_one_tensor_behind_a_known_prefix() -> None:
    model, tokenizer = shared_tiny_model("llama"), tiny_tokenizer()
    ids = tokenizer(PROMPTS[1])["input_ids"]
    target = hidden_states(2)[1][0]
    (found,) = recover(model, None, target, depth=2, known_prefix=ids[:2], policy=POLICY)
    assert found.ids == ids
    assert found.text is None
    assert len(found.tokens) == len(ids) - 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "holds no tensor"),
        (torch.ones(3, 31), r"shape \[3, 31\]: the features are 31 in the file and 32"),
        (torch.ones(2, 3, 32), "set layout.axes prompts,positions,features or"),
        (torch.ones(3, 32, dtype=torch.long), "holds int64"),
        (torch.tensor([[torch.nan, 1.0] * 16]), "nan, infinite values or ones above"),
        ({"blocks.2.hook_resid_post": torch.ones(1, 3, 32)}, "asked for; set depth 3"),
    ],
)
def test_what_does_not_fit_is_refused(given, message: str) -> None:
    with pytest.raises(InputError, match=message):
        recover(shared_tiny_model("llama"), None, given, depth=2, policy=POLICY)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"order": "x"}, "^order: 'x' is unknown; choose from given, unknown"),
        ({"output": "x"}, "^output: 'x' is unknown; choose from hidden_states"),
        ({"output": "keys"}, "the features are 32 and 16 in the model"),
        ({"scale": 0.0}, "^scale is a factor other than 0"),
        ({"model": None}, "model is a NoneType; give a causal language model"),
        (
            {"model": shared_tiny_model("llama").model, "policy": TokenRecovery()},
            "model is a LlamaModel, without its head",
        ),
        ({"tokenizer": "gpt2"}, "tokenizer is a str; give a tokenizer of transformers, or None"),
    ],
)
def test_wrong_arguments_are_refused(told: dict[str, Any], message: str) -> None:
    given = {"model": shared_tiny_model("llama"), "tokenizer": None, "policy": POLICY, **told}
    with pytest.raises(InputError, match=message):
        recover(hidden_states=torch.ones(3, 32), depth=2, **given)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"noise": -1.0}, "^noise must be between 0 and"),
        ({"noise_kind": "x"}, "^noise_kind: 'x' is unknown; choose from gaussian, laplace"),
        ({"largest": 0.0}, "^largest is a share of the features, above 0 and at most 1"),
        ({"largest": 2.0}, "^largest is a share of the features, above 0 and at most 1"),
    ],
)
def test_a_channel_that_cannot_be_is_refused(told: dict[str, Any], message: str) -> None:
    model, tokenizer = shared_tiny_model("llama"), tiny_tokenizer()
    with pytest.raises(InputError, match=message):
        capture(model, tokenizer, PROMPTS, depth=2, **told)
    with pytest.raises(InputError, match=message):
        recover(model, None, torch.ones(3, 32), depth=2, policy=POLICY, **told)


def test_what_capture_and_verify_cannot_take_is_refused() -> None:
    model, tokenizer = shared_tiny_model("llama"), tiny_tokenizer()
    with pytest.raises(InputError, match=r"^store: 'int8' is unknown; choose from float32"):
        capture(model, tokenizer, PROMPTS, depth=2, store="int8")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^Prompt 2 is a int; give a text"):
        capture(model, tokenizer, ["a", 3], depth=2)  # type: ignore[list-item]
    rows = capture(model, tokenizer, PROMPTS[:1], depth=2)
    found = recover(model, tokenizer, rows, depth=2, policy=POLICY)
    with pytest.raises(InputError, match=r"certificate is a Recovered; give the \.certificate"):
        verify(found[0], model, rows)  # type: ignore[arg-type]


def test_a_prefix_longer_than_a_prompt_is_refused() -> None:
    with pytest.raises(InputError, match="known prefix has 4 tokens"):
        recover(
            shared_tiny_model("llama"), None, torch.ones(3, 32), depth=2,
            known_prefix=[1, 2, 3, 4], policy=POLICY,
        )  # fmt: skip


@pytest.mark.parametrize("token", [-1, 300])
def test_a_prefix_outside_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(InputError, match="known_prefix must hold token ids from 0 to 299"):
        recover(
            shared_tiny_model("llama"), None, torch.ones(3, 32), depth=2,
            known_prefix=[token], policy=POLICY,
        )  # fmt: skip


def test_a_certificate_is_checked_again_elsewhere(tmp_path: Path) -> None:
    model, tokenizer = shared_tiny_model("llama"), tiny_tokenizer()
    rows = hidden_states(2)[0]
    (found,) = recover(model, tokenizer, rows, depth=2, policy=POLICY)
    assert found.certificate is not None
    found.certificate.write(tmp_path / "certificate.json")
    certificate = Certificate.read(tmp_path / "certificate.json")
    check = verify(certificate, model, rows)
    assert check
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    for held in ([rows], rows[0], model(ids, output_hidden_states=True)):
        assert verify(certificate, model, held), type(held)
    with pytest.raises(InputError, match="of 2 prompts, and a certificate is of one"):
        verify(certificate, model, [rows, rows])
    assert all(check.reproduced)
    assert max(check.residuals) < 1e-4
    # A certificate of another token, rows of another prompt, another model.
    forged = replace(certificate.tokens[2], id=(certificate.tokens[2].id + 1) % 300)
    tokens = (*certificate.tokens[:2], forged, *certificate.tokens[3:])
    assert not verify(replace(certificate, tokens=tokens), model, rows)
    assert not verify(certificate, model, rows + 0.5)
    with pytest.raises(InputError, match="for a model of other weights"):
        verify(certificate, shared_tiny_model("gpt2"), rows)
    with pytest.raises(InputError, match=r"is for hidden states of shape \[\d+, 32\]"):
        verify(certificate, model, rows[:, 1:])
    for damaged in (
        "",
        "[]",
        "{}",
        '{"format": 2}',
        certificate.to_json().replace('"id": ', '"x": '),
    ):
        with pytest.raises(InputError, match="This is no certificate"):
            Certificate.from_json(damaged)


def test_a_known_prefix_that_does_not_fit_is_refused() -> None:
    model = shared_tiny_model("llama")
    rows = model(torch.tensor([[5, 17, 9, 8]]), output_hidden_states=True).hidden_states[2]
    with pytest.raises(InputError, match="does not fit the hidden states of prompt 1"):
        recover(model, None, rows, depth=2, known_prefix=[299, 298], policy=POLICY)
    (found,) = recover(model, None, rows, depth=2, known_prefix=[5, 17], policy=POLICY)
    assert found.ids == [5, 17, 9, 8]
    assert len(found.tokens) == 2


@pytest.mark.integration  # measures for itself
@pytest.mark.parametrize("kind", get_args(NoiseName))
def test_told_noise(kind: NoiseName) -> None:
    model, ids = shared_tiny_model("llama"), torch.tensor([[5, 17, 9, 8, 250, 3]])
    rows = model(ids, output_hidden_states=True).hidden_states[2].detach()
    noise = 0.05 * float(rows.std())
    rows = Storage(noise=noise, noise_kind=kind)(rows, torch.Generator().manual_seed(0))
    (found,) = recover(model, None, rows, depth=2, noise=noise, noise_kind=kind, policy=POLICY)
    assert found.ids == ids[0].tolist()
    assert found.verified
    assert all(token.risk is not None and token.risk <= 1e-6 for token in found.tokens)
    with pytest.raises(InputError, match=r"noise of std 0\.0\d+ was added; set noise 0"):
        recover(model, None, rows, depth=2, policy=POLICY)
    (found,) = recover(model, None, rows, depth=2, policy=POLICY, diagnose_first=False)
    assert not any(token.verified for token in found.tokens)
