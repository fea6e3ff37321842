"""What the things that tools save may hold: states, token ids, numbers, steps of generate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, unpack_sequence

from lightning_inversion.data.names import tells_depth

_WRAPPERS = ("output", "value")
"""Attributes in which baukit's traces and saved values of nnsight hold what a module put out."""


def opened(given: Any) -> Any:
    """The tensors, or the dict or list of them, in what a tool or a library wraps them in."""
    if isinstance(given, PackedSequence):
        return unpack_sequence(given)
    if isinstance(given, Tensor):
        return list(given.unbind()) if given.is_nested else given
    if isinstance(given, np.ma.MaskedArray) and given.dtype.kind == "f":
        return given.filled(np.nan)
    if isinstance(given, np.ndarray):
        if given.dtype.names:  # a table of named columns
            return {name: given[name] for name in given.dtype.names}
        return list(given) if given.dtype == object else given
    if hasattr(given, "__array__") or isinstance(given, memoryview):  # pandas, JAX, xarray
        return opened(np.asarray(given))
    for name in _WRAPPERS:
        inner = getattr(given, name, None)
        if isinstance(inner, Tensor | tuple):
            return opened(inner)
    if hasattr(given, "_asdict"):
        return given._asdict()
    if isinstance(given, tuple | list):  # blocks return None where they have no cache
        return [one for one in given if one is not None]
    return given


def alone(given: Any) -> Any:
    """The tensor that a dict holds alone, under a name that tells no depth."""
    if isinstance(given, Mapping) and len(given) == 1:
        ((name, value),) = given.items()
        value = opened(value)
        if isinstance(value, Tensor | np.ndarray) and not tells_depth(name):
            return value
    return given


def output_of_block(given: Any) -> Any:
    """The first entry where a block's output is a tuple, whose others are no hidden states."""
    if isinstance(given, list) and given and isinstance(given[0], Tensor | np.ndarray):
        width = given[0].shape[-1:]
        if any(getattr(one, "shape", ())[-1:] != width for one in given[1:]):
            return given[0]
    return given


def flat(held: Any) -> dict[str, Any]:
    """A dict of names; nested dicts and keys that are tuples have names with dots."""
    found: dict[str, Any] = {}
    for key, value in held.items():
        parts = key if isinstance(key, tuple) else (key,)
        name = ".".join(str(part) for part in parts if part is not None)
        if isinstance(value, Mapping):
            found.update({f"{name}.{inner}": own for inner, own in flat(value).items()})
        else:
            found[name] = opened(value)
    return found


_LENGTHS = (
    "lengths", "seq_lens", "seqlens", "seq_lengths", "sequence_lengths", "prompt_lens",
)  # fmt: skip
_CUMULATIVE = ("cu_seqlens", "cu_seqlens_q")


def number_in(value: Any) -> int | None:
    """An integer, also where a tensor holds it alone."""
    if isinstance(value, Tensor | np.ndarray):
        value = value.item() if value.size == 1 or getattr(value, "numel", int)() == 1 else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def holds_ids(value: Any) -> bool:
    """Whether integers are too few or too wide for bits of features."""
    if isinstance(value, Tensor | np.ndarray):
        if isinstance(value, np.ndarray):
            integers, size = value.dtype.kind in "iu", value.itemsize
        else:
            integers = not (value.is_floating_point() or value.is_complex())
            integers, size = integers and value.dtype != torch.bool, value.element_size()
        return integers and (size > 2 or value.ndim < 2)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return bool(value) and all(isinstance(one, int) for one in leaves(value))
    return False


def holds_states(value: Any) -> bool:
    """Whether there may be hidden states in it."""
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim > 0
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return bool(value) and not any(isinstance(one, str) for one in value)
    return getattr(value, "hidden_states", None) is not None


def lengths_in(name: str, value: Any) -> tuple[int, ...] | None:
    """The tokens of each prompt, from what servers and packed batches call them; else None.

    Args:
        name: of the value, without what comes before its last dot.
        value: lengths, cumulative lengths from 0 on, or positions ``[N]`` that begin again at 0.
    """
    if not holds_ids(value) or name not in (*_LENGTHS, *_CUMULATIVE, "position_ids"):
        return None
    numbers = np.asarray(value).reshape(-1).astype(np.int64)
    if name in _CUMULATIVE:
        numbers = np.diff(numbers)
    elif name == "position_ids":
        begins = np.flatnonzero(numbers == 0)
        numbers = np.diff([*begins, len(numbers)])
        expected = np.concatenate([np.arange(size) for size in numbers] or [numbers])
        if len(begins) < 2 or not np.array_equal(expected, np.asarray(value).reshape(-1)):
            return None
    return tuple(numbers.tolist()) if numbers.size and numbers.min() > 0 else None


def leaves(value: Any) -> list[Any]:
    """What nested lists hold in the end."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [leaf for one in value for leaf in leaves(one)]
    return [value]


def is_tensors(value: Any) -> bool:
    """Whether it is a list of tensors of two axes or more."""
    return (
        isinstance(value, Sequence)
        and bool(value)
        and all(isinstance(one, Tensor | np.ndarray) and one.ndim >= 2 for one in value)
    )


def prompts_of_layers(given: Sequence[Any], layers: int) -> list[list[Any]] | None:
    """``[layer][prompt]`` as ``[prompt][layer]``; None where the number of entries is another."""
    if len(given) != layers or len(given[0]) == layers or not all(map(is_tensors, given)):
        return None
    shapes = {tuple(tuple(one.shape) for one in own) for own in given}
    return [list(own) for own in zip(*given, strict=True)] if len(shapes) == 1 else None


def rows_of_layers(given: Sequence[Any], layers: int) -> Tensor | None:
    """``[position][layer]`` of rows ``[D]`` as one tensor; None where the lists are others."""
    if not all(isinstance(own, Sequence) and len(own) == layers for own in given):
        return None
    if not all(isinstance(one, Tensor) and one.ndim == 1 for own in given for one in own):
        return None
    return torch.stack([torch.stack(list(own)) for own in given])


def is_generated(steps: Sequence[Any]) -> bool:
    """Whether these are ``[step][layer]``: one row a step but for the first."""
    same = len({len(step) for step in steps}) == 1
    return len(steps) == 1 or (same and all(one.shape[-2] == 1 for s in steps[1:] for one in s))
