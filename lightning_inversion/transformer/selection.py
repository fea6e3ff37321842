"""Which blocks' outputs, or keys and values, are the features, and which part of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache

from lightning_inversion.errors import InputError
from lightning_inversion.transformer.blocks import block_count, block_output, text_config

DEFAULT_DEPTH = 1
Output = Literal["hidden_states", "keys_values", "keys", "values"]
"""Hidden states, or what the block after them keeps of each position for attention."""

_SLICE = re.compile(r"(-?\d+)?:(-?\d+)?")


@dataclass(frozen=True)
class Selection:
    """The features that are read out of a model.

    Args:
        layers: the depths read, ascending; their features are concatenated.
        features: a slice of the concatenated features, 'start:stop', or None for all.
        final_norm: whether the model's final norm is applied to the last depth's features.
        centred: whether each depth's features lose their mean over the features.
        output: hidden states; or keys, values, or both (all keys first, head by head) that the
            block after each depth computes of them, as they lie in its cache.
    """

    layers: tuple[int, ...]
    features: str | None = None
    final_norm: bool = False
    centred: bool = False
    output: Output = "hidden_states"

    @classmethod
    def of(
        cls,
        config: PretrainedConfig,
        depth: int | None,
        layers: Sequence[int] | None,
        features: str | None,
        final_norm: bool,
        output: Output = "hidden_states",
    ) -> Selection:
        """What the options select in a language model of this configuration.

        Raises:
            InputError: options contradict, or the model has fewer blocks or features.
        """
        check_depths(depth, layers, output)
        check_slice(features)
        check_output(output, features, final_norm)
        total = block_count(config) - (output != "hidden_states")
        chosen = tuple(layers) if layers else (total if depth is None else depth,)
        if chosen[-1] > total and output != "hidden_states":
            raise InputError(
                f"--model.transformer.{'layers' if layers else 'depth'}: {output} after "
                f"{chosen[-1]} blocks were asked for, and the last block is after {total}; choose "
                f"{total} or fewer."
            )
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
        return cls(chosen, features, final_norm, output=output)

    @property
    def depth(self) -> int:
        """The last depth that is read."""
        return self.layers[-1]

    @property
    def blocks(self) -> int:
        """The number of blocks needed."""
        return self.depth + self.of_cache

    @property
    def of_cache(self) -> bool:
        """Whether the features are keys or values."""
        return self.output != "hidden_states"

    @contextmanager
    def capturing(self, blocks: Sequence[nn.Module]) -> Iterator[dict[int, Tensor]]:
        """Collects the outputs of the chosen blocks while the model runs, by depth."""
        outputs: dict[int, Tensor] = {}
        if self.of_cache:
            yield outputs
            return

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

    def features_in(
        self, outputs: dict[int, Tensor], output: Any, cache: Cache | None = None
    ) -> Tensor:
        """The features [B, T, F] in captured outputs; `output` is the model's own.

        Keys and values are the latest of a cache of `kv_cache`'s layers.
        """
        if self.of_cache:
            assert cache is not None
            parts = [kept for depth in self.layers for kept in self._kept(cache.layers[depth])]
        else:
            parts = [outputs[depth] for depth in self.layers]
        if self.final_norm:
            parts[-1] = output.last_hidden_state
        if self.centred:
            parts = [part.float() - part.float().mean(-1, keepdim=True) for part in parts]
        # Blocks may lie on several devices.
        together = torch.cat([part.to(parts[0].device) for part in parts], dim=-1)
        return together if self.features is None else together[..., slice_of(self.features)]

    def _kept(self, layer: Any) -> list[Tensor]:
        """Keys and values `[B, T, H d]` of a forward's own tokens."""
        if layer.fresh is None:
            raise InputError(
                f"--model.transformer.output {self.output}: the block after depth {self.depth} "
                "keeps no keys and values; choose another depth, or hidden_states."
            )
        keys, values = (part.transpose(1, 2).flatten(2) for part in layer.fresh)
        return {"keys": [keys], "values": [values]}.get(self.output, [keys, values])

    def description(self) -> dict[str, Any]:
        """The selection as plain values."""
        return {
            "depth": self.depth,
            "layers": list(self.layers),
            "features": self.features,
            "final_norm": self.final_norm,
            **({"centred": True} if self.centred else {}),
            **({"output": self.output} if self.of_cache else {}),
        }


def check_output(output: Output, features: str | None, final_norm: bool) -> None:
    """Raise InputError for options that change hidden states, where keys or values are read."""
    for name, given in (("features", features is not None), ("final_norm", final_norm)):
        if given and output != "hidden_states":
            raise InputError(
                f"--model.transformer.{name} is for hidden states, and --model.transformer.output "
                f"is {output}; leave one of them out."
            )


def check_depths(
    depth: int | None, layers: Sequence[int] | None, output: Output = "hidden_states"
) -> None:
    """Raise InputError if the depths make no sense, whatever the model.

    With `layers` the depth follows: it may be left at its default, be None, or be equal. Keys and
    values may be those of the first block, after depth 0.
    """
    least = 0 if output != "hidden_states" else 1
    if depth is not None and depth < least:
        raise InputError(
            f"--model.transformer.depth: {depth} blocks leave nothing to invert; "
            f"choose {least} or more, or null for all."
        )
    if layers is None:
        return
    if not layers or min(layers) < least or list(layers) != sorted(set(layers)):
        raise InputError(
            f"--model.transformer.layers: {list(layers)} is not a list of ascending depths "
            f"from {least} on; write it as [1,2,3]."
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
