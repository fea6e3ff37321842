"""What the things that tools save may hold: states, token ids, numbers, steps of generate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def flat(held: Any) -> dict[str, Any]:
    """A dict of names; nested dicts have names with dots."""
    found: dict[str, Any] = {}
    for key, value in held.items():
        if isinstance(value, Mapping):
            found.update({f"{key}.{inner}": own for inner, own in flat(value).items()})
        else:
            found[str(key)] = value
    return found


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


def is_generated(steps: Sequence[Any]) -> bool:
    """Whether these are ``[step][layer]``: one row a step but for the first."""
    same = len({len(step) for step in steps}) == 1
    return len(steps) == 1 or (same and all(one.shape[-2] == 1 for s in steps[1:] for one in s))
