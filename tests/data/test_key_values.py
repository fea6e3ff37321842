"""Keys and values of attention: how caches hold them, and prompts recovered from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import Cache

from lightning_inversion import api, recover
from lightning_inversion.__main__ import main as run
from lightning_inversion.data.layout import Layout, ModelShape
from lightning_inversion.data.request import Request
from lightning_inversion.data.targets import Captured
from lightning_inversion.errors import InputError
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.selection import Output
from lightning_inversion.transformer.truncated import TruncatedTransformer
from tests.tiny import CONFIGS, shared_tiny_model

IDS = torch.tensor([[11, 42, 7, 8, 9, 5, 33], [21, 22, 23, 24, 25, 26, 27]])
BLOCK = 2


@torch.no_grad()
def cache_of(family: str = "llama", ids: Tensor = IDS, **given: Any) -> Cache:
    cache: Cache = shared_tiny_model(family)(ids, use_cache=True, **given).past_key_values
    return cache


def pairs(ids: Tensor = IDS) -> list[tuple[Tensor, Tensor]]:
    """The older tuple."""
    return [(layer.keys, layer.values) for layer in cache_of(ids=ids).layers]


def read(
    held: Any, output: Output = "keys_values", depths: tuple[int, ...] = (BLOCK,), **told: Any
) -> Captured:
    shape = ModelShape.of(shared_tiny_model("llama").config)
    request = Request(depths, shape=lambda: shape, layout=Layout(**told), output=output)
    return Captured.of_objects(held, request)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_features_are_those_of_hugging_faces_cache(family: str) -> None:
    model = shared_tiny_model(family)
    for depth in (0, 3):
        request = Request((depth,), output="keys_values")
        targets = Captured.of_objects(cache_of(family), request).targets
        transformer = TruncatedTransformer.from_model(model, depth=depth, output="keys_values")
        assert torch.equal(transformer.features_of(IDS), torch.stack(list(targets)))


def names(first: str, second: str) -> Callable[[], dict[str, Tensor]]:
    """A dict of tensors under names with the number of their block."""
    return lambda: {
        name.format(block): part
        for block, pair in enumerate(pairs())
        for name, part in zip((first, second), pair, strict=True)
    }


HELD: dict[str, Callable[[], Any]] = {
    "transformers' cache": cache_of,
    "the older tuple": lambda: tuple(pairs()),
    "a list of pairs": pairs,
    "an output": lambda: shared_tiny_model("llama")(IDS),
    "a dict": lambda: {"past_key_values": tuple(pairs()), "input_ids": IDS},
    "lists": lambda: {"key_cache": [k for k, _ in pairs()], "value_cache": [v for _, v in pairs()]},
    "key_cache.2": names("key_cache.{}", "value_cache.{}"),
    "layers.2.keys": names("layers.{}.keys", "layers.{}.values"),
    "past_key_values.2.key": names("past_key_values.{}.key", "past_key_values.{}.value"),
    "past.2.0": names("past.{}.0", "past.{}.1"),
    "llama.cpp": names("cache_k_l{}", "cache_v_l{}"),
    "one block": lambda: {"keys": pairs()[BLOCK][0], "values": pairs()[BLOCK][1]},
    "positions first": lambda: {
        f"blocks.2.attn.hook_{name}": part.transpose(1, 2)
        for name, part in zip(("rot_k", "v"), pairs()[BLOCK], strict=True)
    },
    "two prompts": lambda: [tuple(pairs(ids)) for ids in IDS[:, None]],
    "two prompts by names": lambda: {
        f"prompt{row}.{kind}_cache.2": part[row : row + 1]
        for row in (0, 1)
        for kind, part in zip(("key", "value"), pairs()[BLOCK], strict=True)
    },
    "NumPy's pairs": lambda: [tuple(part.numpy() for part in pair) for pair in pairs()],
    "blocks as dicts": lambda: {i: {"k": k, "v": v} for i, (k, v) in enumerate(pairs())},
    "a list of blocks as dicts": lambda: [{"keys": k, "values": v} for k, v in pairs()],
    "a list of blocks": lambda: [SimpleNamespace(keys=k, values=v) for k, v in pairs()],
    "pairs by number": lambda: dict(enumerate(pairs())),
    "pairs by layer": lambda: {f"layer_{i}": pair for i, pair in enumerate(pairs())},
    "key_states.2": names("key_states.{}", "value_states.{}"),
    "kinds first": lambda: torch.stack([torch.stack(own) for own in zip(*pairs(), strict=True)]),
    "two prompts after the block": lambda: {
        f"layers.2.{kind}.prompt_{row}": part[row : row + 1]
        for row in (0, 1)
        for kind, part in zip(("key", "value"), pairs()[BLOCK], strict=True)
    },
    "one tensor": lambda: torch.stack([torch.stack(pair) for pair in pairs()]),
    "a tensor of each kind": lambda: {
        "k": torch.stack([k for k, _ in pairs()]),
        "v": torch.stack([v for _, v in pairs()]),
    },
    "features": lambda: list(torch.cat([p.transpose(1, 2).flatten(2) for p in pairs()[BLOCK]], -1)),
}


@pytest.mark.parametrize("held", HELD.values(), ids=HELD.keys())
def test_caches_are_understood(held: Callable[[], Any]) -> None:
    captured = read(held())
    wanted = torch.cat([part.transpose(1, 2).flatten(2) for part in pairs()[BLOCK]], dim=-1)
    for target, own in zip(captured.targets, wanted, strict=True):
        torch.testing.assert_close(target, own)
    assert "2 prompts, 7 positions, depth 2, keys and values, float32" in captured.understood


def test_pairs_without_an_axis_of_prompts() -> None:
    held = [(keys[0], values[0]) for keys, values in pairs()]
    (target,) = read(held).targets
    assert torch.equal(target, read(pairs()).targets[0])


def test_keys_and_values_alone() -> None:
    keys, values = pairs()[BLOCK]
    for output, part in (("keys", keys), ("values", values)):
        for held in (part, {output: part}, cache_of()):
            targets = read(held, output).targets
            assert torch.equal(torch.stack(list(targets)), part.transpose(1, 2).flatten(2))
        (one,) = read(part[0], output).targets
        assert torch.equal(one, part[0].transpose(0, 1).flatten(1))


def test_padding_is_dropped() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    captured = read({"past_key_values": cache_of(), "attention_mask": mask})
    assert captured.lengths == [5, 7]
    static = [torch.nn.functional.pad(part, (0, 0, 0, 9)) for part in pairs()[BLOCK]]
    assert read(dict(zip(("keys", "values"), static, strict=True))).lengths == [7, 7]
    assert read(cache_of(), lengths=[3, 4], padding="left").lengths == [3, 4]


REFUSED: dict[str, tuple[Callable[[], Any], Output, str]] = {
    "another block": (lambda: {"key_cache.1": pairs()[1][0]}, "keys", "after depths 1, and depth"),
    "keys alone": (
        lambda: {"key_cache.2": pairs()[2][0]}, "keys_values", "no values .*output keys"
    ),
    "one of the two": (lambda: pairs()[2][0], "keys_values", "may be keys or values; set"),
    "hidden states": (lambda: {"hidden": torch.ones(1, 7, 32, 2, 2)}, "keys", "store keys and"),
    "no dense tensor": (lambda: torch.ones(7, 16).to_sparse(), "keys", "is no dense tensor"),
    "nothing": (lambda: {"ids": IDS}, "keys", "holds no keys and values; save past_key_values"),
    "lengths": (
        lambda: {"keys": pairs()[2][0], "values": pairs()[2][1][:, :, 1:]},
        "keys_values", "of different lengths",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("held", "output", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_read_is_refused(
    held: Callable[[], Any], output: Output, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read(held(), output)


@pytest.mark.parametrize(("family", "depth"), [("llama", 0), ("llama", 2), ("gpt2", 1)])
def test_prompts_are_recovered_from_a_cache(family: str, depth: int) -> None:
    model = shared_tiny_model(family)
    cache = cache_of(family)
    found = recover(model, None, cache, depth=depth)
    assert [prompt.ids for prompt in found] == IDS.tolist()
    assert all(prompt.verified for prompt in found)
    (one,) = recover(model, None, cache_of(family, IDS[:1]), depth=depth)
    assert one.certificate is not None
    assert one.certificate.transformer["output"] == "keys_values"
    check = api.verify(one.certificate, model, cache_of(family, IDS[:1]))
    assert check.holds
    assert all(check.reproduced)


def test_options_that_change_hidden_states_are_refused() -> None:
    with pytest.raises(InputError, match="final_norm is for hidden states"):
        TransformerSpec(depth=0, output="keys", final_norm=True)
    with pytest.raises(InputError, match="choose 1 or more"):
        TransformerSpec(depth=0)
    model = shared_tiny_model("llama")
    with pytest.raises(InputError, match="last block is after 3; choose 3 or fewer"):
        TruncatedTransformer.from_model(model, depth=4, output="keys_values")


@pytest.mark.usefixtures("shared_parsers")
def test_commands_capture_and_recover_keys_and_values(tiny_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The sky is blue.\nA quick brown fox\n")
    model = TransformerSpec(model=str(tiny_folder)).load_causal_lm()[0]
    tokenizer = TransformerSpec(model=str(tiny_folder)).load_tokenizer()
    ids = tokenizer("The sky is blue.", return_tensors="pt").input_ids
    layer = model(ids).past_key_values.layers[1]
    save_file(
        {"key_cache.1": layer.keys, "value_cache.1": layer.values}, tmp_path / "cache.safetensors"
    )
    capture = ["--model", str(tiny_folder), "--depth", "1", "--output", "keys_values"]
    captured = tmp_path / "captured.safetensors"
    assert run(["capture", "--prompts", str(prompts), "--out", str(captured), *capture]) == 0
    for number, (file, texts) in enumerate(
        {captured: 2, tmp_path / "cache.safetensors": 1}.items()
    ):
        root = tmp_path / str(number)
        arguments = [
            "predict", "--targets", str(file), "--model", str(tiny_folder), "--depth", "1",
            "--model.transformer.output", "keys_values", f"--trainer.default_root_dir={root}",
        ]  # fmt: skip
        assert run(arguments) == 0
        (rows,) = root.glob("lightning_logs/*/results.jsonl")
        found = [json.loads(line) for line in rows.read_text().splitlines()]
        assert len(found) == texts
        assert found[0]["recovered"] == "The sky is blue."
        assert all(row["verified"] and row["output"] == "keys_values" for row in found)


def test_padding_on_the_left_moves_the_keys() -> None:
    """Without position_ids a model counts the padding; its keys are then of later positions."""
    model = shared_tiny_model("llama")
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    ids = IDS.clone()
    ids[1] = ids[1].roll(3) * mask[1]
    told = (mask.cumsum(1) - 1).clamp(min=0)
    right = cache_of(ids=ids, attention_mask=mask, position_ids=told)
    found = recover(model, None, right, depth=BLOCK, attention_mask=mask)
    assert [prompt.ids for prompt in found] == [IDS[0].tolist(), IDS[1, :4].tolist()]
    assert all(prompt.verified for prompt in found)
    moved = [
        tuple(part[1:, :, 3:] for part in (layer.keys, layer.values))
        for layer in cache_of(ids=ids, attention_mask=mask).layers
    ]
    with pytest.raises(InputError, match=r"the values fit and the keys do not.*set output values"):
        recover(model, None, moved, depth=BLOCK)
    (found_one,) = recover(model, None, moved, depth=BLOCK, output="values")
    assert found_one.ids == IDS[1, :4].tolist()
    assert found_one.verified
