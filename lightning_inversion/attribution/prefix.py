"""The keys and values of one clean pass, shared by every row that starts like it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class _SharedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """The first `length` keys and values of a layer, read by any number of rows, never written."""

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = length
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = keys[..., :length, :], values[..., :length, :]
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """How long the prefix is, before and after a forward."""
        return self.length

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The prefix followed by the rows' own keys and values, which are not kept.

        So one layer's rows are in memory at a time, not every layer's.
        """
        rows = key_states.shape[0]
        assert self.keys is not None
        assert self.values is not None
        return (
            torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], dim=-2),
            torch.cat([self.values.expand(rows, -1, -1, -1), value_states], dim=-2),
        )


class CleanPrefix:
    """What a clean pass left in `cache`, of which any beginning can be used again.

    In a causal model the positions before c do not depend on token c, so a row that differs from
    the clean text at c only has to be run from c on.

    Args:
        cache: filled by one forward of one row of `length` tokens.
        length: T.

    Raises:
        ValueError: the cache does not hold plain keys and values of each position.
    """

    def __init__(self, cache: Cache, length: int) -> None:
        self._layers: list[tuple[Tensor, Tensor]] = []
        for layer in cache.layers:
            if type(layer) is not DynamicLayer or layer.get_seq_length() != length:
                raise ValueError(f"the model keeps a {type(layer).__name__}")
            assert layer.keys is not None
            assert layer.values is not None
            self._layers.append((layer.keys, layer.values))
        if not self._layers:
            raise ValueError("the model keeps no keys and values")

    def of(self, length: int) -> Cache:
        """A cache that holds the first `length` positions for any number of rows."""
        return Cache(layers=[_SharedLayer(keys, values, length) for keys, values in self._layers])
