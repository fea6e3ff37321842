"""Keys and values of attention as caches hold them -> ``[T, F]`` of each prompt.

A cache is transformers' own (``DynamicCache`` and its kin), the older tuple of a pair for each
block, or tensors whose names tell block and kind, such as ``key_cache.3``, ``layers.3.values`` or
``past_key_values.3.key``. Block 3 is the block after depth 3. As features its keys lie head by
head, and its values after them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_inversion.data.axes import floating, tensor_of
from lightning_inversion.data.layout import Beside, Wanted, named
from lightning_inversion.data.names import counted_number, stems_of
from lightning_inversion.data.padding import rows_of_prompts

Kind = Literal["keys", "values"]
_KINDS: dict[str, Kind] = {"keys": "keys", "key": "keys", "k": "keys", "0": "keys",
                           "values": "values", "value": "values", "v": "values",
                           "1": "values"}  # fmt: skip
_NAMES = (
    r"(?P<kind>keys?|values?|k|v)_?(?:cache|states)[./_\[](?P<block>\d+)\]?",
    r"cache_(?P<kind>k|v)_l(?P<block>\d+)",
    r"(?:past_key_values?|past|present)[./_\[](?P<block>\d+)[\]./_\[]+"
    r"(?:decoder[./_])?(?P<kind>keys?|values?|0|1)\]?",
    r"(?:layers?|blocks?|h)[./_](?P<block>\d+)[./_](?:self_attn[./_]|attn[./_]|attention[./_])?"
    r"(?:hook_(?:rot_)?)?(?P<kind>keys?|values?|k|v)(?:_cache)?",
    r"(?P<kind>keys?|values?)[./_\[]?(?P<block>\d+)\]?",
)
"""Names that tell the block and whether it is keys or values."""
_WHOLE = re.compile(r"(?:^|[./_-])(?P<kind>keys?|values?|k|v)(?:_cache|_states)?$", re.IGNORECASE)
"""Names that tell only whether it is keys or values."""
_POSITIONS_FIRST = re.compile(r"hook_(?:rot_)?[kv]$")
"""Names of tensors ``[B, T, heads, size]``; others are ``[B, heads, T, size]``."""

Blocks = dict[int | None, dict[Kind, tuple[str, Any]]]
"""By block (None where nothing tells it) and kind: the name, and the tensor."""


def caches_of_blocks(given: Any, blocks: int) -> list[Blocks]:
    """The keys and values in what holds nothing else, one of each prompt or batch.

    Blocks that lie one by one, without a name, are of one cache where there are as many as the
    model has, and all alike.
    """
    if isinstance(given, Tensor | np.ndarray):  # [blocks, 2, ...] or [2, blocks, ...]
        begins = tuple(given.shape[:2]) if given.ndim > 4 else ()
        if begins == (blocks, 2):
            return _of_pairs(list(given))
        return _of_pairs(list(zip(*given, strict=True))) if begins == (2, blocks) else []
    if isinstance(given, Sequence) and _are_pairs(given, axes=(3, 4)):
        return _of_pairs(given)
    caches = caches_in(given)
    parts = caches
    if not parts and isinstance(given, list | tuple):
        parts = [cache for one in given for cache in caches_in(one)]
    alone = [cache[None] for cache in parts if set(cache) == {None}]
    alike = {
        tuple(sorted((kind, tuple(one.shape)) for kind, (_, one) in own.items())) for own in alone
    }
    if len(alone) == len(parts) == blocks and len(alike) == 1:
        return [dict(enumerate(alone))]
    return caches


def caches_in(given: Any) -> list[Blocks]:
    """The keys and values in what may hold caches, one of each prompt or batch."""
    layers = getattr(given, "layers", None)
    if isinstance(given, Sequence) and given and all(map(_is_block, given)):
        layers = given
    if isinstance(layers, Sequence) and all(hasattr(one, "keys") for one in layers):
        return _of_pairs([(layer.keys, layer.values) for layer in layers])
    if hasattr(given, "key_cache") and hasattr(given, "value_cache"):
        return _of_pairs(list(zip(given.key_cache, given.value_cache, strict=True)))
    for holder in (given, getattr(given, "__dict__", {})):
        if isinstance(holder, Mapping) and holder.get("past_key_values") is not None:
            return caches_in(holder["past_key_values"])
    if isinstance(given, Mapping):
        return _of_numbered_pairs(given) or _of_names(given)
    if isinstance(given, Sequence) and not isinstance(given, str) and _are_pairs(given):
        return _of_pairs(given)
    return []


def holds_caches(given: Any) -> bool:
    """Whether this is a cache of keys and values, or a list of caches, and holds nothing else."""
    if isinstance(given, Mapping):
        plain = given.get("hidden_states") is None and given.get("past_key_values") is not None
        return plain and bool(caches_in(given))
    if getattr(given, "hidden_states", None) is not None:
        return False
    if caches_in(given):
        return True
    return isinstance(given, list) and bool(given) and all(map(holds_caches, given))


def prompts_of(blocks: Blocks, wanted: Wanted, beside: Beside) -> list[Tensor]:
    """The keys or values that are wanted of each prompt, ``[T_i, F]``.

    Raises:
        InputError: the cache lacks what is wanted.
    """
    depths = wanted.depths or (wanted.sizes.blocks - 1,)
    kinds: tuple[Kind, ...] = ("keys", "values")
    kinds = tuple(kind for kind in kinds if wanted.output in (kind, "keys_values"))
    parts = []
    for depth in depths:
        held = blocks.get(depth, blocks.get(None) if len(depths) == 1 else None)
        if held is None:
            told = ", ".join(str(block) for block in sorted(b for b in blocks if b is not None))
            raise wanted.error(
                f" holds keys and values after depths {told}, and depth {depth} is asked for; "
                "set --model.transformer.depth to one (0 for those of the first block)."
            )
        for kind in kinds:
            if kind not in held:
                (other,) = held
                raise wanted.error(
                    f" holds no {kind} after depth {depth}; set --model.transformer.output {other}."
                )
            name, tensor = held[kind]
            parts.append(arrange_heads(wanted, tensor, name))
    if len({part.shape[:2] for part in parts}) > 1:
        raise wanted.error(" holds keys and values of different lengths; save them together.")
    return rows_of_prompts(wanted, torch.cat(parts, dim=-1), beside)


def arrange_heads(wanted: Wanted, tensor: Any, name: str = "") -> Tensor:
    """Keys or values ``[B, heads, T, size]``, or without B, as ``[B, T, heads * size]``.

    Raises:
        InputError: the tensor has another number of axes, or its heads cannot be told.
    """
    states = floating(wanted, tensor_of(wanted, tensor), name)
    shape = list(states.shape)
    if states.dim() == 3:
        states = states[None]
    if states.dim() != 4 or not states.numel():
        raise wanted.error(
            f"{named(name)} has shape {shape}; store keys and values as [prompts, heads, "
            "positions, size]."
        )
    heads_first = not _POSITIONS_FIRST.search(name)
    if wanted.shape is not None:
        heads = wanted.sizes.heads
        at = [axis for axis in (1, 2) if states.shape[axis] == heads]
        if len(at) == 1:
            heads_first = at == [1]
    if heads_first:
        states = states.transpose(1, 2)
    return states.flatten(2)


def _is_block(given: Any) -> bool:
    return all(isinstance(getattr(given, kind, None), Tensor | np.ndarray)
               for kind in ("keys", "values"))  # fmt: skip


def _of_pairs(pairs: Sequence[Any]) -> list[Blocks]:
    """Some layers of a model may keep other things than keys and values."""
    return [
        {
            block: {"keys": ("", pair[0]), "values": ("", pair[1])}
            for block, pair in enumerate(pairs)
            if isinstance(pair[0], Tensor | np.ndarray) and isinstance(pair[1], Tensor | np.ndarray)
        }
    ]


def _are_pairs(given: Sequence[Any], axes: tuple[int, ...] = (4,)) -> bool:
    """Whether this is the older tuple: for each block a pair of tensors of so many axes."""
    return bool(given) and all(
        isinstance(pair, Sequence)
        and not isinstance(pair, str)
        and len(pair) >= 2
        and all(isinstance(part, Tensor | np.ndarray) and part.ndim in axes for part in pair[:2])
        and pair[0].shape[:3] == pair[1].shape[:3]
        for pair in given
    )


def _of_numbered_pairs(held: Mapping[Any, Any]) -> list[Blocks]:
    """A pair for each block, whose number is the name or ends it."""
    numbers = [counted_number(str(name)) if not str(name).isdecimal() else int(name)
               for name in held]  # fmt: skip
    if None in numbers or len(set(numbers)) < len(held) or not _are_pairs(list(held.values())):
        return []
    blocks = _of_pairs(list(held.values()))[0]
    return [{numbers[index or 0]: pair for index, pair in blocks.items()}]


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], int | float)


def _name_of_block(name: str) -> tuple[re.Match[str] | None, str]:
    """What tells block and kind in a name, and what comes after it."""
    for stem, suffix in stems_of(name):
        for pattern in _NAMES:
            if found := re.search(rf"(?:^|[./_-]){pattern}$", stem, re.IGNORECASE):
                return found, suffix
    return None, ""


def _of_names(held: Mapping[str, Any]) -> list[Blocks]:
    """Tensors whose names tell what they are; lists under ``key_cache`` have a block for each.

    The beginnings of names tell caches apart.
    """
    caches: dict[str, Blocks] = {}
    for name, value in held.items():
        found, suffix = _name_of_block(name)
        if found is not None:
            blocks = caches.setdefault(name[: found.start()] + suffix, {})
            of_block = blocks.setdefault(int(found["block"]), {})
            of_block[_KINDS[found["kind"].lower()]] = (name, value)
        elif (whole := _WHOLE.search(name)) is not None and not _are_numbers(value):
            blocks = caches.setdefault(name[: whole.start()], {})
            kind = _KINDS[whole["kind"].lower()]
            several = isinstance(value, Sequence) or getattr(value, "ndim", 0) == 5
            for block, one in enumerate(value) if several else [(None, value)]:
                blocks.setdefault(block, {})[kind] = (name, one)
    return list(caches.values())
