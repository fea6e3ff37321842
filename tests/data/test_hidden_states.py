"""How other tools hold hidden states, in files and in memory; what is refused, in one sentence."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_inversion.data.layout import Layout, ModelShape
from lightning_inversion.data.prompts import PromptDataModule
from lightning_inversion.data.request import Request
from lightning_inversion.data.targets import Captured
from lightning_inversion.errors import InputError
from tests.tiny import shared_tiny_model

T, D, N = 6, 32, 4
"""Positions of the prompt, width and blocks of the tiny model."""
IDS = torch.tensor([[11, 42, 7, 8, 9, 5], [21, 22, 23, 24, 25, 26]])


@pytest.fixture(scope="module")
def hs() -> tuple[Tensor, ...]:
    """``hidden_states`` of two prompts."""
    with torch.no_grad():
        return tuple(shared_tiny_model("llama")(IDS, output_hidden_states=True).hidden_states)


def shape() -> ModelShape:
    return ModelShape.of(shared_tiny_model("llama").config)


def read(held: Any, depth: int | tuple[int, ...] = 2, **told: Any) -> Captured:
    depths = depth if isinstance(depth, tuple) else (depth,)
    final_norm = told.pop("final_norm", False)
    return Captured.of_objects(held, Request(depths, final_norm, shape, Layout(**told)))


def read_file(path: Path, depth: int = 2, **told: Any) -> Captured:
    return Captured.read(path, Request((depth,), False, shape, Layout(**told)))


def cache_names(hs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The cache of TransformerLens for the first prompt, as a dict."""
    names = {"hook_embed": hs[0][:1], "blocks.0.attn.hook_q": torch.ones(1, T, 4, 8)}
    for block in range(N):
        names[f"blocks.{block}.hook_resid_pre"] = hs[block][:1]
        if block < N - 1:
            names[f"blocks.{block}.hook_resid_post"] = hs[block + 1][:1]
    return names


def steps(hs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], ...]:
    """``[step][layer]``: four tokens of a prompt, then two that were generated."""
    first = tuple(layer[:1, :4] for layer in hs)
    return (first, *(tuple(layer[:1, at : at + 1] for layer in hs) for at in (4, 5)))


def as_objects(values: Any) -> Any:
    """A NumPy array of other arrays."""
    held = np.empty(len(values), dtype=object)
    for number, value in enumerate(values):
        held[number] = value
    return held


def padded(states: Tensor, value: float) -> Tensor:
    """Two prompts, the second of four tokens."""
    states = states.clone()
    states[1, 4:] = value
    return states


def packed(states: Tensor) -> Tensor:
    """Rows of two prompts, the second of four tokens, one after the other."""
    return torch.cat([states[0], states[1, :4]])


class Output(NamedTuple):
    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...]


