"""Blocks taken apart: each part is gone when asked for, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lightning_inversion.errors import InputError
from lightning_inversion.transformer import Surgery, TransformerSpec, TruncatedTransformer
from lightning_inversion.transformer.prefix import FixedPrefix
from lightning_inversion.transformer.surgery import FAMILIES as ROWS
from lightning_inversion.transformer.surgery import family_of
from tests.tiny import FAMILIES, each, shared_tiny_model, tiny_model

IDS = torch.tensor([[5, 9, 77, 120, 33], [4, 3, 2, 1, 6]])
DISMANTLED = [family for family in FAMILIES if family not in {"bloom", "mpt"}]


def cut(model: PreTrainedModel, depth: int = 1, **parts: Any) -> torch.Tensor:
    transformer = TruncatedTransformer.from_model(model, depth=depth, surgery=Surgery(**parts))
    return transformer.features_of(IDS)


def hidden(model: PreTrainedModel, depth: int) -> torch.Tensor:
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states
    result: torch.Tensor = states[depth]
    return result


def blocks_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    from lightning_inversion.transformer.blocks import find_blocks, without_head

    return list(find_blocks(without_head(model)).blocks)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 2e-5 * (1 + expected.abs().max()))


def test_each_tiny_family_has_a_row() -> None:
    assert set(FAMILIES) == set(ROWS)


@each(DISMANTLED)
def test_without_mlps(family: str) -> None:
    model = tiny_model(family)
    found = cut(model, 2, mlp=False)
    row = family_of(model.config, "mlp")
    for block in blocks_of(model):
        last = block.get_submodule(row.mlp[-1])
        last.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    assert close(found, hidden(model, 2))
    assert not close(found, hidden(tiny_model(family), 2))


@each(FAMILIES)
def test_without_norms(family: str) -> None:
    model = tiny_model(family)
    found = cut(model, 1, norms=False)
    for block in blocks_of(model):
        for name in family_of(model.config, "norms").norms:
            if hasattr(block, name):
                block.get_submodule(name).register_forward_hook(
                    lambda module, inputs, output: inputs[0]
                )
    assert close(found, hidden(model, 1))


@each(DISMANTLED)
def test_attention_alone_is_what_attention_adds(family: str) -> None:
    model = shared_tiny_model(family)
    alone = cut(model, mlp=False, residuals=False)
    assert close(alone + hidden(model, 0), cut(model, mlp=False))


@each(DISMANTLED)
def test_without_residuals(family: str) -> None:
    model = tiny_model(family)
    found = cut(model, residuals=False)
    row = family_of(model.config, "residuals")
    if row.middle is None:
        assert close(found + hidden(model, 0), hidden(model, 1))
        return
    # In the model itself, take the block's input out of what the MLP's side is given.
    block = blocks_of(model)[0]
    attention = cut(model, mlp=False, residuals=False)
    outputs: dict[str, torch.Tensor] = {}
    block.get_submodule(row.middle).register_forward_pre_hook(
        lambda module, inputs: (attention.reshape_as(inputs[0]),)
    )
    block.get_submodule(row.mlp[-1]).register_forward_hook(
        lambda module, inputs, output: outputs.update(mlp=output)
    )
    hidden(model, 1)
    assert close(found, outputs["mlp"].reshape_as(found))


def test_the_sources_self_attention_alone() -> None:
    model = tiny_model("llama", "eager")
    found = cut(model, 2, mlp=False, norms=False, residuals=False)
    base = model.base_model
    with torch.no_grad():
        x = base.embed_tokens(IDS)
        rotary = base.rotary_emb(x, torch.arange(5)[None])
        mask = torch.full((5, 5), torch.finfo(x.dtype).min).triu(1)[None, None]
        for layer in base.layers[:2]:
            x = layer.self_attn(x, position_embeddings=rotary, attention_mask=mask)[0]
    assert close(found, x)


@each(DISMANTLED)
def test_without_positions_order_before_a_token_is_nothing(family: str) -> None:
    """The last token's features do not change when the tokens before it are permuted."""
    model = shared_tiny_model(family)
    shuffled = IDS[:, [2, 0, 3, 1, 4]]
    for positions in ("first", "none"):
        transformer = TruncatedTransformer.from_model(
            model,
            depth=1,
            surgery=Surgery(positions=positions),  # type: ignore[arg-type]
        )
        ours = transformer.features_of(IDS)[:, -1]
        assert close(transformer.features_of(shuffled)[:, -1], ours)
        assert not close(transformer.features_of(IDS.flip(1))[:, -1], ours)
    own = TruncatedTransformer.from_model(model, depth=1)
    assert not close(own.features_of(shuffled)[:, -1], own.features_of(IDS)[:, -1])


@each(DISMANTLED)
def test_the_first_position_is_right_for_the_first_token(family: str) -> None:
    model = shared_tiny_model(family)
    assert close(cut(model, positions="first")[:, 0], cut(model)[:, 0])
    learned = ROWS[family].position_embedding is not None
    assert close(cut(model, positions="none")[:, 0], cut(model)[:, 0]) != learned


