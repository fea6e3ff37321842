"""Hidden states of SmolLM2 as other tools hold them, at depth 8: every token verified."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from lightning_inversion.__main__ import main as run
from lightning_inversion.recovery.diagnosis import diagnose
from lightning_inversion.recovery.measurements import Measurements
from lightning_inversion.recovery.variants import OtherCuts
from lightning_inversion.transformer.language_model import LanguageModel
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.truncated import TruncatedTransformer

pytestmark = pytest.mark.integration

DEPTH = 8
COUNT = 3
"""Prompts of each test; each is a prompt of ``configs/prompts.txt``."""
ROOT = Path(__file__).parents[2]


class Captured:
    """The real model, prompts, and its hidden states of each ``[T, D]``, by depth."""

    def __init__(self, count: int = COUNT) -> None:
        self.transformer, self.model = TransformerSpec(depth=DEPTH).load_with_head()
        tokenizer = self.transformer.tokenizer
        assert tokenizer is not None
        self.prompts = (ROOT / "configs" / "prompts.txt").read_text().splitlines()[:count]
        self.ids = [tokenizer(prompt)["input_ids"] for prompt in self.prompts]
        self.states = [self.of(self.model, ids) for ids in self.ids]

    @torch.no_grad()
    def of(self, model: Any, ids: list[int]) -> tuple[Tensor, ...]:
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        return tuple(layer[0] for layer in states)

    def at(self, depths: tuple[int, ...], final_norm: bool) -> TruncatedTransformer:
        return TruncatedTransformer.from_model(self.model, layers=depths, final_norm=final_norm)


@pytest.fixture(scope="module")
def captured() -> Captured:
    return Captured()


def folded(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model as TransformerLens folds it: each norm's weights in the layers that read it."""
    other = copy.deepcopy(model)
    for block in other.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for norm, readers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            for reader in readers:
                reader.weight.mul_(norm.weight)
            norm.weight.fill_(1.0)
    return other


def hooks(states: tuple[Tensor, ...], change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {f"blocks.{i}.hook_resid_pre": change(states[i])[None] for i in range(len(states) - 1)}


def as_is(states: Tensor) -> Tensor:
    return states


def centred(states: Tensor) -> Tensor:
    return states - states.mean(-1, keepdim=True)


def plain(captured: Captured, path: Path) -> list[str]:
    torch.save([states[DEPTH] for states in captured.states], path)
    return []


def the_tuple(captured: Captured, path: Path) -> list[str]:
    torch.save([tuple(layer[None] for layer in states) for states in captured.states], path)
    return []


def transformer_lens(captured: Captured, path: Path) -> list[str]:
    torch.save([hooks(states, as_is) for states in captured.states], path)
    return []


def transformer_lens_folded_and_centred(captured: Captured, path: Path) -> list[str]:
    with torch.no_grad():
        model = folded(captured.model)
    torch.save([hooks(captured.of(model, ids), centred) for ids in captured.ids], path)
    return ["--data.centred=true"]


def vllm(captured: Captured, path: Path) -> list[str]:
    path.mkdir()
    for number, (states, ids) in enumerate(zip(captured.states, captured.ids, strict=True)):
        wrong = torch.tensor(ids).flip(0)  # whatever they are, they must not be used
        held = {"hidden_states": torch.stack([states[4], states[DEPTH]], dim=1), "token_ids": wrong}
        save_file(held, path / f"{number:02}.safetensors")
    return ["--data.layout.depths=[4,8]"]


def left_padded(captured: Captured, path: Path) -> list[str]:
    longest = max(map(len, captured.ids))
    pads = [longest - len(ids) for ids in captured.ids]
    ids = torch.tensor([[0] * n + own for n, own in zip(pads, captured.ids, strict=True)])
    mask = (torch.arange(longest) >= torch.tensor(pads)[:, None]).long()
    with torch.no_grad():
        output = captured.model(ids, attention_mask=mask, output_hidden_states=True)
    torch.save({"hidden": output.hidden_states[DEPTH], "attention_mask": mask}, path)
    return []


def behind_a_known_prefix(captured: Captured, path: Path) -> list[str]:
    first = captured.ids[0]
    torch.save([captured.states[0][DEPTH][5:]], path)
    return [f"--data.known_prefix={json.dumps(first[:5])}", "--data.first_position=5"]


TOOLS = (
    plain, the_tuple, transformer_lens, transformer_lens_folded_and_centred, vllm, left_padded,
    behind_a_known_prefix,
)  # fmt: skip


def predicted(path: Path, root: Path, options: list[str], depth: int = DEPTH) -> list[dict]:
    words = ["predict", f"--data.targets={path}", f"--model.transformer.depth={depth}", *options]
    assert run([*words, f"--trainer.default_root_dir={root}", "--trainer.accelerator=cpu"]) == 0
    rows = (root / "lightning_logs" / "version_0" / "results.jsonl").read_text().splitlines()
    return [json.loads(row) for row in rows]


@pytest.mark.parametrize("save", TOOLS, ids=lambda save: save.__name__)
def test_every_token_is_verified(
    save: Callable[[Captured, Path], list[str]],
    captured: Captured,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = save(captured, tmp_path / "states")
    rows = predicted(tmp_path / "states", tmp_path, options)
    assert [row["recovered_ids"] for row in rows] == captured.ids[: len(rows)]
    assert all(row["verified"] for row in rows)
    message = capsys.readouterr().err
    assert "states: " in message
    assert ("holds token ids" in message) is (save is vllm)


def planted(states: tuple[Tensor, ...], norm: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """A mistake, and what names it; None where there is none."""
    own, noise = states[DEPTH], torch.Generator().manual_seed(0)
    return {
        "none": (own, None),
        "none, in bfloat16": (own.bfloat16().float(), None),
        "one block less": (
            states[DEPTH - 1],
            "fit depth 7, not 8; set --model",
        ),
        "one block more": (
            states[DEPTH + 1],
            "fit depth 9, not 8; set --model",
        ),
        "after the norm": (norm(own), "set --model.transformer.final_norm true"),
        "centred": (centred(own), "set --data.centred true"),
        "halved": (own / 2, "set --data.scale 0.5"),
        "later": (own[5:], "row 0 is no first position"),
        "padding on the left": (torch.cat([own[3:5], own]), "row 2 fits as the first position"),
        "a difference": (own - own.flip(0), "nor would one at another depth"),
        "no text": (torch.randn(own.shape, generator=noise), "nor would one at another depth"),
    }


def test_planted_mistakes_are_named(captured: Captured) -> None:
    transformer = captured.transformer
    measurements = Measurements.measure(
        transformer, LanguageModel(captured.model, transformer.caches)
    )
    cuts, norm = OtherCuts(captured.at, 30), captured.model.model.norm
    for states in captured.states:
        with torch.no_grad():
            cases = planted(states, norm)
        for kind, (target, named) in cases.items():
            channel = None
            (found,) = diagnose(measurements, target[None], [len(target)], cuts, channel)
            if named is None:
                assert found is None or found.near, kind  # rounding that nobody told of
            else:
                assert named in str(found), kind


def test_the_wrong_depth_ends_in_a_sentence_and_names_nothing(
    captured: Captured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(captured.states[0][DEPTH - 1], tmp_path / "states.pt")
    words = ["predict", f"--data.targets={tmp_path / 'states.pt'}", "--model.transformer.depth=8"]
    assert run([*words, f"--trainer.default_root_dir={tmp_path}"]) == 2
    message = capsys.readouterr().err
    assert "the features fit depth 7, not 8; set --model.transformer.depth 7." in message
    assert not list(tmp_path.rglob("results.jsonl"))
