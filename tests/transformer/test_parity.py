"""Truncated features are Hugging Face's hidden states: each family, eager and SDPA."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_inversion.transformer import TruncatedTransformer
from tests.tiny import (
    BLOCKS,
    CONFIGS,
    FAMILIES,
    FEW,
    VOCABULARY,
    each,
    shared_tiny_model,
    tiny_model,
)

DEPTH = 2
EAGER_ONLY = {"gptj", "gpt_neo", "gemma2", "bloom", "mpt"}
CASES = [
    (family, attention)
    for family in FAMILIES
    for attention in ("sdpa", "eager")
    if attention == "eager" or family not in EAGER_ONLY
]
families = each(FAMILIES)
cases = pytest.mark.parametrize(
    ("family", "attention"),
    [
        pytest.param(*case, marks=() if case[0] in FEW else pytest.mark.integration)
        for case in CASES
    ],
)


def ids_of(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed)
    )


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


@cases
def test_features_are_the_hidden_states(family: str, attention: str) -> None:
    model = shared_tiny_model(family, attention)
    transformer = TruncatedTransformer.from_model(model, depth=DEPTH)
    for ids in (ids_of(1, 7), ids_of(3, 7)):
        with torch.no_grad():
            expected = model(ids, output_hidden_states=True).hidden_states[DEPTH]
        assert torch.equal(transformer.features_of(ids), expected)


@cases
def test_gradients_are_the_models(family: str, attention: str) -> None:
    model = tiny_model(family, attention)
    transformer = TruncatedTransformer.from_model(model, depth=DEPTH)
    embeds = transformer.embedding(ids_of(2, 5))
    ours = embeds.clone().requires_grad_()
    transformer(ours).sin().sum().backward()
    theirs = embeds.clone().requires_grad_()
    hidden = model(inputs_embeds=theirs, output_hidden_states=True).hidden_states[DEPTH]
    hidden.sin().sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert close(ours.grad, theirs.grad)


@cases
def test_padded_rows_are_the_rows_alone(family: str, attention: str) -> None:
    transformer = TruncatedTransformer.from_model(shared_tiny_model(family, attention), depth=DEPTH)
    lengths = torch.tensor([7, 4, 1])
    ids = ids_of(3, 7)
    mask = torch.arange(7) < lengths[:, None]
    features = transformer.features_of(ids, mask)
    for row, length in enumerate(lengths):
        alone = transformer.features_of(ids[row : row + 1, :length])
        assert close(features[row, :length], alone[0])
        assert not features[row, length:].any()


@cases
def test_padding_has_no_influence_and_no_gradient(family: str, attention: str) -> None:
    transformer = TruncatedTransformer.from_model(shared_tiny_model(family, attention), depth=DEPTH)
    mask = torch.tensor([[True] * 3 + [False] * 2])
    embeds = transformer.embedding(ids_of(1, 5))
    other = embeds.clone()
    other[:, 3:] = float("nan")
    assert torch.equal(transformer(embeds, mask), transformer(other, mask))
    leaf = embeds.clone().requires_grad_()
    transformer(leaf, mask).square().sum().backward()
    assert leaf.grad is not None
    assert leaf.grad[:, :3].any()
    assert not leaf.grad[:, 3:].any()


@families
def test_all_blocks_and_the_final_norm_are_the_last_hidden_state(family: str) -> None:
    model = shared_tiny_model(family, "eager")
    transformer = TruncatedTransformer.from_model(model, final_norm=True)
    ids = ids_of(2, 5)
    with torch.no_grad():
        expected = model.base_model(ids).last_hidden_state
    assert transformer.depth == BLOCKS
    assert torch.equal(transformer.features_of(ids), expected)


@families
def test_from_model_leaves_the_model_as_it_was(family: str) -> None:
    model = tiny_model(family, "eager").train()
    ids = ids_of(1, 4)
    config = copy.deepcopy(model.config.to_dict())
    modes = [module.training for module in model.modules()]
    structure = repr(model)
    model.eval()
    with torch.no_grad():
        before = model(ids).logits
    model.train()
    transformer = TruncatedTransformer.from_model(model, depth=1)
    transformer.features_of(ids)
    assert repr(model) == structure
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.config.to_dict() == config
    assert not any(module._forward_hooks for module in model.modules())
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


@families
def test_from_model_shares_the_weights(family: str) -> None:
    model = shared_tiny_model(family, "eager")
    transformer = TruncatedTransformer.from_model(model, depth=2)
    theirs = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in transformer.parameters()} <= theirs
    scaled = family.startswith("gemma")
    assert (transformer.embedding.matrix.data_ptr() in theirs) != scaled


@families
def test_only_the_input_has_a_gradient(family: str) -> None:
    transformer = TruncatedTransformer.from_model(shared_tiny_model(family, "eager"), depth=1)
    embeds = transformer.embedding(ids_of(1, 3)).requires_grad_()
    transformer(embeds).sum().backward()
    assert embeds.grad is not None
    assert not any(parameter.requires_grad for parameter in transformer.parameters())
    assert all(parameter.grad is None for parameter in transformer.parameters())
    assert not any(module.training for module in transformer.train().modules())


@families
def test_untrained_weights_follow_the_models_own_rules(family: str) -> None:
    """Every parameter and buffer is initialised, with the spread transformers gives it."""
    from lightning_inversion.transformer.untrained import untrained_model

    config: Any = CONFIGS[family]()
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ours = untrained_model(CONFIGS[family](), 0, torch.float32, "eager")
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        reference = expected[name]
        if reference.std() == 0:
            assert torch.equal(parameter, reference), name
        else:
            assert 0.7 < parameter.std() / reference.std() < 1.4, name
    buffers = dict(theirs.named_buffers())
    for name, buffer in ours.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
