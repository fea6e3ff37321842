"""Which blocks' outputs are the features, and which part of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lightning_inversion.errors import InputError
from lightning_inversion.transformer.blocks import block_count, block_output, text_config

DEFAULT_DEPTH = 1

_SLICE = re.compile(r"(-?\d+)?:(-?\d+)?")


@dataclass(frozen=True)
class Selection:
    """The features that are read out of a model.

    Args:
        layers: the depths read, ascending; their features are concatenated.
        features: a slice of the concatenated features, 'start:stop', or None for all.
        final_norm: whether the model's final norm is applied to the last depth's features.
        centred: whether each depth's features lose their mean over the features.
    """

    layers: tuple[int, ...]
    features: str | None = None
    final_norm: bool = False
    centred: bool = False

    @classmethod
    def of(
        cls,
        config: PretrainedConfig,
        depth: int | None,
        layers: Sequence[int] | None,
        features: str | None,
        final_norm: bool,
    ) -> Selection:
        """What the options select in a language model of this configuration.

        Raises:
            InputError: options contradict, or the model has fewer blocks or features.
        """
        check_depths(depth, layers)
        check_slice(features)
        total = block_count(config)
        chosen = tuple(layers) if layers else (total if depth is None else depth,)
        if chosen[-1] > total:
            raise InputError(
                f"--model.transformer.{'layers' if layers else 'depth'}: {chosen[-1]} blocks "
                f"were asked for and the model has {total}; choose {total} or fewer."
            )
        size = text_config(config).hidden_size * len(chosen)
        if features is not None and not range(size)[slice_of(features)]:
            raise InputError(
                f"--model.transformer.features: {features!r} selects nothing of {size} "
                f"features; choose a slice within 0:{size}."
            )
        return cls(chosen, features, final_norm)

    @property
    def depth(self) -> int:
        """The number of blocks needed."""
        return self.layers[-1]

    @contextmanager
    def capturing(self, blocks: Sequence[nn.Module]) -> Iterator[dict[int, Tensor]]:
        """Collects the outputs of the chosen blocks while the model runs, by depth."""
        outputs: dict[int, Tensor] = {}

        def capture(depth: int) -> Callable[[nn.Module, Any, Any], None]:
            def hook(block: nn.Module, inputs: Any, output: Any) -> None:
                outputs[depth] = block_output(output)

            return hook

        handles = [blocks[depth - 1].register_forward_hook(capture(depth)) for depth in self.layers]
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()

    def features_in(self, outputs: dict[int, Tensor], output: Any) -> Tensor:
        """The features [B, T, F] in captured outputs; `output` is the model's own."""
        parts = [outputs[depth] for depth in self.layers]
        if self.final_norm:
            parts[-1] = output.last_hidden_state
        if self.centred:
            parts = [part.float() - part.float().mean(-1, keepdim=True) for part in parts]
        # Blocks may lie on several devices.
        together = torch.cat([part.to(parts[0].device) for part in parts], dim=-1)
        return together if self.features is None else together[..., slice_of(self.features)]

    def description(self) -> dict[str, Any]:
        """The selection as plain values."""
        return {
            "depth": self.depth,
            "layers": list(self.layers),
            "features": self.features,
            "final_norm": self.final_norm,
            **({"centred": True} if self.centred else {}),
        }


def check_depths(depth: int | None, layers: Sequence[int] | None) -> None:
    """Raise InputError if the depths make no sense, whatever the model.

    With `layers` the depth follows: it may be left at its default, be None, or be equal.
    """
    if depth is not None and depth < 1:
        raise InputError(
            f"--model.transformer.depth: {depth} blocks leave nothing to invert; "
            "choose 1 or more, or null for all."
        )
    if layers is None:
        return
    if not layers or min(layers) < 1 or list(layers) != sorted(set(layers)):
        raise InputError(
            f"--model.transformer.layers: {list(layers)} is not a list of ascending depths "
            "from 1 on; write it as [1,2,3]."
        )
    if depth not in (None, DEFAULT_DEPTH, layers[-1]):
        raise InputError(
            f"--model.transformer.depth: {depth} contradicts --model.transformer.layers "
            f"{list(layers)}, whose depth is {layers[-1]}; leave one of them out."
        )


def check_slice(features: str | None, option: str = "--model.transformer.features") -> None:
    """Raise InputError, which names `option`, if `features` is not written 'start:stop'."""
    if features is not None and not _SLICE.fullmatch(features):
        raise InputError(
            f"{option}: {features!r} is not a slice; write it as 'start:stop', for example '0:64'."
        )


def slice_of(features: str) -> slice:
    """The slice that 'start:stop' names."""
    start, stop = features.split(":")
    return slice(int(start) if start else None, int(stop) if stop else None)
