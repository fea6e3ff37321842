"""Hidden states as other tools hold them, in a file or in memory -> ``[T, F]`` of each prompt.

Which entry of a tuple, a dict or an axis is the depth that is asked for follows from names and
shapes (``names.py``). Where they leave a choice, the error names it. Token ids that lie beside the
states are reported, and nothing reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_inversion.data.key_values import arrange_heads, caches_in, prompts_of
from lightning_inversion.data.layout import (
    Beside,
    Wanted,
    arrange,
    named,
    rows_of_prompts,
)
from lightning_inversion.data.names import (
    FINAL,
    NamedDepth,
    depth_of_name,
    depths_of_counted,
    is_other_hook,
    natural,
)
from lightning_inversion.errors import InputError

_IDS = (
    "token_ids", "input_ids", "prompt_token_ids", "output_ids", "sequences", "ids", "tokens",
)  # fmt: skip
_MASKS = ("attention_mask", "mask")
_LAYER = ("layer_idx", "layer_index")
_OUTPUTS = ("logits", "past_key_values", "attentions", "loss", "scores", "cross_attentions")
"""What a model's output holds beside hidden states."""


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

        Rounded values that were converted back are compared as rounded ones.
        """
        dtypes = {prompt.dtype for prompt in self.prompts}
        if dtypes <= {torch.float32, torch.float64}:
            for dtype in (torch.bfloat16, torch.float16):
                if all(bool((own.to(dtype) == own).all()) for own in self.prompts):
                    return str(dtype).removeprefix("torch.")
        return str(self.prompts[0].dtype).removeprefix("torch.")


_LARGEST = 1e15
"""Of a value: float32 holds the sum of their squares over any number of features."""


def read_hidden_states(given: Any, wanted: Wanted) -> HiddenStates:
    """The prompts in a tensor, or in tensors in dicts, lists and outputs of models.

    Raises:
        InputError: nothing in it can be read as the states that are asked for, or more than one
            reading is possible.
    """
    reader = _Reader(wanted)
    prompts = reader.prompts(given, "", Beside())
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
        ", ".join(dict.fromkeys(reader.sources)) or "depth as told",
        tuple(dict.fromkeys(reader.ids_beside)),
        reader.padding,
    )


class _Reader:
    def __init__(self, wanted: Wanted) -> None:
        self.wanted, self.layout = wanted, wanted.layout
        self.sources: list[str] = []
        self.ids_beside: list[str] = []
        self.padding = 0

    # -- what holds tensors ------------------------------------------------------------------

    def prompts(self, given: Any, name: str, beside: Beside) -> list[Tensor]:
        if self.wanted.output != "hidden_states":
            return self._of_cache(given, name, beside)
        if isinstance(given, Tensor | np.ndarray):
            return self._of_tensor(self._tensor(given), name, beside)
        if hasattr(given, "items"):
            return self._of_dict(_flat(given), beside)
        if getattr(given, "hidden_states", None) is not None:
            return self._of_dict({"hidden_states": given.hidden_states}, beside)
        if isinstance(given, Sequence) and not isinstance(given, str | bytes):
            return self._of_sequence(given, name, beside)
        self._refuse_caches(given)
        kind = type(given).__name__
        raise self.wanted.error(f" holds a {kind}; give tensors, in a list, a tuple or a dict.")

    def _of_cache(self, given: Any, name: str, beside: Beside) -> list[Tensor]:
        """Keys and values: a cache, tensors ``[T, F]`` as ``capture`` writes them, or several."""
        if isinstance(given, Tensor | np.ndarray):
            tensor = self._tensor(given)
            if tensor.dim() == 2:
                return [tensor]
            if self.wanted.output == "keys_values":
                raise self.wanted.error(
                    f"{named(name)} has shape {list(tensor.shape)}, and may be keys or values; set "
                    "--model.transformer.output to one of them."
                )
            return rows_of_prompts(self.wanted, arrange_heads(self.wanted, tensor, name), beside)
        held = _flat(given) if isinstance(given, Mapping) else given
        if isinstance(held, Mapping):
            beside, _ = self._beside(held, beside)
        if caches := caches_in(held):
            return [one for cache in caches for one in prompts_of(cache, self.wanted, beside)]
        if isinstance(held, Mapping):
            parts = [value for _, value in sorted(held.items(), key=lambda one: natural(one[0]))
                     if _holds_states(value) and not _holds_ids(value)]  # fmt: skip
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
        if isinstance(value, Tensor):
            return value.detach().cpu()
        if value.dtype.kind not in "fiub":
            raise self.wanted.error(f" holds NumPy values of type {value.dtype}; store numbers.")
        return torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))

    def _beside(self, held: Mapping[str, Any], beside: Beside) -> tuple[Beside, dict[str, Any]]:
        """What lies beside the states in a dict, and what may be the states."""
        states: dict[str, Any] = {}
        for name, value in held.items():
            last = name.rsplit(".", 1)[-1].lower()
            if last in _MASKS and isinstance(value, Tensor | np.ndarray):
                beside = replace(beside, mask=self._tensor(value).bool())
            elif last in _LAYER and _number(value) is not None:
                index = _number(value)
                assert index is not None
                blocks = self.wanted.sizes.blocks
                index = index if index >= 0 else blocks + 1 + index
                beside = replace(beside, depth=FINAL if index == blocks else index)
                self._pick([index], [name])
                self.sources.append(f"from {last}")
            elif last in _IDS or _holds_ids(value):
                self.ids_beside.append(name)
                shape = tuple(getattr(value, "shape", ())) or None
                beside = replace(beside, ids_shape=shape)
            elif last not in _OUTPUTS and _holds_states(value):
                states[name] = value
        return beside, states

    def _of_dict(self, held: dict[str, Any], beside: Beside) -> list[Tensor]:
        beside, states = self._beside(held, beside)
        if "hidden_states" in states:
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
        return [
            prompt
            for name in sorted(states, key=natural)
            for prompt in self.prompts(states[name], name, beside)
        ]

    def _of_hooks(
        self, states: dict[str, Any], told: dict[str, NamedDepth], beside: Beside
    ) -> list[Tensor]:
        """Tensors whose names tell the depth, of one prompt or, by what else is in the name, more.

        Others in the dict are of other parts of the model.
        """
        prompts = []
        for group in sorted({found.prompt for found in told.values()}, key=natural):
            own = {name: found for name, found in told.items() if found.prompt == group}
            names = list(own)
            picked = self._pick([own[name].depth for name in names], names)
            self.sources.extend(own[names[index]].source for index in picked)
            parts = [
                self.prompts(
                    states[names[index]],
                    names[index],
                    replace(beside, depth=own[names[index]].depth),
                )
                for index in picked
            ]
            prompts += self._side_by_side(parts)
        return prompts

    def _of_sequence(self, given: Sequence[Any], name: str, beside: Beside) -> list[Tensor]:
        if not given:
            raise self.wanted.error(" holds no tensor; give one or more.")
        self._refuse_caches(given)
        if all(isinstance(one, int | float) for one in _leaves(given)):
            return self._of_numbers(given, name, beside)
        if not all(isinstance(one, Tensor | np.ndarray) for one in given):
            if all(_is_tensors(one) for one in given) and _is_generated(given):
                self.sources.append("from the steps of generate")
                given = [
                    torch.cat([self._tensor(step[layer]) for step in given], dim=-2)
                    for layer in range(len(given[0]))
                ]
                return self._of_sequence(given, name, beside)
            return [prompt for one in given for prompt in self.prompts(one, name, beside)]
        tensors = [self._tensor(one) for one in given]
        if tensors[-1].dim() == 1 and tensors[0].dim() <= 2:  # a prompt, then a row a step
            rows = torch.cat([one.reshape(-1, one.shape[-1]) for one in tensors])
            return self._of_tensor(rows, name, beside)
        alike = len(tensors) > 1 and len({one.shape for one in tensors}) == 1
        axes = self.layout.axes
        if alike and axes is not None and len(axes) == tensors[0].dim() + 1:
            return self._of_tensor(torch.stack(tensors), name, beside)
        if alike and tensors[0].dim() <= 3 and self._are_layers(tensors):
            return self._of_layers(tensors, name, beside)
        return [prompt for one in tensors for prompt in self._of_tensor(one, name, beside)]

    def _of_numbers(self, given: Sequence[Any], name: str, beside: Beside) -> list[Tensor]:
        """Nested lists, as a server answers: [T, D], or the prompt [T, D] and [D] for each step."""
        try:
            if isinstance(given[0][0], Sequence) and not isinstance(given[-1][0], Sequence):
                return self._of_tensor(torch.tensor([*given[0], *given[1:]]), name, beside)
            return self._of_tensor(torch.tensor(given), name, beside)
        except (TypeError, ValueError, IndexError) as error:
            raise self.wanted.error(" holds lists of different lengths; give tensors.") from error

    def _are_layers(self, tensors: list[Tensor]) -> bool:
        """Whether tensors of one shape are the layers of one run, and no prompts of one length."""
        if self.layout.depths is not None:
            return len(tensors) == len(self.layout.depths)
        if self.wanted.shape is None:
            return False
        if len(tensors) == self.wanted.sizes.blocks and self.layout.axes is None:
            raise self.wanted.error(
                f" holds {len(tensors)} tensors of one shape, prompts or the outputs of "
                f"{len(tensors)} blocks; set --data.layout.axes prompts,positions,features, or "
                f"--data.layout.depths [1,2,...,{len(tensors)}]."
            )
        return len(tensors) == self.wanted.sizes.blocks + 1

    def _of_layers(self, tensors: list[Tensor], name: str, beside: Beside) -> list[Tensor]:
        depths = self._depths_of_layers(len(tensors), name)
        parts = [
            self._of_tensor(tensors[index], name, replace(beside, depth=depths[index]))
            for index in self._pick(depths)
        ]
        return self._side_by_side(parts)

    # -- one tensor --------------------------------------------------------------------------

    def _of_tensor(self, tensor: Tensor, name: str, beside: Beside) -> list[Tensor]:
        arranged = arrange(self.wanted, tensor, name, beside)
        layers = arranged.shape[1]
        if layers == 1 or beside.depth is not None:
            return self._rows(arranged[:, 0], beside)
        picked = self._pick(self._depths_of_layers(layers, name))
        return self._rows(torch.cat([arranged[:, index] for index in picked], dim=-1), beside)

    def _rows(self, states: Tensor, beside: Beside) -> list[Tensor]:
        prompts = rows_of_prompts(self.wanted, states, beside)
        self.padding += states.shape[:2].numel() - sum(map(len, prompts))
        return prompts

    # -- depths ------------------------------------------------------------------------------

    def _depths_of_layers(self, layers: int, name: str) -> list[int]:
        told = self.layout.depths
        if told is not None:
            if len(told) != layers:
                raise self.wanted.error(
                    f"{named(name)} holds {layers} layers, and --data.layout.depths names "
                    f"{len(told)}; name the depth of each."
                )
            self.sources.append("from --data.layout.depths")
            return told
        if self.wanted.shape is not None:
            blocks = self.wanted.sizes.blocks
            if layers == blocks + 1:
                self.sources.append(f"entry of {layers} hidden states")
                return [*range(blocks), FINAL]
            if name.rsplit(".", 1)[-1] == "residual_stream" and layers == blocks:
                self.sources.append("from the outputs of all blocks")
                return list(range(1, blocks + 1))
        raise self.wanted.error(
            f"{named(name)} holds {layers} layers and does not tell which; name the depth of each "
            "with --data.layout.depths, as [4,8]."
        )

    def _pick(self, available: Sequence[int], names: Sequence[str] = ()) -> list[int]:
        """Which of the available depths are asked for.

        Raises:
            InputError: one is not among them.
        """
        blocks = self.wanted.sizes.blocks if FINAL in available or self.wanted.depths is None else 0
        picked = []
        for depth in self.wanted.depths or (blocks,):
            fitting = [
                index
                for index, own in enumerate(available)
                if own == depth or (own == FINAL and depth == blocks)
            ]
            if not fitting:
                held = sorted({blocks if own == FINAL else own for own in available})
                several = f"depths {', '.join(map(str, held[:40]))}"
                what = f"depth {held[0]}" if len(held) == 1 else several
                by_name = f" in {names[0]!r}" if len(held) == 1 and names and names[0] else ""
                way_out = (
                    f"set --model.transformer.depth {held[0] if len(held) == 1 else 'to one'}"
                    if held[-1] > 0
                    else "save the output of a block"
                )
                raise self.wanted.error(
                    f" holds {what}{by_name}, and depth {depth} is asked for; {way_out}."
                )
            normed = [index for index in fitting if available[index] == FINAL]
            plain = [index for index in fitting if available[index] != FINAL]
            first, second = (normed, plain) if self.wanted.final_norm else (plain, normed)
            picked.append((first or second)[0])
        return picked

    def _side_by_side(self, parts: list[list[Tensor]]) -> list[Tensor]:
        """Features of several depths of the same prompts, concatenated."""
        if len(parts) == 1:
            return parts[0]
        if len({tuple(len(prompt) for prompt in part) for part in parts}) > 1:
            raise self.wanted.error(
                " holds depths of prompts that differ in length; save them together."
            )
        return [torch.cat(same, dim=-1) for same in zip(*parts, strict=True)]


def _flat(held: Any) -> dict[str, Any]:
    """A dict of names; nested dicts have names with dots."""
    found: dict[str, Any] = {}
    for key, value in held.items():
        if isinstance(value, Mapping):
            found.update({f"{key}.{inner}": own for inner, own in _flat(value).items()})
        else:
            found[str(key)] = value
    return found


def _number(value: Any) -> int | None:
    if isinstance(value, Tensor | np.ndarray):
        value = value.item() if value.size == 1 or getattr(value, "numel", int)() == 1 else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _holds_ids(value: Any) -> bool:
    """Whether integers are too few or too wide for bits of features."""
    if isinstance(value, Tensor | np.ndarray):
        if isinstance(value, np.ndarray):
            integers, size = value.dtype.kind in "iu", value.itemsize
        else:
            integers = not (value.is_floating_point() or value.is_complex())
            integers, size = integers and value.dtype != torch.bool, value.element_size()
        return integers and (size > 2 or value.ndim < 2)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return bool(value) and all(isinstance(one, int) for one in _leaves(value))
    return False


def _holds_states(value: Any) -> bool:
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim > 0
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return bool(value) and not any(isinstance(one, str) for one in value)
    return getattr(value, "hidden_states", None) is not None


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [leaf for one in value for leaf in _leaves(one)]
    return [value]


def _is_tensors(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and bool(value)
        and all(isinstance(one, Tensor | np.ndarray) and one.ndim >= 2 for one in value)
    )


def _is_generated(steps: Sequence[Any]) -> bool:
    """Whether these are ``[step][layer]``: one row a step but for the first."""
    same = len({len(step) for step in steps}) == 1
    return len(steps) == 1 or (same and all(one.shape[-2] == 1 for s in steps[1:] for one in s))
