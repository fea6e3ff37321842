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


class KeptBlocks(nn.ModuleList):
    """The first blocks of a model whose configuration goes on to count all of them.

    The configuration stays whole because weights and functions depend on it: MiniCPM3 scales its
    residuals by the number of blocks.
    """


def find_blocks(model: PreTrainedModel) -> BlockList:
    """The one outermost `ModuleList` with as many entries as the configuration has blocks.

    Outermost, because a mixture of experts may have as many experts as blocks; with weights,
    because there may be as many rotary embeddings. Blocks that were cut are found by their class.

    Raises:
        InputError: there is none or more than one.
    """
    count = block_count(model.config)
    found: dict[str, BlockList] = {}
    left_out: list[str] = []
    for path, parent in model.named_modules():
        if any(f"{path}.".startswith(f"{other}.") for other in [*found, *left_out]):
            continue
        if isinstance(parent, PreTrainedModel) and parent.config is not model.config:
            left_out.append(path)  # a model of images or sounds inside
            continue
        for name, child in parent.named_children():
            if isinstance(child, KeptBlocks):
                return BlockList(parent, name, child)
            if isinstance(child, nn.ModuleList) and len(child) == count and _has_weights(child):
                found[f"{path}.{name}".lstrip(".")] = BlockList(parent, name, child)
    if len(found) != 1:
        raise InputError(
            f"--model.transformer.model: {type(model).__name__} has no single list of its "
            f"{count} blocks (found: {', '.join(found) or 'none'}); "
            "use a plain causal language model."
        )
    return next(iter(found.values()))


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def cut_blocks_(model: PreTrainedModel, kept: int) -> tuple[nn.Module, ...]:
    """Drop all but the first `kept` blocks, in place; returns them."""
    found = find_blocks(model)
    blocks = KeptBlocks(list(found.blocks)[:kept])
    setattr(found.parent, found.name, blocks)
    return tuple(blocks)


def repeat_first_block_(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """Put copies of the first block, with the same weights, in place of the others."""
    found = find_blocks(model)
    first = found.blocks[0]
    blocks = KeptBlocks([first, *(frozen_copy(first) for _ in found.blocks[1:])])
    for number, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):  # by which a block finds its own keys and values
                setattr(module, "layer_idx", number)  # noqa: B010  # it may be a Tensor, to mypy
    setattr(found.parent, found.name, blocks)
    return tuple(blocks)


def without_head(model: PreTrainedModel) -> PreTrainedModel:
    """The part of `model` that turns token vectors into hidden states, without its head."""
    base = model.base_model
    assert isinstance(base, PreTrainedModel)
    if text_config(base.config) is base.config and _takes(base, "inputs_embeds"):
        return base
    decoder = base.get_decoder()  # type: ignore[no-untyped-call]
    assert isinstance(decoder, PreTrainedModel)
    return decoder


def most_positions(config: PretrainedConfig) -> int | None:
    """The most tokens that the model reads; None where its configuration names no limit."""
    most = getattr(text_config(config), "max_position_embeddings", None)
    return None if most == -1 else most  # XLNet has no limit


def config_of(model: PreTrainedModel) -> dict[str, Any]:
    """A model's configuration as plain values, without where its files were."""
    values: dict[str, Any] = model.config.to_dict()
    return {name: value for name, value in values.items() if name != "_name_or_path"}


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The language model's part of a configuration: nested in models that also read images."""
    nested = config.get_text_config(decoder=True)
    if not isinstance(nested, PretrainedConfig):
        raise InputError(
            f"--model.transformer.model: the configuration of {config.model_type} has a part that "
            f"is {type(nested).__name__}, not a language model's; correct it."
        )
    return nested


def settings_of(config: PretrainedConfig, name: str) -> list[Any]:
    """The values of a setting: one, or one for each block where blocks differ; [] without it."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers refuses to name one for all
        values = [getattr(block, name, None) for block in config.per_layer_config]
    else:
        values = [value]
    return [value for value in values if value is not None]


def block_count(config: PretrainedConfig) -> int:
    """How many blocks the language model of a configuration has."""
    # Beside the encoder's, of another number; LongCat counts two caches to a block.
    for name in ("decoder_layers", "num_decoder_layers", "num_layers"):
        if hasattr(config, name):
            return int(getattr(config, name))
    return int(text_config(config).num_hidden_layers)


def frozen_copy(model: M) -> M:
    """New modules around the same weights: what is cut from them leaves `model` as it was.

    Hooks are the same objects: what they hold may not be copied. RWKV divides its weights when it
    is run, and is copied whole.
    """
    if any(hasattr(module, "layers_are_rescaled") for module in model.modules()):
        return copy.deepcopy(model).requires_grad_(False)
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            memo.update((id(hook), hook) for hook in hooks.values())
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
    return _takes(model, "position_ids")


def _takes(model: PreTrainedModel, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


def block_output(output: Tensor | Sequence[Any]) -> Tensor:
    """The hidden states in what a block returns: the first entry, where that is a sequence."""
    hidden = output[0] if isinstance(output, tuple | list) else output
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
