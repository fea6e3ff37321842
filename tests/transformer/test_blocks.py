"""Checkpointed and compiled blocks give the same features and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.prefix import FixedPrefix
from lightning_inversion.transformer.truncated import TruncatedTransformer

IDS = torch.arange(24).reshape(2, 12)


def features_and_gradient(transformer: TruncatedTransformer) -> tuple[Tensor, Tensor]:
    vectors = transformer.embedding(IDS).requires_grad_()
    features = transformer(vectors)
    (gradient,) = torch.autograd.grad(features.square().sum(), vectors)
    return features.detach(), gradient


def kept_numbers(transformer: TruncatedTransformer) -> int:
    """Floats that a forward keeps for its backward pass, weights aside."""
    weights = {weight.data_ptr() for weight in transformer.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    vectors = transformer.embedding(IDS).requires_grad_()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        transformer(vectors).sum()
    return sum(kept.values())


def test_checkpointing_keeps_less_and_changes_nothing(tiny_folder: Path) -> None:
    plain = TransformerSpec(model=str(tiny_folder), depth=4).load()
    saving = TransformerSpec(model=str(tiny_folder), depth=4, checkpointing=True).load()
    for ours, theirs in zip(
        features_and_gradient(saving), features_and_gradient(plain), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert kept_numbers(saving) < kept_numbers(plain) / 4


def test_checkpointing_behind_a_kept_prefix(tiny_folder: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        spec = TransformerSpec(model=str(tiny_folder), depth=2, checkpointing=checkpointing)
        transformer = spec.load()
        assert transformer.caches
        prefix = FixedPrefix(transformer, 2)
        rows = torch.arange(2)
        prefix.begin(rows, transformer.embedding(IDS), torch.tensor([3, 5]))
        vectors = transformer.embedding(IDS[:, 6:8]).requires_grad_()
        features = prefix.followed_by(rows, vectors)
        gradients.append(torch.autograd.grad(features.square().sum(), vectors)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.integration  # half a minute of compiling
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of torch's own import
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile reads it
def test_compiled_blocks_give_the_same(tiny_folder: Path) -> None:
    plain = TransformerSpec(model=str(tiny_folder), depth=2).load()
    compiled = TransformerSpec(model=str(tiny_folder), depth=2, compile=True).load()
    for ours, theirs in zip(
        features_and_gradient(compiled), features_and_gradient(plain), strict=True
    ):
        # Fused kernels sum in another order, which each processor's own instructions decide: a
        # number that nearly cancels may be off by more, the whole may not.
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert compiled.caches