Holds = Callable[[tuple[Tensor, ...]], Any]
ONE: dict[str, Holds] = {
    "[T, D]": lambda hs: hs[2][0],
    "[1, T, D]": lambda hs: hs[2][:1],
    "a NumPy array": lambda hs: hs[2][0].numpy(),
    "a big-endian array": lambda hs: hs[2][0].numpy().astype(">f4"),
    "a list of one": lambda hs: [hs[2][0]],
    "nested lists": lambda hs: hs[2][0].tolist(),
    "a server's answer, a row a step": lambda hs: [hs[2][0, :4].tolist(), *hs[2][0, 4:].tolist()],
    "rows": lambda hs: list(hs[2][0]),
    "named rows": lambda hs: {f"token {i}": hs[2][0, i] for i in range(T)},
    "an array of rows as objects": lambda hs: as_objects(hs[2][0].numpy()),
    "a table of pandas": lambda hs: pd.DataFrame(hs[2][0].numpy()),
    "nested dicts": lambda hs: {"run": {"a": {"hidden": hs[2][0]}}},
    "a tuple of all depths": lambda hs: tuple(layer[:1] for layer in hs),
    "[layers, T, D]": lambda hs: torch.stack([layer[0] for layer in hs]),
    "[layers, 1, T, D]": lambda hs: torch.stack([layer[:1] for layer in hs]),
    "the steps of generate": steps,
    "an output": lambda hs: SimpleNamespace(hidden_states=tuple(layer[:1] for layer in hs)),
    "an output's dict": lambda hs: {
        "logits": torch.ones(1, T, 9), "hidden_states": tuple(layer[:1] for layer in hs),
        "past_key_values": object(), "last_hidden_state": hs[-1][:1],
    },
    "a cache of TransformerLens": cache_names,
    "one hook": lambda hs: {"blocks.1.hook_resid_post": hs[2][:1]},
    "nnsight's names": lambda hs: {
        f"transformer.h.{i}.output[0]": hs[i + 1][:1] for i in range(N - 1)
    },
    "module names": lambda hs: {"model.layers.1": hs[2][0], "model.norm": hs[4][0]},
    "an input of a module": lambda hs: {"model.layers.2.input": hs[2][0]},
    "nnterp's names": lambda hs: {f"layers_output[{i}]": hs[i + 1][:1] for i in range(N - 1)},
    "llama.cpp's names": lambda hs: {f"l_out-{i}": hs[i + 1][0] for i in range(N - 1)},
    "names of hidden_states": lambda hs: {f"hidden_states.{i}": hs[i][0] for i in range(N)},
    "numbered layers, all of them": lambda hs: {f"layer_{i}": hs[i][0] for i in range(N + 1)},
    "numbered blocks, all of them": lambda hs: {f"layer_{i}": hs[i + 1][0] for i in range(N)},
    "vllm-lens": lambda hs: {
        "activations": {"residual_stream": torch.stack([layer[0] for layer in hs[1:]])}
    },
    "a file of a request of vLLM": lambda hs: {
        "hidden_states": hs[2][0][:, None], "token_ids": IDS[0]
    },
    "SIPIT's dict": lambda hs: {"hidden_states": hs[2][0], "input_ids": IDS[0], "layer_idx": 2},
    "any name": lambda hs: {"activations_of_my_system": hs[2][0]},
    "a trace of baukit": lambda hs: {
        f"model.layers.{i}": SimpleNamespace(output=(hs[i + 1][:1], None)) for i in range(N - 1)
    },
    "saved values of nnsight": lambda hs: {
        f"model.layers[{i}].output[0]": SimpleNamespace(value=hs[i + 1][:1]) for i in range(N - 1)
    },
    "a block's tuple": lambda hs: {"transformer.h.1": (hs[2][:1], (hs[1], hs[1]), None)},
    "pyvene's names": lambda hs: {"layer.1.comp.block_output.unit.pos.nunit.1#0": [hs[2][:1]]},
    "names without hook": lambda hs: {"layer1_resid_post": hs[2][0], "layer1_resid_pre": hs[1][0]},
    "keys that are tuples": lambda hs: {("resid_post", 1): hs[2][:1], ("resid_pre", 1): hs[1][:1]},
    "numbers of all depths": lambda hs: {i: hs[i][0] for i in range(N + 1)},
    "one numbered layer": lambda hs: {"transformer_layer_1": hs[2][:1]},
    "a layer of a trainer": lambda hs: {"_orig_mod.model.layers.1": hs[2][0].requires_grad_()},
    "steps": lambda hs: {f"step_{i}": own for i, own in enumerate(hs[2][0].split([4, 1, 1]))},
    "[1, 1, T, D]": lambda hs: hs[2][None, :1],
    "a column-major view": lambda hs: hs[2][0].T.contiguous().T,
    "a masked array": lambda hs: np.ma.masked_equal(
        np.pad(hs[2][0].numpy(), ((0, 2), (0, 0)), constant_values=9.0), 9.0
    ),
    "a memoryview": lambda hs: memoryview(hs[2][0].numpy()),
    "padding of zeros": lambda hs: torch.nn.functional.pad(hs[2][0], (0, 0, 2, 3)),
    "words after the layer": lambda hs: {
        f"layer_{i}_activations": hs[i][0] for i in range(N + 1)
    },
    "layers of a dict, all depths": lambda hs: {
        "run": {"layers": {str(i): hs[i][0] for i in range(N + 1)}}
    },
    "dicts of one tensor, all depths": lambda hs: tuple({"h": own[:1]} for own in hs),
    "an output as a tuple of names": lambda hs: Output(hs[4][:1], tuple(own[:1] for own in hs)),
    "negative numbers of all depths": lambda hs: {i - N - 1: hs[i][0] for i in range(N + 1)},
    "inputs and outputs": lambda hs: {
        "inputs": {"input_ids": IDS[:1], "attention_mask": torch.ones(1, T)},
        "outputs": {"hidden_states": tuple(own[:1] for own in hs), "sequences": IDS[:1]},
    },
    "states and ids": lambda hs: (hs[2][0], IDS[0]),
    "the number of the layer": lambda hs: {"hidden": hs[2][0], "layer": 1},
    "np.savez of all depths": lambda hs: {f"arr_{i}": hs[i][0].numpy() for i in range(N + 1)},
    "padding of nan": lambda hs: torch.nn.functional.pad(hs[2][0], (0, 0, 1, 0), value=torch.nan),
}  # fmt: skip


@pytest.mark.parametrize("held", ONE.values(), ids=ONE.keys())
def test_one_prompt_at_depth_two(held: Holds, hs: tuple[Tensor, ...]) -> None:
    captured = read(held(hs))
    (target,) = captured.targets
    assert torch.equal(target, hs[2][0])
    assert "1 prompt, 6 positions, depth 2, float32" in captured.understood


