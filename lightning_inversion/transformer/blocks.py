"""A model's blocks: found, cut, copied and wrapped, without a table of names."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from lightning_inversion.errors import InputError

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class BlockList:
    """The list of a model's blocks and where it hangs: `getattr(parent, name)` is `blocks`."""

    parent: nn.Module
    name: str
    blocks: nn.ModuleList


def find_blocks(model: PreTrainedModel) -> BlockList:
    """The one outermost `ModuleList` with as many entries as the configuration has blocks.

    Outermost, because a mixture of experts may have as many experts as blocks.

    Raises:
        InputError: there is none or more than one.
    """
    count = model.config.num_hidden_layers
    found: dict[str, BlockList] = {}
    for path, parent in model.named_modules():
        if any(path == other or path.startswith(f"{other}.") for other in found):
            continue
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                found[f"{path}.{name}".lstrip(".")] = BlockList(parent, name, child)
    if len(found) != 1:
        raise InputError(
            f"--model.transformer.model: {type(model).__name__} has no single list of its "
            f"{count} blocks (found: {', '.join(found) or 'none'}); "
            "use a plain causal language model."
        )
    return next(iter(found.values()))


def cut_blocks_(model: PreTrainedModel, kept: int) -> tuple[nn.Module, ...]:
    """Drop all but the first `kept` blocks, in place; returns them."""
    found = find_blocks(model)
    blocks = nn.ModuleList(list(found.blocks)[:kept])
    setattr(found.parent, found.name, blocks)
    return tuple(blocks)


def repeat_first_block_(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """Put copies of the first block, with the same weights, in place of the others."""
    found = find_blocks(model)
    first = found.blocks[0]
    blocks = nn.ModuleList([first, *(frozen_copy(first) for _ in found.blocks[1:])])
    for number, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):  # by which a block finds its own keys and values
                setattr(module, "layer_idx", number)  # noqa: B010  # it may be a Tensor, to mypy
    setattr(found.parent, found.name, blocks)
    return tuple(blocks)


def shorten_config_(config: PretrainedConfig, kept: int) -> None:
    """Set the number of blocks in a configuration to `kept`, in place."""
    config.num_hidden_layers = kept
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:kept]


def without_head(model: PreTrainedModel) -> PreTrainedModel:
    """The part of `model` that turns token vectors into hidden states, without its head."""
    base = model.base_model
    assert isinstance(base, PreTrainedModel)
    if text_config(base.config) is base.config:
        return base
    decoder = base.get_decoder()  # type: ignore[no-untyped-call]
    assert isinstance(decoder, PreTrainedModel)
    return decoder


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The language model's part of a configuration: nested in models that also read images."""
    nested: PretrainedConfig = config.get_text_config(decoder=True)
    return nested


def frozen_copy(model: M) -> M:
    """New modules around the same weights: what is cut from them leaves `model` as it was."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = (
            nn.Parameter(parameter.detach(), requires_grad=False)
            if parameter.requires_grad
            else parameter
        )
    return copy.deepcopy(model, memo)


def replace_module_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` hangs in `model`, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)


def takes_position_ids(model: PreTrainedModel) -> bool:
    """Whether the model takes the positions of its tokens as an argument."""
    return "position_ids" in inspect.signature(model.forward).parameters


def block_output(output: Tensor | tuple[Any, ...]) -> Tensor:
    """The hidden states in what a block returns: the first entry, where that is a tuple."""
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, torch.Tensor)
    return hidden


def checkpoint_blocks_(blocks: Sequence[nn.Module]) -> None:
    """Keep only a block's input for the backward pass, and run the block again there, in place.

    transformers' own gradient checkpointing wants a model that is in training mode, which a frozen
    one never is.
    """
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks_(blocks: Sequence[nn.Module]) -> None:
    """Compile each block's forward by torch.compile, for any length of sequence, in place.

    The block's hooks, which capture the features, stay outside. Behind kept keys and values, whose
    number grows with every token, blocks run as they are: each growth would be compiled anew.
    """
    for block in blocks:
        compiled = torch.compile(block.forward, dynamic=True)
        block.forward = partial(_forward, block.forward, compiled)


def _forward(
    plain: Callable[..., Any], compiled: Callable[..., Any], *args: Any, **options: Any
) -> Any:
    kept = options.get("past_key_values") is not None
    return (plain if kept else compiled)(*args, **options)
