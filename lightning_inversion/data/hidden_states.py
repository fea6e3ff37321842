"""Hidden states as other tools hold them, in a file or in memory -> ``[T, F]`` of each prompt.

Which entry of a tuple, a dict or an axis is the depth that is asked for follows from names and
shapes (``names.py``). Where they leave a choice, the error names it. Token ids that lie beside the
states are reported, and nothing reads them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_inversion.data.axes import arrange, floating, refuse_quantised, tensor_of
from lightning_inversion.data.beside import are_prompts, read_beside
from lightning_inversion.data.contents import (
    alone,
    flat,
    holds_ids,
    holds_states,
    is_generated,
    is_tensors,
    leaves,
    opened,
    output_of_block,
    prompts_of_layers,
    rows_of_layers,
)
from lightning_inversion.data.depths import Depths
from lightning_inversion.data.key_values import (
    arrange_heads,
    caches_in,
    caches_of_blocks,
    prompts_of,
)
from lightning_inversion.data.layout import Beside, Wanted, named
from lightning_inversion.data.names import (
    NamedDepth,
    are_of_several_layers,
    depth_of_name,
    depths_of_counted,
    is_other_hook,
    natural,
)
from lightning_inversion.data.padding import rows_of_prompts
from lightning_inversion.errors import InputError

_STEP = re.compile(r"(?:^|[._/-])step[._/-]?\d+$")


@dataclass(frozen=True)
class HiddenStates:
    """What was read.

    Attributes:
        prompts: ``[T_i, F]`` of each.
        source: how the depth was found, in words.
        ids_beside: names of token ids that lie beside the states.
        padding: rows of padding that were dropped.
    """

    prompts: list[Tensor]
    source: str
    ids_beside: tuple[str, ...] = ()
    padding: int = 0

    @property
    def dtype(self) -> str:
        """The coarsest of float32, float16 and bfloat16 that holds every value exactly.

        Rounded values that were converted back are compared as rounded ones, and all prompts as the
        one that is rounded most.
        """
        dtypes = {prompt.dtype for prompt in self.prompts}
        if dtypes <= {torch.float32, torch.float64}:
            for dtype in (torch.bfloat16, torch.float16):
                if all(bool((own.to(dtype) == own).all()) for own in self.prompts):
                    return str(dtype).removeprefix("torch.")
        coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        return str(coarsest).removeprefix("torch.")


_LARGEST = 1e15
"""Of a value: float32 holds the sum of their squares over any number of features."""


def read_hidden_states(given: Any, wanted: Wanted) -> HiddenStates:
    """The prompts in a tensor, or in tensors in dicts, lists and outputs of models.

    Raises:
        InputError: nothing in it can be read as the states that are asked for, or more than one
            reading is possible.
    """
    reader = _Reader(wanted)
    try:
        prompts = reader.prompts(given, "", Beside())
    except RecursionError as error:
        raise wanted.error(" holds itself, or is nested too deep; give tensors.") from error
    for number, prompt in enumerate(prompts, start=1):
        where = f"{wanted.where}: prompt {number}"
        if prompt.shape[1] != prompts[0].shape[1]:
            raise InputError(
                f"{where} has {prompt.shape[1]} features and prompt 1 has {prompts[0].shape[1]}; "
                "store the same of every prompt."
            )
        if not bool((prompt.float().abs() <= _LARGEST).all()):  # false of nan too
            raise InputError(
                f"{where} holds nan, infinite values or ones above {_LARGEST:.0e}; float16 gives "
                "infinite ones above 65504: store bfloat16 or float32."
            )
    return HiddenStates(
        prompts,
        ", ".join(dict.fromkeys(reader.depths.sources)) or "depth as told",
        tuple(dict.fromkeys(reader.ids_beside)),
        reader.padding,
    )


class _Reader:
    def __init__(self, wanted: Wanted) -> None:
        self.wanted, self.layout = wanted, wanted.layout
        self.depths = Depths(wanted)
        self.ids_beside: list[str] = []
        self.padding = 0

    # -- what holds tensors ------------------------------------------------------------------

    def prompts(self, given: Any, name: str, beside: Beside) -> list[Tensor]:
        if self.wanted.output != "hidden_states":
            return self._of_cache(given, name, beside)
        given = opened(given)
        if isinstance(given, Tensor | np.ndarray):
            return self._of_tensor(self._tensor(given), name, beside)
        if self.wanted.logits and isinstance(getattr(given, "logits", None), Tensor):
            given = given.logits
            return self._of_tensor(self._tensor(given), name, beside)
        if hasattr(given, "items"):
            if are_prompts(given):
                names = sorted(given, key=lambda name: natural(str(name)))
                return [prompt for one in names for prompt in self.prompts(given[one], "", beside)]
            return self._of_dict(flat(given), beside)
        if getattr(given, "hidden_states", None) is not None:
            return self._of_dict({"hidden_states": given.hidden_states}, beside)
        if isinstance(given, Sequence) and not isinstance(given, str | bytes):
            return self._of_sequence(given, name, beside)
        self._refuse_caches(given)
        kind = type(given).__name__
        raise self.wanted.error(f" holds a {kind}; give tensors, in a list, a tuple or a dict.")

    def _of_cache(self, given: Any, name: str, beside: Beside) -> list[Tensor]:
        """Keys and values: a cache, tensors ``[T, F]`` as ``capture`` writes them, or several."""
        held = flat(given) if isinstance(given, Mapping) else given
        if isinstance(held, Mapping):
            beside, _ = self._beside(held, beside)
        blocks = 0 if self.wanted.shape is None else self.wanted.sizes.blocks
        if caches := caches_of_blocks(held, blocks):
            return [one for cache in caches for one in prompts_of(cache, self.wanted, beside)]
        if isinstance(given, Tensor | np.ndarray):
            tensor = self._tensor(given)
            if tensor.dim() == 2:
                return [floating(self.wanted, tensor, name)]
            if self.wanted.output == "keys_values":
                raise self.wanted.error(
                    f"{named(name)} has shape {list(tensor.shape)}, and may be keys or values; set "
                    "--model.transformer.output to one of them."
                )
            return rows_of_prompts(self.wanted, arrange_heads(self.wanted, tensor, name), beside)
        if isinstance(held, Mapping):
            parts = [value for _, value in sorted(held.items(), key=lambda one: natural(one[0]))
                     if holds_states(value) and not holds_ids(value)]  # fmt: skip
        else:
            parts = list(given) if isinstance(given, list | tuple) else []
        if not parts:
            raise self.wanted.error(
                " holds no keys and values; save past_key_values, or leave "
                "--model.transformer.output out."
            )
        return [prompt for one in parts for prompt in self._of_cache(one, name, beside)]

    def _refuse_caches(self, given: Any) -> None:
        kinds = {kind for blocks in caches_in(given) for held in blocks.values() for kind in held}
        if kinds:
            output = "keys_values" if len(kinds) == 2 else kinds.pop()
            raise self.wanted.error(
                f" holds {output.replace('_', ' and ')} of a cache; set "
                f"--model.transformer.output {output}."
            )

    def _tensor(self, value: Tensor | np.ndarray) -> Tensor:
        return tensor_of(self.wanted, value)

    def _beside(self, held: Mapping[str, Any], beside: Beside) -> tuple[Beside, dict[str, Any]]:
        """What lies beside the states in a dict, and what may be the states."""
        beside, states, ids = read_beside(held, beside, self.wanted, self.depths)
        self.ids_beside += ids
        return beside, states

    def _of_dict(self, held: dict[str, Any], beside: Beside) -> list[Tensor]:
        beside, states = self._beside(held, beside)
        refuse_quantised(self.wanted, held)
        if self.wanted.logits and "logits" in held:
            states = {"logits": held["logits"]}
        elif "hidden_states" in states:
            states = {"hidden_states": states["hidden_states"]}
        if not states:
            found = ", ".join(list(held)[:3]) or "nothing"
            self._refuse_caches(held)
            raise self.wanted.error(f" holds {found}, and no hidden states; save them too.")
        told = {name: depth for name in states if (depth := depth_of_name(name)) is not None}
        if told and beside.depth is None:
            return self._of_hooks(states, told, beside)
        if all(getattr(value, "ndim", 3) > 2 for value in states.values()):
            self._refuse_caches(states)
        if counted := depths_of_counted(
            sorted(states, key=natural), self.layout.depths, lambda: self.wanted.sizes.blocks
        ):
            if isinstance(counted, str):
                raise self.wanted.error(f" {counted}")
            return self._of_hooks(states, counted, beside)
        other = next((name for name in states if is_other_hook(name)), None)
        if other is not None:
            raise self.wanted.error(
                f" holds {other!r}, which is no residual stream; save the output of a block."
            )
        names = sorted(states, key=natural)
        if (counted_depth := self.depths.of_numbered_layer(names)) is not None:
            beside = replace(beside, depth=counted_depth)
        if all(map(_STEP.search, names)) and is_generated([[states[name]] for name in names]):
            rows = torch.cat([self._tensor(states[name]) for name in names], dim=-2)
            return self._of_tensor(rows, "", beside)
        if all(getattr(states[name], "ndim", 2) == 1 for name in names) or self.depths.are_numbered(
            names
        ):
            return self._of_sequence([states[name] for name in names], "", beside)
        self._check_prompts({name: states[name] for name in names})
        return [prompt for name in names for prompt in self.prompts(states[name], name, beside)]

    def _check_prompts(self, states: dict[str, Any]) -> None:
        """Refuse tensors of a dict that are not one prompt each."""
        if self.layout.axes is None and are_of_several_layers(list(states)):
            raise self.wanted.error(
                f" holds {', '.join(list(states)[:3])}, whose layers are not clear; end each name "
                "in the layer, as prompt_0/layer_8, or save one layer."
            )
        vectors = [name for name, own in states.items() if getattr(own, "ndim", 2) == 1]
        if vectors and len(vectors) < len(states):
            raise self.wanted.error(
                f" holds {vectors[0]!r} of shape {list(states[vectors[0]].shape)} beside hidden "
                "states; leave it out."
            )

    def _of_hooks(
        self, states: dict[str, Any], told: dict[str, NamedDepth], beside: Beside
    ) -> list[Tensor]:
        """Tensors whose names tell the depth, of one prompt or, by what else is in the name, more.

        Others in the dict are of other parts of the model.
        """
        prompts = []
        for group in sorted({found.prompt for found in told.values()}, key=natural):
            own = self.depths.of_modules(
                {name: found for name, found in told.items() if found.prompt == group}
            )
            names = list(own)
            picked = self.depths.pick([own[name].depth for name in names], names)
            self.depths.sources.extend(own[names[index]].source for index in picked)
            parts = [
                self.prompts(
                    output_of_block(states[names[index]]),
                    names[index],
                    replace(beside, depth=own[names[index]].depth),
                )
                for index in picked
            ]
            prompts += self.depths.side_by_side(parts)
        return prompts

    def _of_sequence(self, given: Sequence[Any], name: str, beside: Beside) -> list[Tensor]:
        if not given:
            raise self.wanted.error(" holds no tensor; give one or more.")
        self._refuse_caches(given)
        given = [alone(one) for one in given]
        ids = [one for one in given if holds_ids(one) and isinstance(one, Tensor | np.ndarray)]
        if 0 < len(ids) < len(given):
            self.ids_beside.append("integers in a list")
            given = [one for one in given if not any(one is other for other in ids)]
        if all(isinstance(one, int | float) for one in leaves(given)):
            return self._of_numbers(given, name, beside)
        if not all(isinstance(one, Tensor | np.ndarray) for one in given):
            if all(is_tensors(one) for one in given) and is_generated(given):
                self.depths.sources.append("from the steps of generate")
                given = [
                    torch.cat([self._tensor(step[layer]) for step in given], dim=-2)
                    for layer in range(len(given[0]))
                ]
                return self._of_sequence(given, name, beside)
            if self.wanted.shape is not None and self.layout.depths is None:
                layers = self.wanted.sizes.blocks + 1
                if (stacked := rows_of_layers(given, layers)) is not None:
                    return self._of_tensor(stacked, name, beside)
                given = prompts_of_layers(given, layers) or given
            return [prompt for one in given for prompt in self.prompts(one, name, beside)]
        tensors = [self._tensor(one) for one in given]
        same_width = len({one.shape[-1:] for one in tensors}) == 1
        if tensors[-1].dim() == 1 and tensors[0].dim() <= 2 and same_width:  # then a row a step
            rows = torch.cat([one.reshape(-1, one.shape[-1]) for one in tensors])
            return self._of_tensor(rows, name, beside)
        alike = len(tensors) > 1 and len({one.shape for one in tensors}) == 1
        axes = self.layout.axes
        if alike and axes is not None and len(axes) == tensors[0].dim() + 1:
            return self._of_tensor(torch.stack(tensors), name, beside)
        if alike and tensors[0].dim() <= 3 and self.depths.are_layers(tensors):
            return self._of_layers(tensors, name, beside)
        return [prompt for one in tensors for prompt in self._of_tensor(one, name, beside)]

    def _of_numbers(self, given: Sequence[Any], name: str, beside: Beside) -> list[Tensor]:
        """Nested lists, as a server answers: [T, D], or the prompt [T, D] and [D] for each step."""
        try:
            if not isinstance(given[0], Sequence):
                return self._of_tensor(torch.tensor(given), name, beside)
            if isinstance(given[0][0], Sequence) and not isinstance(given[-1][0], Sequence):
                given = [*given[0], *given[1:]]
            tensor = torch.tensor(given)
        except (TypeError, ValueError, IndexError) as error:
            raise self.wanted.error(" holds lists of different lengths; give tensors.") from error
        return self._of_tensor(tensor, name, beside)

    def _of_layers(self, tensors: list[Tensor], name: str, beside: Beside) -> list[Tensor]:
        depths = self.depths.of_layers(len(tensors), name)
        parts = [
            self._of_tensor(tensors[index], name, replace(beside, depth=depths[index]))
            for index in self.depths.pick(depths)
        ]
        return self.depths.side_by_side(parts)

    # -- one tensor --------------------------------------------------------------------------

    def _of_tensor(self, tensor: Tensor, name: str, beside: Beside) -> list[Tensor]:
        arranged = arrange(self.wanted, tensor, name, beside)
        layers = arranged.shape[1]
        if layers == 1 or beside.depth is not None:
            return self._rows(arranged[:, 0], beside)
        picked = self.depths.pick(self.depths.of_layers(layers, name))
        return self._rows(torch.cat([arranged[:, index] for index in picked], dim=-1), beside)

    def _rows(self, states: Tensor, beside: Beside) -> list[Tensor]:
        prompts = rows_of_prompts(self.wanted, states, beside)
        self.padding += states.shape[:2].numel() - sum(map(len, prompts))
        return prompts
