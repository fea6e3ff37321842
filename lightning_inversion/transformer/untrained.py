"""Untrained weights: the model's own initialisation, drawn module by module."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lightning_inversion.transformer.blocks import cut_blocks_, language_model, shorten_config_


def untrained_model(
    auto: Any,
    config: PretrainedConfig,
    seed: int,
    dtype: torch.dtype,
    attention: str,
    depth: int | None = None,
) -> PreTrainedModel:
    """A model of `config` with random weights and, if given, its first `depth` blocks only.

    Each module draws from a seed of its own, made of `seed` and the module's name: the weights of
    a block do not depend on how many blocks are kept, and the global generator is not touched.

    Args:
        auto: AutoModel or AutoModelForCausalLM.
    """
    with torch.device("meta"):  # shapes only: dropped blocks never take memory
        model: PreTrainedModel = auto.from_config(config, attn_implementation=attention)
    base = language_model(model)
    if depth is not None:
        cut_blocks_(base, depth)
    model.to_empty(device="cpu")
    _initialise_(model, base, seed)
    if depth is not None:
        # Only now: GPT-2 scales its initial weights by the number of blocks of the whole model.
        shorten_config_(base.config, depth)
    model.tie_weights()
    model.to(dtype)  # type: ignore[arg-type]  # transformers' wrapper hides the overloads
    return model


def untrained_embedding(
    auto: Any, config: PretrainedConfig, seed: int, dtype: torch.dtype
) -> nn.Module:
    """The token embedding of an untrained model: the one `untrained_model` would have."""
    with torch.device("meta"):
        base = language_model(auto.from_config(config))
    name, embedding = next(
        (name, module)
        for name, module in base.named_modules()
        if module is base.get_input_embeddings()
    )
    embedding.to_empty(device="cpu")
    _initialise_module_(base, name, name, embedding, seed)
    return embedding.to(dtype)


@torch.no_grad()
def _initialise_(model: PreTrainedModel, base: PreTrainedModel, seed: int) -> None:
    # Names as the base model has them, so that a block is the same with and without a head.
    names = {id(module): name for name, module in base.named_modules()}
    # From the leaves up: some models redraw a child's weights from its parent.
    for path, module in reversed(list(model.named_modules())):
        name = names.get(id(module), f"head.{path}")
        _initialise_module_(model, path, name, module, seed)


@torch.no_grad()
def _initialise_module_(
    model: PreTrainedModel, path: str, name: str, module: nn.Module, seed: int
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed_of(name, seed))
        _owner(model, path)._init_weights(module)  # type: ignore[no-untyped-call]


def _owner(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """The innermost PreTrainedModel around a module: its rules are the ones that apply."""
    owner: PreTrainedModel = model
    here: nn.Module = model
    for name in path.split(".") if path else []:
        here = getattr(here, name)
        if isinstance(here, PreTrainedModel):
            owner = here
    return owner


def _seed_of(name: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]) >> 1
