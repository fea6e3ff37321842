"""What lies beside hidden states in a dict: masks, lengths, the number of a layer, token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from lightning_inversion.data.axes import tensor_of
from lightning_inversion.data.contents import holds_ids, holds_states, lengths_in, number_in
from lightning_inversion.data.depths import Depths
from lightning_inversion.data.layout import Beside, Wanted, named
from lightning_inversion.data.names import FINAL, tells_depth
from lightning_inversion.data.padding import tokens_of_mask

_IDS = (
    "token_ids", "input_ids", "prompt_token_ids", "output_ids", "sequences", "ids", "tokens",
)  # fmt: skip
_MASKS = ("attention_mask", "attn_mask", "input_mask", "mask")
_PADDING_MASKS = ("padding_mask", "key_padding_mask", "src_key_padding_mask", "pad_mask")
_INDICES = ("layer_idx", "layer_index")
"""Hugging Face's index of a layer, which is the depth."""
_NUMBERS = ("layer", "layer_num", "layer_number", "layer_id", "depth")
"""Numbers of a layer that count in one way or another."""
_OUTPUTS = ("logits", "past_key_values", "attentions", "loss", "scores", "cross_attentions")
"""What a model's output holds beside hidden states."""


def read_beside(
    held: Mapping[str, Any], beside: Beside, wanted: Wanted, depths: Depths
) -> tuple[Beside, dict[str, Any], list[str]]:
    """What lies beside the states, what may be the states, and the names of token ids.

    Args:
        held: by name, without dicts in it.
        beside: what lay beside the dict.
        wanted: what is asked for.
        depths: which takes the depth that an index tells.

    Raises:
        InputError: a mask cannot be read, or the layer is another than is asked for.
    """
    states: dict[str, Any] = {}
    ids = []
    for name, value in held.items():
        last = _last(name)
        if last in (*_MASKS, *_PADDING_MASKS) and value is not None:
            mask = _mask(value, name, wanted)
            if last in _MASKS:
                beside = replace(beside, mask=tokens_of_mask(mask))
            elif bool((mask != mask.flatten()[0]).any()):
                raise wanted.error(
                    f" holds {name!r}, where 1 may mark tokens or padding; save an "
                    "attention_mask, with 1 for each token."
                )
        elif (lengths := lengths_in(last, value)) is not None:
            beside = replace(beside, lengths=lengths)
        elif last in _INDICES and (index := number_in(value)) is not None:
            blocks = wanted.sizes.blocks
            index = index if index >= 0 else blocks + 1 + index
            beside = replace(beside, depth=FINAL if index == blocks else index)
            depths.pick([index], [name])
            depths.sources.append(f"from {last}")
        elif last in _NUMBERS and (number := number_in(value)) is not None:
            depths.check_number(number, f"{name} {number}")
        elif last in _IDS or holds_ids(value):
            ids.append(name)
            beside = replace(beside, ids_shape=tuple(getattr(value, "shape", ())) or None)
        elif last not in _OUTPUTS and holds_states(value):
            states[name] = value
    return beside, states, ids


def are_prompts(held: Any) -> bool:
    """Whether each entry of a dict is a dict of states with a mask, lengths, index or ids."""
    own = (*_MASKS, *_PADDING_MASKS, *_INDICES, *_NUMBERS, *_IDS, "lengths")

    def of_both(inner: Mapping[Any, Any]) -> bool:
        beside = [_last(str(name)) in own for name in inner]
        states = zip(beside, inner.values(), strict=True)
        return any(beside) and any(
            not known and holds_states(value) and not holds_ids(value) for known, value in states
        )

    return bool(held) and all(
        isinstance(value, Mapping) and of_both(value) and not tells_depth(name)
        for name, value in held.items()
    )


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1].lower()


def _mask(value: Any, name: str, wanted: Wanted) -> Tensor:
    try:
        mask = tensor_of(wanted, value if isinstance(value, Tensor) else np.asarray(value))
    except (TypeError, ValueError) as error:
        raise wanted.error(f"{named(name)} is no mask; save numbers, or leave it out.") from error
    if not mask.numel():
        raise wanted.error(f"{named(name)} is empty; leave it out.")
    return mask
