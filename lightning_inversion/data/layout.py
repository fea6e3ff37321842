"""What the axes of a tensor of hidden states mean, which of its rows are padding, and its bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from lightning_inversion.errors import InputError
from lightning_inversion.transformer.blocks import block_count, settings_of, text_config
from lightning_inversion.transformer.selection import Output

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Axis = Literal["prompts", "layers", "positions", "features"]
_AXES: tuple[str, ...] = get_args(Axis)
_BITS = {1: ("float8_e4m3fn", "float8_e5m2"), 2: ("bfloat16", "float16")}
"""Types whose bits integers of so many bytes may hold, the likeliest first."""


@dataclass(frozen=True)
class Layout:
    """What the shapes and names in a file of hidden states leave open.

    Args:
        axes: the meaning of each axis of a tensor: prompts, layers, positions, features.
        depths: the depths that the layers hold, in their order.
        lengths: the tokens of each prompt, where prompts are padded and no mask is in the file.
        padding: the side that is padded.
        dtype: the floating type whose bits integers hold.
    """

    axes: list[Axis] | None = None
    depths: list[int] | None = None
    lengths: list[int] | None = None
    padding: Literal["right", "left"] = "right"
    dtype: Literal["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"] | None = None

    def __post_init__(self) -> None:
        axes = self.axes or ["features"]
        if len(set(axes)) < len(axes) or "features" not in axes or not set(axes) <= set(_AXES):
            raise InputError(
                f"--data.layout.axes is {','.join(axes)}; name each axis once, of "
                f"{', '.join(_AXES)}, with features among them."
            )
        for name in ("depths", "lengths"):
            values = getattr(self, name)
            if values is not None and (not values or min(values) < (name == "lengths")):
                raise InputError(f"--data.layout.{name} is {values}; give one or more numbers.")


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model by which its hidden states are recognised.

    Attributes:
        blocks: all of them.
        width: features of one depth.
        vocabulary: logits of one position.
        heads: of its keys and values.
        head_size: features of one head.
    """

    blocks: int
    width: int
    vocabulary: int
    heads: int
    head_size: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> ModelShape:
        """The sizes in a model's configuration."""
        language = text_config(config)

        def first(name: str, otherwise: int) -> int:
            return next(iter(settings_of(language, name)), 0) or otherwise

        heads = first("num_attention_heads", 1)  # RWKV and Mamba have none
        size = first("head_dim", language.hidden_size // heads)
        heads = first("num_key_value_heads", heads)
        width = language.hidden_size * first("hc_count", 1)  # Qwen 4: streams side by side
        return cls(block_count(config), width, language.vocab_size, heads, size)


@dataclass(frozen=True)
class Wanted:
    """Which hidden states are asked for, and of which model.

    Attributes:
        where: names the file or argument in messages.
        depths: whose features are read, ascending; None for the last.
        final_norm: whether they are read after the final norm.
        layout: what the user told of the file.
        shape: reads the model's configuration, when first needed.
        checks_width: whether the states are as wide as the model.
        output: hidden states, or keys, values or both of the block after each depth.
        logits: whether logits are read in place of hidden states.
    """

    where: str
    depths: tuple[int, ...] | None
    final_norm: bool = False
    layout: Layout = field(default_factory=Layout)
    shape: Callable[[], ModelShape] | None = None
    checks_width: bool = True
    output: Output = "hidden_states"
    logits: bool = False

    @property
    def width(self) -> int:
        """How many numbers a position has."""
        return self.sizes.vocabulary if self.logits else self.sizes.width

    @property
    def sizes(self) -> ModelShape:
        """The model's, from its configuration."""
        if self.shape is None:
            raise self.error(" cannot be understood without the model's sizes; name the model.")
        return self.shape()

    def error(self, what: str) -> InputError:
        """An error whose sentence begins with where the states are."""
        return InputError(f"{self.where}{what}")


@dataclass(frozen=True)
class Beside:
    """What lies beside the states: a mask, the shape of token ids, the depth that a name tells."""

    mask: Tensor | None = None
    ids_shape: tuple[int, ...] | None = None
    depth: int | None = None


def arrange(wanted: Wanted, tensor: Tensor, name: str, beside: Beside) -> Tensor:
    """A tensor as ``[prompts, layers, positions, features]``, of a floating type.

    Raises:
        InputError: it is not as wide as the model, or its axes could mean several things.
    """
    tensor = floating(wanted, tensor, name)
    _refuse_caches(wanted, tensor, name)
    axes = _axes_of(wanted, tensor, name, beside)
    _check_width(wanted, tensor.shape[axes.index("features")], tensor, name)
    tensor = tensor.permute([axes.index(axis) for axis in _AXES if axis in axes])
    for index, axis in enumerate(_AXES):
        if axis not in axes:
            tensor = tensor.unsqueeze(index)
    return tensor


def check_dense(wanted: Wanted, tensor: Tensor, name: str = "") -> None:
    """Raise InputError for a tensor that is sparse, nested or quantised, or has no values."""
    strided = tensor.layout == torch.strided and not tensor.is_nested
    if not strided or tensor.is_meta or tensor.is_quantized:
        raise wanted.error(f"{named(name)} is no dense tensor with values; save a plain one.")


def floating(wanted: Wanted, tensor: Tensor, name: str) -> Tensor:
    """The tensor as floating point; integers are taken as its bits where the layout has a type."""
    check_dense(wanted, tensor, name)
    tensor = tensor.detach()
    if tensor.is_floating_point():
        return tensor
    choices = _BITS.get(tensor.element_size(), ())
    if tensor.is_complex() or tensor.dtype == torch.bool or not choices:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise wanted.error(f"{named(name)} holds {kind}; store floating-point features.")
    if wanted.layout.dtype not in choices:
        raise wanted.error(
            f"{named(name)} holds {8 * tensor.element_size()}-bit integers, which look like "
            f"the bits of {choices[0]}; set --data.layout.dtype {choices[0]}, or {choices[1]}."
        )
    return tensor.contiguous().view(getattr(torch, wanted.layout.dtype))


def _axes_of(wanted: Wanted, tensor: Tensor, name: str, beside: Beside) -> list[str]:
    """The meaning of each axis of a tensor."""
    shape = list(tensor.shape)
    if not tensor.numel() or not shape:
        raise wanted.error(f"{named(name)} has shape {shape}, which is no row of features.")
    if wanted.layout.axes is not None:
        if len(wanted.layout.axes) == len(shape):
            return list(wanted.layout.axes)
        if len(shape) > 2:
            raise wanted.error(
                f"{named(name)} has shape {shape}, and --data.layout.axes names "
                f"{len(wanted.layout.axes)} axes; name {len(shape)}."
            )
    found = _usual_axes(wanted, shape, name, beside)
    if found is None:
        choices = " or ".join(_choices(len(shape)))
        raise wanted.error(
            f"{named(name)} has shape {shape}, whose axes are not clear; set "
            f"--data.layout.axes {choices}."
        )
    return found


def _usual_axes(wanted: Wanted, shape: list[int], name: str, beside: Beside) -> list[str] | None:
    """The axes of a tensor where its shape and what lies beside it leave no choice."""
    if len(shape) <= 2:
        return ["positions", "features"][2 - len(shape) :]
    if len(shape) == 4 and beside.depth is None:
        rest = _usual_axes(wanted, shape[1:], name, replace(beside, depth=0))
        if rest is None or "layers" in rest:
            return None
        return ["layers", *rest] if _counts_layers(wanted, shape[0]) else None
    if len(shape) != 3:
        return None
    prompts = ["prompts", "positions", "features"]
    if beside.depth is not None or shape[0] == 1:
        return prompts
    layers, transposed = ["layers", *prompts[1:]], ["positions", "layers", "features"]
    told = len(wanted.layout.depths or ())
    if told in shape[:2] and shape[0] != shape[1]:
        return layers if shape[0] == told else transposed
    mask = None if beside.mask is None else list(beside.mask.shape)
    if shape[:2] in (mask, list(beside.ids_shape or ())) or wanted.layout.lengths is not None:
        return prompts
    tokens = (beside.ids_shape or (0,))[0] if len(beside.ids_shape or ()) == 1 else 0
    if tokens in shape[:2] and shape[0] != shape[1]:
        return transposed if shape[0] == tokens else layers
    if name.rsplit(".", 1)[-1] == "residual_stream" or _counts_layers(wanted, shape[0]):
        return layers
    return None


def _counts_layers(wanted: Wanted, size: int) -> bool:
    if wanted.layout.depths is not None:
        return size == len(wanted.layout.depths)
    return wanted.shape is not None and size == wanted.sizes.blocks + 1


def _refuse_caches(wanted: Wanted, tensor: Tensor, name: str) -> None:
    if not wanted.checks_width or wanted.shape is None or tensor.dim() < 3:
        return
    sizes, shape = wanted.sizes, list(tensor.shape)
    if sizes.width not in shape and shape[-1] == sizes.head_size and sizes.heads in shape:
        raise wanted.error(
            f"{named(name)} has shape {shape}: the keys or values of a cache, {sizes.heads} heads "
            f"of {sizes.head_size}; set --model.transformer.output keys, or values."
        )


def _check_width(wanted: Wanted, features: int, tensor: Tensor, name: str) -> None:
    if not wanted.checks_width or wanted.shape is None:
        return
    width, shape = wanted.width, list(tensor.shape)
    if features == width:
        return
    if width in shape:
        raise wanted.error(
            f"{named(name)} has shape {shape}, and the model's {width} features do not lie in "
            "its last axis; name its axes with --data.layout.axes."
        )
    way_out = "give the model that made it"
    if features == wanted.sizes.vocabulary:
        way_out = "for logits set --data.logits true"
    raise wanted.error(
        f"{named(name)} has shape {shape}: the features are {features} in the file and "
        f"{width} in the model; {way_out}."
    )


def rows_of_prompts(wanted: Wanted, states: Tensor, beside: Beside) -> list[Tensor]:
    """``[B, T, F]`` -> ``[T_i, F]``, without padding that a mask, lengths or zeros show."""
    B, T = states.shape[:2]
    lengths = wanted.layout.lengths
    if lengths is not None:
        if len(lengths) != B or max(lengths) > T:
            raise wanted.error(
                f" has {B} prompts of {T} rows, and --data.layout.lengths is {lengths}; give "
                "the tokens of each prompt."
            )
        columns, sizes = torch.arange(T), torch.tensor(lengths)[:, None]
        left = wanted.layout.padding == "left"
        kept = columns >= T - sizes if left else columns < sizes
    elif beside.mask is not None:
        mask = beside.mask.reshape(-1, beside.mask.shape[-1])
        if len(mask) != B or mask.shape[1] > T:
            raise wanted.error(
                f" has {B} prompts of {T} rows and a mask of shape {list(beside.mask.shape)}; "
                "save the mask of these prompts."
            )
        kept = torch.nn.functional.pad(mask, (0, T - mask.shape[1]), value=True)
    else:
        kept = _rows_between_empty_ones(states)
    prompts = [own[rows] for own, rows in zip(states, kept, strict=True)]
    if not all(map(len, prompts)):
        raise wanted.error(" holds a prompt whose rows are all padding, nan or 0; leave it out.")
    return prompts


def named(name: str) -> str:
    """How a message names a tensor."""
    return f": tensor {name!r}" if name else ""


def _choices(dimensions: int) -> list[str]:
    if dimensions == 3:
        return ["prompts,positions,features", "layers,positions,features",
                "positions,layers,features"]  # fmt: skip
    return ["layers,prompts,positions,features", "prompts,layers,positions,features"]


def _rows_between_empty_ones(states: Tensor) -> Tensor:
    """``[B, T]``: rows but for those at the ends of a prompt that are all 0 or all nan."""
    values = states.float()
    full = ~((values == 0).all(-1) | values.isnan().all(-1))
    after = full.long().cummax(dim=1).values.bool()
    before = full.flip(1).long().cummax(dim=1).values.flip(1).bool()
    return after & before