def test_the_sources_first_position_in_gpt2() -> None:
    model = tiny_model("gpt2")
    found = cut(model, 1, positions="first")
    weight = model.base_model.wpe.weight
    with torch.no_grad():
        weight.copy_(weight[:1].expand_as(weight))
    assert close(found, hidden(model, 1))


@each(FAMILIES)
def test_without_causality_every_token_sees_every_other(family: str) -> None:
    model = shared_tiny_model(family)
    if family in {"gpt_neo", "bloom"}:
        with pytest.raises(InputError, match=r"--model\.transformer\.causal:"):
            cut(model, causal=False)
        return
    transformer = TruncatedTransformer.from_model(model, depth=2, surgery=Surgery(causal=False))
    features = transformer.features_of(IDS)
    changed = IDS.clone()
    changed[:, -1] = 50
    assert not close(transformer.features_of(changed)[:, 0], features[:, 0])
    mask = torch.arange(7)[None] < torch.tensor([[5], [5]])
    padded = torch.cat([IDS, torch.full((2, 2), 8)], dim=1)
    assert close(transformer.features_of(padded, mask)[:, :5], features)
    assert not transformer.caches
    embeds = transformer.embedding(IDS)
    found = transformer.candidates(embeds[:, :4], torch.tensor([4, 4]), embeds[:, 4:])
    assert close(found[:, 0], features[:, -1])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_first_block_instead_of_each(family: str) -> None:
    model = tiny_model(family)
    found = cut(model, 3, repeat_first=True)
    blocks = blocks_of(model)
    for block in blocks[1:3]:
        block.load_state_dict(blocks[0].state_dict())
    assert close(found, hidden(model, 3))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "parts",
    [
        {"mlp": False, "residuals": False},
        {"positions": "first"},
        {"positions": "none"},
        {"repeat_first": True},
    ],
)
def test_candidates_after_surgery_are_run_behind_kept_keys(
    family: str, parts: dict[str, Any]
) -> None:
    transformer = TruncatedTransformer.from_model(
        shared_tiny_model(family), depth=3, surgery=Surgery(**parts)
    )
    assert transformer.caches
    prefix, rows = FixedPrefix(transformer, 2), torch.arange(2)
    embeds = transformer.embedding(IDS)
    prefix.begin(rows, embeds, torch.tensor([2, 2]))
    prefix.candidates(rows, embeds[:, 2:])
    prefix.keep(rows, torch.tensor([0, 0]))
    found = prefix.candidates(rows, embeds[:, 3:])
    assert close(found[:, 0], transformer.features_of(IDS)[:, 3])


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj"])
def test_gradients_reach_the_input_through_every_surgery(family: str) -> None:
    model = tiny_model(family)
    for parts in ({"mlp": False}, {"norms": False}, {"residuals": False}, {"positions": "none"}):
        transformer = TruncatedTransformer.from_model(model, depth=2, surgery=Surgery(**parts))
        leaf = transformer.embedding(IDS).requires_grad_()
        transformer(leaf).square().sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.abs().sum() > 0


@pytest.mark.parametrize("option", ["mlp", "residuals"])
@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_families_that_cannot_do_without_give_the_reason(family: str, option: str) -> None:
    with pytest.raises(InputError, match=rf"--model\.transformer\.{option}: .* because"):
        cut(shared_tiny_model(family), **{option: False})


def test_alibi_has_no_positions_to_leave_out() -> None:
    with pytest.raises(InputError, match=r"--model\.transformer\.positions:"):
        cut(tiny_model("bloom"), positions="none")


def test_an_unknown_family_names_the_row_to_add(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ROWS, "llama")
    with pytest.raises(InputError, match=r"add a row 'llama' to FAMILIES"):
        cut(tiny_model("llama"), mlp=False)


def test_surgery_leaves_the_callers_model(tiny_folder: Path) -> None:
    model = tiny_model("llama")
    before = hidden(model, 2)
    structure = repr(model)
    cut(model, 2, mlp=False, norms=False, residuals=False, positions="none")
    assert repr(model) == structure
    assert torch.equal(hidden(model, 2), before)


def test_an_untrained_embedding_instead_of_the_own(tiny_folder: Path) -> None:
    spec = {"model": str(tiny_folder), "embedding": "untrained"}
    swapped = TransformerSpec(**spec, embedding_seed=3).load()  # type: ignore[arg-type]
    own = TransformerSpec(model=str(tiny_folder)).load()
    assert not torch.equal(swapped.embedding.matrix, own.embedding.matrix)
    embeds = own.embedding(IDS)
    assert torch.equal(swapped(embeds), own(embeds))
    untrained = TransformerSpec(model=str(tiny_folder), weights="untrained", weights_seed=3).load()
    assert torch.equal(swapped.embedding.matrix, untrained.embedding.matrix)


def test_the_spec_passes_surgery_on(tiny_folder: Path) -> None:
    transformer = TransformerSpec(
        model=str(tiny_folder), depth=2, mlp=False, norms=False, residuals=False
    ).load()
    assert transformer.description["mlp"] is False
    model = tiny_model("llama")
    expected = cut(model, 2, mlp=False, norms=False, residuals=False)
    assert close(transformer.features_of(IDS), expected)
