"""What the axes of a tensor of hidden states mean, and the floating type that integers hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_inversion.data.layout import AXES, Beside, Wanted, named
from lightning_inversion.data.padding import pads_each_by_itself

_BITS = {1: ("float8_e4m3fn", "float8_e5m2"), 2: ("bfloat16", "float16")}
"""Types whose bits integers of so many bytes may hold, the likeliest first."""
_SCALE = re.compile(r"(?:^|[._/-])scales?(?:_inv)?$")
_POSITIONS_FIRST = ("inner_states",)
"""Names of fairseq, whose tensors are ``[T, B, D]``."""


def arrange(wanted: Wanted, tensor: Tensor, name: str, beside: Beside) -> Tensor:
    """A tensor as ``[prompts, layers, positions, features]``, of a floating type.

    Raises:
        InputError: it is not as wide as the model, or its axes could mean several things.
    """
    tensor = floating(wanted, tensor, name)
    _refuse_caches(wanted, tensor, name)
    axes = _axes_of(wanted, tensor, name, beside)
    _check_width(wanted, tensor.shape[axes.index("features")], tensor, name)
    tensor = tensor.permute([axes.index(axis) for axis in AXES if axis in axes])
    for index, axis in enumerate(AXES):
        if axis not in axes:
            tensor = tensor.unsqueeze(index)
    return tensor


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
    if found is None and len(shape) == 3 and pads_each_by_itself(tensor):
        found = ["prompts", "positions", "features"]
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
    prompts = ["prompts", "positions", "features"]
    if len(shape) == 4:
        counting = [axis for axis in range(3) if _counts_layers(wanted, shape[axis])]
        if beside.depth is None and (counting == [2] or len({0, 1} & set(counting)) == 1):
            return [*prompts[: counting[0]], "layers", *prompts[counting[0] :]]
        return ["layers", *prompts] if shape[:2] == [1, 1] else None
    if len(shape) != 3:
        return None
    if name.rsplit(".", 1)[-1] in _POSITIONS_FIRST:
        return ["positions", "prompts", "features"]
    if beside.depth is not None or shape[0] == 1:
        return prompts
    layers, transposed = ["layers", *prompts[1:]], ["positions", "layers", "features"]
    told = len(wanted.layout.depths or ())
    if told in shape[:2] and shape[0] != shape[1]:
        return layers if shape[0] == told else transposed
    mask = None if beside.mask is None else list(beside.mask.shape)
    lengths = wanted.layout.lengths or beside.lengths
    if shape[:2] in (mask, list(beside.ids_shape or ())) or len(lengths or ()) == shape[0]:
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


def _choices(dimensions: int) -> list[str]:
    if dimensions == 3:
        return ["prompts,positions,features", "layers,positions,features",
                "positions,layers,features"]  # fmt: skip
    return ["layers,prompts,positions,features", "prompts,layers,positions,features"]


def check_dense(wanted: Wanted, tensor: Tensor, name: str = "") -> None:
    """Raise InputError for a tensor that is sparse, nested or quantised, or has no values."""
    strided = tensor.layout == torch.strided and not tensor.is_nested
    if not strided or tensor.is_meta or tensor.is_quantized:
        raise wanted.error(f"{named(name)} is no dense tensor with values; save a plain one.")


def tensor_of(wanted: Wanted, value: Tensor | np.ndarray) -> Tensor:
    """A tensor or array of NumPy as a dense tensor on the CPU."""
    if isinstance(value, Tensor):
        check_dense(wanted, value)
        return value.detach().cpu()
    if value.dtype.kind == "V" and value.dtype.itemsize <= 2:  # NumPy has no bfloat16
        value = value.view(f"u{value.dtype.itemsize}")
    if value.dtype.kind not in "fiub" or value.dtype.itemsize > 8:
        raise wanted.error(f" holds NumPy values of type {value.dtype}; store numbers.")
    return torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))


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


def refuse_quantised(wanted: Wanted, held: Mapping[str, Any]) -> None:
    """Refuse 8-bit values with scales beside them, whose rounding differs from row to row.

    Raises:
        InputError: names what to store instead.
    """
    numbers = {name: own for name, own in held.items() if isinstance(own, Tensor | np.ndarray)}
    scales = [name for name in numbers if _SCALE.search(name)]
    eight = [name for name, own in numbers.items() if own.dtype.itemsize == 1]
    if not scales or not eight:
        return
    value = torch.as_tensor(numbers[scales[0]]).float()
    way_out = (
        "multiply them, store float32, and give the rounding as --data.noise (of integers, their "
        "scale / 3.5)"
    )
    if torch.as_tensor(numbers[eight[0]]).is_floating_point() and value.numel() == 1 and value:
        way_out = f"leave it out of the file, and set --data.scale {1 / float(value):g}"
    raise wanted.error(f" holds 8-bit values ({eight[0]}) and {scales[0]}; {way_out}.")
