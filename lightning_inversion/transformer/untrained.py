"""Models without trained weights: drawn at random, module by module, or counted on torch's meta."""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lightning_inversion.errors import InputError
from lightning_inversion.transformer.blocks import (
    cut_blocks_,
    takes_position_ids,
    without_head,
)
from lightning_inversion.transformer.weights import readable


def untrained_model(
    config: PretrainedConfig,
    seed: int,
    dtype: torch.dtype,
    attention: str,
    depth: int | None = None,
) -> PreTrainedModel:
    """A causal language model with random weights; with `depth`, its first blocks without a head.

    Each module draws from a seed of its own, made of `seed` and the module's name: the weights of
    a block do not depend on how many blocks are kept, and the global generator is not touched.
    """
    model = _shapes(config, attention)
    base = without_head(model)
    if depth is not None:
        cut_blocks_(base, depth)
        model = base
    model.to_empty(device="cpu")
    _initialise_(model, base, seed)
    model.tie_weights()
    model.to(dtype)  # type: ignore[arg-type]  # transformers' wrapper hides the overloads
    return model


def untrained_embedding(config: PretrainedConfig, seed: int, dtype: torch.dtype) -> nn.Module:
    """The token embedding of an untrained model: the one `untrained_model` would have."""
    base = without_head(_shapes(config))
    name, embedding = next(
        (name, module)
        for name, module in base.named_modules()
        if module is base.get_input_embeddings()
    )
    embedding.to_empty(device="cpu")
    _initialise_module_(base, name, name, embedding, seed)
    return embedding.to(dtype)


def _shapes(config: PretrainedConfig, attention: str | None = None) -> PreTrainedModel:
    """The model on torch's meta device: its weights have shapes, and take no memory."""
    with readable(config._name_or_path or config.model_type), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, attn_implementation=attention, trust_remote_code=False
        )
    return model


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


_COUNTED_LENGTH = 32


def count_block(config: PretrainedConfig) -> tuple[int, float]:
    """Parameters of one block, and the floats a token that it keeps for the backward pass.

    The model's own code is run on torch's ``meta`` device, which has shapes and no numbers.

    Raises:
        InputError: the code needs numbers to run, as experts that are chosen by them.
    """
    try:
        (one_size, one_kept), (two_size, two_kept) = (_counted(config, n) for n in (1, 2))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise InputError(
            f"--model: a {config.model_type} cannot be counted without its weights; name "
            "--data.tokens_per_batch."
        ) from error
    return two_size - one_size, (two_kept - one_kept) / _COUNTED_LENGTH


def _counted(config: PretrainedConfig, blocks: int) -> tuple[int, int]:
    """Parameters, and floats kept of one sequence, of a model of so many blocks."""
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        base = tensor if tensor._base is None else tensor._base
        kept[id(base)] = base
        return tensor

    model = without_head(_shapes(config)).requires_grad_(False).train(False)
    cut_blocks_(model, blocks)
    with torch.device("meta"):
        width = model.get_input_embeddings().weight.shape[1]
        vectors = torch.empty(1, _COUNTED_LENGTH, width, requires_grad=True)
        # The models look into the numbers of a mask that they make themselves; there are none.
        given = {
            "attention_mask": torch.empty(1, 1, _COUNTED_LENGTH, _COUNTED_LENGTH),
            "use_cache": False,
        }
        if takes_position_ids(model):
            given["position_ids"] = torch.empty(1, _COUNTED_LENGTH, dtype=torch.long)
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            model(inputs_embeds=vectors, **given)
    for own in [*model.parameters(), *model.buffers()]:
        kept.pop(id(own), None)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters, sum(tensor.numel() for tensor in kept.values())


def llama_config(**sizes: int) -> PretrainedConfig:
    """The configuration of a Llama of these sizes, under the names of its ``config.json``."""
    return AutoConfig.for_model("llama", **sizes)