TWO: dict[str, tuple[Holds, dict[str, Any]]] = {
    "a list": (lambda hs: [hs[2][0], hs[2][1, :4]], {}),
    "an array of prompts as objects": (
        lambda hs: as_objects([hs[2][0].numpy(), hs[2][1, :4].numpy()]), {}
    ),
    "records": (
        lambda hs: [
            {"hidden_states": hs[2][0].tolist(), "text": "a"}, {"hidden_states": hs[2][1, :4]}
        ], {}
    ),
    "a list of outputs": (
        lambda hs: [
            SimpleNamespace(hidden_states=tuple(layer[:1] for layer in hs)),
            {"hidden_states": tuple(layer[1:, :4] for layer in hs)},
        ],
        {},
    ),
    "named prompts": (lambda hs: {"text 10": hs[2][1, :4], "text 9": hs[2][0]}, {}),
    "the prompt after the hook": (
        lambda hs: {
            f"blocks.{i}.hook_resid_post{name}": own for i in range(N - 1)
            for name, own in (("[0]", hs[i + 1][0]), ("[1]", hs[i + 1][1, :4]))
        },
        {},
    ),
    "the prompt after the layer": (
        lambda hs: {
            f"layer{i}": {"p0": hs[i][0], "p1": hs[i][1, :4]} for i in range(N + 1)
        },
        {},
    ),
    "the prompt after some layers": (
        lambda hs: {
            f"layer_{i}/prompt_{n}": hs[i][n, : 6 - 2 * n] for i in (2, 3) for n in range(2)
        },
        {"depths": [2, 3]},
    ),
    "the prompt after one layer": (
        lambda hs: {"layer_2/prompt_0": hs[2][0], "layer_2/prompt_1": hs[2][1, :4]}, {}
    ),
    "[prompts, T, layers, D]": (
        lambda hs: {"states": torch.stack(hs, dim=2), "lengths": [6, 4]}, {}
    ),
    "prompts with masks of their own": (
        lambda hs: {
            "b": {"hidden": hs[2][1:], "attention_mask": torch.tensor([[1] * 4 + [0] * 2])},
            "a": {"hidden": hs[2][:1], "attention_mask": torch.ones(1, T), "input_ids": IDS[:1]},
        }, {}
    ),
    "hooks of named prompts": (
        lambda hs: {
            "a/blocks.1.hook_resid_post": hs[2][0], "a/blocks.2.hook_resid_post": hs[3][0],
            "b/blocks.1.hook_resid_post": hs[2][1, :4], "b/blocks.2.hook_resid_post": hs[3][1],
        },
        {},
    ),
    "padded on the right, with a mask": (
        lambda hs: {"hidden": hs[2], "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])},
        {},
    ),
    "a tuple of all depths, with a mask": (
        lambda hs: {
            "hidden_states": hs, "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
        },
        {},
    ),
    "padded on the left, with a mask": (
        lambda hs: {
            "hidden": torch.stack([hs[2][0], hs[2][1].roll(2, 0)]),
            "mask": torch.tensor([[1] * 6, [0] * 2 + [1] * 4]).bool(),
        },
        {},
    ),
    "padded on the left, with lengths": (
        lambda hs: torch.stack([hs[2][0], hs[2][1].roll(2, 0)]),
        {"lengths": [6, 4], "padding": "left"},
    ),
    "padded with nan": (lambda hs: padded(hs[2], torch.nan), {}),
    "a masked batch": (
        lambda hs: np.ma.masked_invalid(padded(hs[2], torch.nan).numpy()), {}
    ),
    "lengths beside": (
        lambda hs: {"hidden": padded(hs[2], 1.0), "seq_lens": torch.tensor([6, 4])}, {}
    ),
    "one after the other": (lambda hs: packed(hs[2]), {"lengths": [6, 4]}),
    "cumulative lengths": (
        lambda hs: {"hidden": packed(hs[2]), "cu_seqlens": torch.tensor([0, 6, 10])}, {}
    ),
    "positions of a packed batch": (
        lambda hs: {"hidden": packed(hs[2]), "position_ids": torch.tensor([*range(6), *range(4)])},
        {},
    ),
    "a nested tensor": (
        lambda hs: torch.nested.nested_tensor([hs[2][0], hs[2][1, :4]], layout=torch.jagged), {}
    ),
    "a packed sequence": (
        lambda hs: pack_padded_sequence(hs[2], torch.tensor([6, 4]), batch_first=True), {}
    ),
    "a table of named columns": (
        lambda hs: np.array(
            [(own.numpy(), [1] * 4 + [fill] * 2) for own, fill in zip(hs[2], (1, 0), strict=True)],
            dtype=[("hidden", "f4", (T, D)), ("attention_mask", "i8", (T,))],
        ), {}
    ),
    "[prompts, layers, T, D]": (
        lambda hs: {"states": torch.stack(hs, dim=1), "lengths": [6, 4]}, {}
    ),
    "[layer][prompt]": (
        lambda hs: [
            [torch.nn.functional.pad(own[0], (0, 0, 0, 1)),
             torch.nn.functional.pad(own[1, :4], (0, 0, 1, 0))] for own in hs
        ], {}
    ),
    "fairseq's states": (
        lambda hs: {"inner_states": [padded(own, 0.0).transpose(0, 1) for own in hs]}, {}
    ),
    "axes told": (
        lambda hs: torch.nn.functional.pad(hs[2][:, :4], (0, 0, 0, 2)).permute(1, 2, 0),
        {"axes": ["positions", "features", "prompts"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("held", "told"), TWO.values(), ids=TWO.keys())
def test_two_prompts_at_depth_two(
    held: Holds, told: dict[str, Any], hs: tuple[Tensor, ...]
) -> None:
    captured = read(held(hs), **told)
    if "axes" not in told:
        assert "2 prompts, 4 to 6 positions, depth 2, float32" in captured.understood
        assert torch.equal(captured.targets[0], hs[2][0])
    assert torch.equal(captured.targets[1], hs[2][1, :4])


def test_layers_that_are_named_once(hs: tuple[Tensor, ...]) -> None:
    vllm = {"hidden_states": torch.stack([hs[1][0], hs[2][0]], dim=1), "token_ids": IDS[0]}
    with pytest.raises(InputError, match=r"holds 2 layers .* --data.layout.depths, as \[4,8\]"):
        read(vllm)
    assert torch.equal(read(vllm, depths=[1, 2]).targets[0], hs[2][0])
    assert torch.equal(read(vllm, 1, depths=[1, 2]).targets[0], hs[1][0])
    with pytest.raises(InputError, match="holds depths 1, 2, and depth 3 is asked for"):
        read(vllm, 3, depths=[1, 2])
    both = torch.cat([hs[1][0], hs[2][0]], dim=-1)
    assert torch.equal(read(tuple(hs), (1, 2)).targets[0], both)
    assert torch.equal(read(cache_names(hs), (1, 2)).targets[0], both)


def test_the_last_entry_of_a_tuple_is_after_the_norm(hs: tuple[Tensor, ...]) -> None:
    assert torch.equal(read(tuple(hs), N, final_norm=True).targets[0], hs[N][0])
    names = {"blocks.3.hook_resid_post": hs[3][0], "ln_final.hook_normalized": hs[4][0]}
    assert torch.equal(read(names, N, final_norm=True).targets[0], hs[4][0])
    assert torch.equal(read(names, N).targets[0], hs[3][0])


def test_token_ids_are_reported(hs: tuple[Tensor, ...]) -> None:
    captured = read({"hidden_states": hs[2][0], "token_ids": IDS[1]})
    (warning,) = captured.warnings
    assert "holds token ids (token_ids) beside the hidden states" in warning
    assert captured.ids is None


MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
MASKS: dict[str, Tensor | list[list[int]]] = {
    "attn_mask": MASK,
    "attention_mask": MASK.tolist(),
    "an additive attention_mask": torch.where(MASK.bool(), 0.0, -torch.inf),
    "an attention_mask [B, 1, 1, T]": MASK.bool()[:, None, None],
    "an attention_mask [B, 1, T, T]": torch.where(
        MASK.bool()[:, None, None] & torch.ones(T, T).tril().bool(), 0.0, -1e38
    ),
    "input_mask": MASK.to(torch.uint8),
}  # fmt: skip


@pytest.mark.parametrize(("name", "mask"), MASKS.items(), ids=MASKS.keys())
def test_masks_of_every_kind(name: str, mask: Tensor, hs: tuple[Tensor, ...]) -> None:
    name = next(word for word in name.split() if word.endswith("mask"))
    captured = read({"hidden": hs[2], name: mask})
    assert [len(target) for target in captured.targets] == [6, 4]
    left = {"hidden": hs[2], name: torch.as_tensor(mask).flip(0)}
    assert [len(target) for target in read(left).targets] == [4, 6]


def test_a_mask_of_padding_is_refused_where_it_marks_some(hs: tuple[Tensor, ...]) -> None:
    with pytest.raises(InputError, match="where 1 may mark tokens or padding; save an attention_"):
        read({"hidden": hs[2], "key_padding_mask": MASK == 0})
    (target,) = read({"hidden": hs[2][:1], "key_padding_mask": torch.zeros(1, T).bool()}).targets
    assert torch.equal(target, hs[2][0])


def test_prompts_of_several_types_are_compared_as_the_coarsest(hs: tuple[Tensor, ...]) -> None:
    pair = [hs[2][0], hs[2][1, :4].bfloat16()]
    assert read(pair).storage.dtype == read(pair[::-1]).storage.dtype == "bfloat16"
    assert read([hs[2][0].half(), hs[2][1].double()]).storage.dtype == "float16"


REFUSED: dict[str, tuple[Holds, str]] = {
    "nothing": (lambda hs: [], "holds no tensor"),
    "another width": (lambda hs: torch.ones(3, 31), "features are 31 in the file and 32 in the"),
    "integers": (lambda hs: torch.ones(3, 32, dtype=torch.long), "holds int64; store floating"),
    "complex": (lambda hs: hs[2][0].cfloat(), "holds complex64"),
    "nan": (lambda hs: torch.tensor([[1.0, torch.nan] * 16]), "prompt 1 holds nan"),
    "only padding": (lambda hs: torch.zeros(3, 32), "all padding"),
    "no rows": (lambda hs: torch.zeros(0, 32), "is no row of features"),
    "a number": (lambda hs: torch.tensor(1.0), "is no row of features"),
    "positions first": (
        lambda hs: hs[2][0][:, None], "axes are not clear; set --data.layout.axes prompts,pos"
    ),
    "prompts or layers": (
        lambda hs: hs[2], r"shape \[2, 6, 32\], whose axes are not clear; set --data.layout.axes"
    ),
    "prompts or blocks": (lambda hs: [hs[2][0]] * N, "prompts or the outputs of 4 blocks"),
    "another depth": (
        lambda hs: {"blocks.2.hook_resid_post": hs[3][:1]},
        "depth 3 in 'blocks.2.hook_resid_post', and depth 2 is asked for; "
        "set --model.transformer.depth 3",
    ),
    "another index": (
        lambda hs: {"hidden_states": hs[4][0], "layer_idx": -1},
        "holds depth 4 in 'layer_idx', and depth 2 is asked for",
    ),
    "embeddings": (lambda hs: {"hidden_states.0": hs[0][0]}, "save the output of a block"),
    "some numbered layers": (
        lambda hs: {"layer_1": hs[1][0], "layer_2": hs[2][0]}, "may count blocks"
    ),
    "a part of a block": (
        lambda hs: {"blocks.1.hook_mlp_out": hs[2][0]}, "which is no residual stream"
    ),
    "keys": (
        lambda hs: {"keys": torch.ones(2, T, 8)},
        "holds keys of a cache; set --model.transformer.output keys",
    ),
    "keys without a name": (
        lambda hs: torch.ones(2, T, 8), "keys or values of a cache, 2 heads of 8; set"
    ),
    "a cache": (
        lambda hs: shared_tiny_model("llama")(IDS).past_key_values,
        "holds keys and values of a cache; set --model.transformer.output keys_values",
    ),
    "features first": (lambda hs: hs[2][0].T, "do not lie in its last axis"),
    "bits": (
        lambda hs: hs[2][0].bfloat16().view(torch.int16),
        "16-bit integers, which look like the bits of bfloat16; set --data.layout.dtype bfloat16",
    ),
    "a mask of others": (
        lambda hs: {"hidden": hs[2][:1], "mask": torch.ones(2, 6)}, "a mask of shape"
    ),
    "8-bit integers and scales": (
        lambda hs: {"q": hs[2][0].to(torch.int8), "scales": torch.ones(T, 1)},
        r"8-bit values \(q\) and scales; multiply them, store float32, .* --data.noise",
    ),
    "float8 and a scale": (
        lambda hs: {"q": hs[2][0].to(torch.float8_e4m3fn), "scale": torch.tensor(0.01)},
        "leave it out of the file, and set --data.scale 100",
    ),
    "depths or prompts": (
        lambda hs: {"2": hs[2][0], "3": hs[3][0]},
        r"named 2, 3, which may be depths or prompts; set --data.layout.depths \[2,3\]",
    ),
    "states of numbers": (
        lambda hs: {"hs_2": hs[2][0], "hs_3": hs[3][0]},
        r"named hs_2, hs_3, which may be depths or prompts; set --data.layout.depths \[2,3\]",
    ),
    "some layers of prompts": (
        lambda hs: {f"layer_{i}/prompt_{n}": hs[i][n] for i in (1, 2) for n in range(2)},
        "may count blocks",
    ),
    "a block too many": (
        lambda hs: {f"model.layers.{i}": hs[1][0] for i in range(N + 2)},
        r"holds 'model\.layers\.5', and the model has 4 blocks; give the model that made it",
    ),
    "words after some layers": (
        lambda hs: {f"layer_{i}_out": hs[i][0] for i in (2, 3)},
        "holds layer_2_out, layer_3_out, whose layers are not clear; end each name in the layer",
    ),
    "numbers in numbers": (
        lambda hs: {n: {i: hs[i][n] for i in (1, 2)} for n in range(2)}, "layers are not clear"
    ),
    "a module of a block": (
        lambda hs: {"model.layers.2.input_layernorm": hs[2][0]}, "which is no residual stream"
    ),
    "a mean beside": (
        lambda hs: {"hidden": hs[2][0], "mean": torch.ones(D)}, r"holds 'mean' of shape \[32\]"
    ),
    "the number of another layer": (
        lambda hs: {"hidden": hs[3][0], "layer": 3}, "holds layer 3, and depth 2 is asked for"
    ),
    "states and probabilities": (
        lambda hs: (hs[2][0], torch.ones(T)), "the features are 6 in the file and 32 in the model"
    ),
    "a mask of words": (
        lambda hs: {"hidden": hs[2][:1], "mask": ["a"]}, "'mask' is no mask; save numbers"
    ),
    "another numbered layer": (
        lambda hs: {"block_3": hs[4][0]}, "'block_3', and depth 2 is asked for; set .*depth 4 if"
    ),
    "a row of layers at a time": (
        lambda hs: [[layer[0, at] for layer in hs] for at in range(T)], "axes are not clear"
    ),
    "bytes that NumPy does not know": (
        lambda hs: hs[2][0].bfloat16().view(torch.int16).numpy().view("V2"), "the bits of bfloat16"
    ),
    "a sparse tensor": (lambda hs: hs[2][0].to_sparse(), "no dense tensor with values"),
    "only ids": (lambda hs: {"token_ids": IDS}, "holds token_ids, and no hidden states"),
    "objects": (lambda hs: [object()], "holds a object; give tensors"),
    "ragged lists": (lambda hs: [[1.0, 2.0], [1.0]], "lists of different lengths"),
}  # fmt: skip


@pytest.mark.parametrize(("held", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_clear_is_refused(held: Holds, message: str, hs: tuple[Tensor, ...]) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        read(held(hs))
    assert str(refusal.value).startswith("hidden_states")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_bits_of_floating_types(dtype: str, hs: tuple[Tensor, ...]) -> None:
    rounded = hs[2][0].to(getattr(torch, dtype))
    integers = torch.uint8 if "8" in dtype else torch.uint16
    for held, told in ((rounded, {}), (rounded.view(integers), {"dtype": dtype})):
        captured = read(held, **told)
        assert captured.storage.dtype == dtype
        assert torch.equal(captured.target(0), rounded.float())


def test_rounded_values_in_float32_are_recognised(hs: tuple[Tensor, ...]) -> None:
    assert read(hs[2][0].bfloat16().float()).storage.dtype == "bfloat16"
    assert read(hs[2][0].half().double()).storage.dtype == "float16"
    assert read(hs[2][0]).storage.dtype == "float32"


def test_a_factor_is_divided_out(hs: tuple[Tensor, ...]) -> None:
    request = Request((2,), False, shape, scale=0.5)
    captured = Captured.of_objects(hs[2][0] * 0.5, request)
    assert torch.equal(captured.target(0), hs[2][0])
    half = torch.randn(3, D)
    assert torch.equal(captured.storage(half), half)


# -- files -----------------------------------------------------------------------------------


def numpy_file(path: Path, *arrays: Any, **named: Any) -> Path:
    with path.open("wb") as file:
        np.save(file, arrays[0]) if arrays else np.savez(file, **named)
    return path


def write(path: Path, held: Any) -> Path:
    torch.save(held, path)
    return path


def text(path: Path, held: str) -> Path:
    path.write_text(held)
    return path


def with_header_of(path: Path, size: int, tensor: Tensor) -> Path:
    """A safetensors file whose header has so many bytes."""
    data = tensor.contiguous().numpy().tobytes()
    entry = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [0, len(data)]}
    header = json.dumps({"hidden": entry}).encode().ljust(size)
    assert len(header) == size
    path.write_bytes(struct.pack("<Q", size) + header + data)
    return path


FILES: dict[str, Callable[[Path, tuple[Tensor, ...]], Path]] = {
    "pt of a tensor": lambda p, hs: write(p / "x.pt", hs[2][:1]),
    "pt of the tuple": lambda p, hs: write(p / "x.bin", tuple(layer[:1] for layer in hs)),
    "pt of a parameter": lambda p, hs: write(p / "x.pth", torch.nn.Parameter(hs[2][0])),
    "npy": lambda p, hs: numpy_file(p / "x.npy", hs[2][0].numpy()),
    "npy in Fortran's order": lambda p, hs: numpy_file(
        p / "x.npy", np.asfortranarray(hs[2][0].numpy())
    ),
    "npz": lambda p, hs: numpy_file(p / "x.npz", hidden=hs[2][0].numpy()),
    "JSON lists": lambda p, hs: text(p / "x.json", json.dumps(hs[2][0].tolist())),
    "a server's JSON": lambda p, hs: text(
        p / "x.json",
        json.dumps({"meta_info": {"hidden_states": hs[2][0].tolist()}, "output_ids": [1, 2]}),
    ),
    "JSON Lines": lambda p, hs: text(
        p / "x.jsonl", "\n".join(json.dumps(row) for row in hs[2][0].tolist())
    ),
    "a header as long as the code of a brace": lambda p, hs: with_header_of(
        p / "x.safetensors", ord("{"), hs[2][0]
    ),
    "the wrong suffix": lambda p, hs: numpy_file(p / "x.safetensors", hidden=hs[2][0].numpy()),
}


@pytest.mark.parametrize("file", FILES.values(), ids=FILES.keys())
def test_files_of_each_kind(file: Any, hs: tuple[Tensor, ...], tmp_path: Path) -> None:
    (target,) = read_file(file(tmp_path, hs)).targets
    assert torch.equal(target, hs[2][0])


def test_safetensors_of_any_name(hs: tuple[Tensor, ...], tmp_path: Path) -> None:
    save_file({"hidden": hs[2][0].contiguous()}, tmp_path / "x.safetensors")
    assert torch.equal(read_file(tmp_path / "x.safetensors").targets[0], hs[2][0])


def test_the_folder_of_sipit(hs: tuple[Tensor, ...], tmp_path: Path) -> None:
    (tmp_path / "tensors").mkdir()
    (tmp_path / "manifest.json").write_text(json.dumps({"layer_idx": 2, "model": "m"}))
    write(tmp_path / "tensors" / "prompt.pt", {"hidden_states": hs[2][:1], "input_ids": IDS[0]})
    captured = read_file(tmp_path)
    assert torch.equal(captured.targets[0], hs[2][0])
    assert captured.warnings
    with pytest.raises(InputError, match="holds depth 2 in"):
        read_file(tmp_path, 1)


def test_a_folder_with_a_file_for_each_row(hs: tuple[Tensor, ...], tmp_path: Path) -> None:
    """In the order of the numbers, in which 10 comes after 9."""
    rows = hs[2].flatten(0, 1)
    for number, row in enumerate(rows):
        numpy_file(tmp_path / f"token_{number}.npy", row.numpy())
    assert torch.equal(read_file(tmp_path).targets[0], rows)


def files_of_layers(folder: Path, hs: tuple[Tensor, ...]) -> None:
    for depth, own in enumerate(hs):
        torch.save(own[0].clone(), folder / f"layer_{depth}.pt")


def files_of_hooks(folder: Path, hs: tuple[Tensor, ...]) -> None:
    for depth, own in enumerate(hs[1:]):
        np.save(folder / f"blocks.{depth}.hook_resid_post.npy", own[:1].numpy())


def files_of_layers_with_ids(folder: Path, hs: tuple[Tensor, ...]) -> None:
    for depth, own in enumerate(hs):
        held = {"hidden_states": own[0].clone(), "input_ids": IDS[0]}
        save_file(held, folder / f"layer_{depth}.safetensors")


def files_of_some_hooks(folder: Path, hs: tuple[Tensor, ...]) -> None:
    for number, depths in enumerate(((1, 2), (3,))):
        held = {f"blocks.{depth - 1}.hook_resid_post": hs[depth][:1].clone() for depth in depths}
        save_file(held, folder / f"states-{number}.safetensors")


def a_file_of_the_mask(folder: Path, hs: tuple[Tensor, ...]) -> None:
    np.save(folder / "hidden_states.npy", torch.cat([hs[2][:1], hs[2][:1]], 1).numpy())
    np.save(folder / "attention_mask.npy", np.array([[1] * T + [0] * T]))


@pytest.mark.parametrize(
    "files",
    [
        files_of_layers,
        files_of_hooks,
        files_of_some_hooks,
        files_of_layers_with_ids,
        a_file_of_the_mask,
    ],
)
def test_a_folder_whose_files_are_named(
    files: Callable[[Path, tuple[Tensor, ...]], None], hs: tuple[Tensor, ...], tmp_path: Path
) -> None:
    files(tmp_path, hs)
    (target,) = read_file(tmp_path).targets
    assert torch.equal(target, hs[2][0])


def test_some_layers_in_a_folder_are_refused(hs: tuple[Tensor, ...], tmp_path: Path) -> None:
    for depth in (1, 2):
        torch.save(hs[depth][0].clone(), tmp_path / f"layer_{depth}.pt")
    with pytest.raises(InputError, match="may count blocks"):
        read_file(tmp_path)
    assert torch.equal(read_file(tmp_path, depths=[1, 2]).targets[0], hs[2][0])


def test_a_folder_with_a_file_for_each_request(hs: tuple[Tensor, ...], tmp_path: Path) -> None:
    for number in (0, 1):
        held = {"hidden_states": hs[2][number][:, None].contiguous(), "token_ids": IDS[number]}
        save_file(held, tmp_path / f"{number}.safetensors")
    captured = read_file(tmp_path)
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(captured.targets, hs[2], strict=True)
    )


class Harmful:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return open, ("unpickled", "w")


def holding_itself() -> list[Any]:
    held: list[Any] = [torch.ones(3, 32)]
    held.append(held)
    return held


def damaged(data: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        (path / "x").write_bytes(data)
        return path / "x"

    return make


def zipped(names: dict[str, bytes], packing: int = zipfile.ZIP_STORED) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", packing) as archive:
        for name, data in names.items():
            archive.writestr(name, data)
    return held.getvalue()


def numpy_header(dtype: str, size: str) -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({size},)}}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


PACKED = zipped({"a.npy": numpy_header("<f4", "32") + bytes(128)}, zipfile.ZIP_DEFLATED)
"""Its data begins at byte 35."""
BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no file": (lambda p: p / "none.pt", "No such file"),
    "an empty file": (damaged(b""), "is damaged"),
    "text": (damaged(b"0.1\n0.2,0.3\n"), "is text; give a .safetensors, .npy"),
    "MATLAB's file": (damaged(b"MATLAB 5.0 MAT-file"), "is a MATLAB file; give a .safetensors"),
    "Zarr": (lambda p: text(p / ".zarray", "{}").parent, "is a Zarr store; give a .safetensors"),
    "no JSON": (damaged(b'{"a": '), "is not JSON"),
    "HDF5": (damaged(b"\x89HDF\r\n\x1a\n"), "is an HDF5 file; give a .safetensors, .npy"),
    "Parquet": (damaged(b"PAR1 PAR1"), "is a Parquet file; give a .safetensors, .npy"),
    "gzip": (damaged(b"\x1f\x8b\x08"), "is packed by gzip; give a .safetensors, .npy"),
    "a header of terabytes": (damaged(struct.pack("<Q", 2**62) + b"{}"), "is damaged"),
    "a cut header": (damaged(struct.pack("<Q", 90) + b"{}"), "is damaged"),
    "a cut pickle": (damaged(b"\x80\x02}q\x00"), "is damaged"),
    "a cut zip": (damaged(zipped({"a.npy": b"1"})[:-20]), "is damaged"),
    "a zip that is packed wrongly": (
        damaged(PACKED[:35] + b"\7" + PACKED[36:]), "is damaged"
    ),
    "numbers of 128 bits": (
        lambda p: numpy_file(p / "x", np.ones((3, 32), np.longdouble)), "NumPy values of type"
    ),
    "an empty zip": (damaged(zipped({"a.txt": b""})), "is a zip without arrays"),
    "an array that is cut": (damaged(numpy_header("<f4", "10**9,32")), "is damaged"),
    "an array of petabytes": (damaged(numpy_header("<f4", "1000000000000000,32")), "is damaged"),
    "an array of petabytes, zipped": (
        damaged(zipped({"a.npy": numpy_header("<f4", "1000000000000000,32")})), "is damaged"
    ),
    "an array of objects": (
        lambda p: numpy_file(p / "x", np.array([Harmful()], dtype=object)), "holds Python objects"
    ),
    "arrays of objects": (
        lambda p: numpy_file(p / "x", hidden=np.array([Harmful()])), "holds Python objects"
    ),
    "a pickle": (lambda p: write(p / "x", Harmful()), "holds more than tensors"),
    "text in an array": (
        lambda p: numpy_file(p / "x", np.array([["a"]])), "NumPy values of type"
    ),
    "lists of another width": (
        lambda p: text(p / "x.json", "[[NaN, 1], [2, 3]]"), "the features are 2 in the file and 32"
    ),
    "lists of lengths": (lambda p: text(p / "x.json", "[[1, 2], [1]]"), "of different lengths"),
    "a list that holds itself": (
        lambda p: write(p / "x.pt", holding_itself()), "holds itself, or is nested too deep"
    ),
    "a tensor without values": (
        lambda p: write(p / "x.pt", torch.empty(3, 32, device="meta")), "no dense tensor"
    ),
    "a sparse tensor": (
        lambda p: write(p / "x.pt", torch.ones(3, 32).to_sparse()), "no dense tensor"
    ),
    "an empty folder": (lambda p: p, "a folder without files of tensors"),
    "a folder with a damaged file": (
        lambda p: (p / "a.npy").write_bytes(b"\x93NUMPY") and p, "'a.npy' is damaged"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD.keys())
def test_bad_files_end_in_a_sentence_and_run_nothing(
    make: Callable[[Path], Path], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as refusal:
        read_file(make(tmp_path))
    sentence = str(refusal.value)
    assert "\n" not in sentence
    assert str(tmp_path) in sentence
    assert not (tmp_path / "unpickled").exists()


def test_the_data_module_reads_the_model_and_the_depth_of_the_command(
    hs: tuple[Tensor, ...], tiny_folder: Path, tmp_path: Path, messages: list[str]
) -> None:
    path = write(tmp_path / "x.pt", {"hidden_states": hs, "input_ids": IDS})
    data = PromptDataModule(targets=str(path), tokenizer=str(tiny_folder), depth=3)
    data.setup()
    assert messages[0] == (
        "x.pt: 2 prompts, 6 positions, depth 3, float32, entry of 5 hidden states."
    )
    assert "token ids (input_ids)" in messages[1]
    (batch,) = data.batches
    assert batch.ids is None
    assert torch.equal(batch.target, hs[3])


def test_a_known_prefix_as_text(tiny_folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "x.pt", torch.ones(3, D))
    data = PromptDataModule(
        targets=str(path), tokenizer=str(tiny_folder), known_prefix="The", first_position=1
    )
    assert data.captured is not None
    assert len(data.captured.known_prefix) >= 1
    assert data.captured.first_position == 1
    with pytest.raises(InputError, match="unknown tokens before it"):
        PromptDataModule(targets=str(path), tokenizer=str(tiny_folder), first_position=1)
