"""Keys and values of known tokens, and the masks of the tokens that are run after them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from lightning_inversion.transformer.blocks import settings_of


class _Layer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's known keys and values; what a forward adds comes after them, apart."""

    def __init__(self, known: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fresh: tuple[Tensor, Tensor] | None = None
        if known is not None:
            self.keys, self.values = known
            self.dtype, self.device = known[0].dtype, known[0].device
            self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The known ones followed by the forward's own, which are kept as `fresh`."""
        self.fresh = (key_states, value_states)
        if not self.is_initialized:
            return key_states, value_states
        assert self.keys is not None
        assert self.values is not None
        return (
            torch.cat([self.keys, key_states], dim=-2),
            torch.cat([self.values, value_states], dim=-2),
        )


class RaggedCache:
    """Keys and values of each row's known tokens; rows may be of different lengths.

    A forward runs new tokens after them, in any relation to each other: one after another (a
    continuation) or side by side (candidates for one position: tree attention as in SpecInfer,
    arXiv 2305.09781, section 4.2). Afterwards `keep` makes some of the new tokens known. No token
    is run twice, and a row's cost depends on the others' lengths by padding alone.

    Args:
        rows: B.
        layers: how many blocks keep keys and values.
        device: where the model runs.

    Attributes:
        lengths: ``[B]`` known tokens of each row.
    """

    def __init__(self, rows: int, layers: int, device: torch.device) -> None:
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self._layers = layers
        self._stored: list[tuple[Tensor, Tensor]] = []
        self._rows = torch.arange(0, device=device)
        self._fresh: list[tuple[Tensor, Tensor]] = []

    def run(
        self,
        forward: Callable[[Tensor, Tensor, Cache], Tensor],
        rows: Tensor,
        sees: Tensor,
        more: bool = False,
    ) -> Tensor:
        """Run new tokens after the known ones of some rows.

        Args:
            forward: called with the mask ``[R, N, P + N]`` bool, the positions ``[R, N]`` and the
                cache of the P known tokens; returns what the model makes of the new ones.
            rows: ``[R]`` numbers of the rows.
            sees: ``[N, N]`` bool, which new token (row) sees which new token; its position is
                that of the tokens it sees, counted.
            more: `keep` counts these tokens after those of the run before, of the same rows.
        """
        lengths = self.lengths[rows]
        P = int(lengths.max()) if self._stored else 0
        known = torch.arange(P, device=rows.device) < lengths[:, None]
        N = len(sees)
        mask = torch.cat([known[:, None].expand(-1, N, -1), sees.expand(len(rows), -1, -1)], dim=-1)
        positions = lengths[:, None] + sees.sum(-1) - 1
        layers: list[Any] = [_Layer(self._known(n, rows, P)) for n in range(self._layers)]
        output = forward(mask, positions, Cache(layers=layers))
        if all(one.fresh is None for one in layers):
            raise TypeError("the model keeps no keys and values")
        # A block that is not run on text alone (Llama 3.2 Vision) keeps none.
        nothing = (torch.zeros(len(rows), 1, N, 0, device=rows.device),) * 2
        fresh = [
            (keys.detach(), values.detach())
            for keys, values in (one.fresh or nothing for one in layers)
        ]
        if more:
            fresh = [
                (torch.cat([old[0], new[0]], dim=-2), torch.cat([old[1], new[1]], dim=-2))
                for old, new in zip(self._fresh, fresh, strict=True)
            ]
        self._rows, self._fresh = rows, fresh
        return output

    def begin(self, lengths: Tensor) -> None:
        """Of the latest run keep each row's first ``lengths`` [R] new tokens, and nothing else."""
        assert self._fresh, "nothing was run"
        self._stored = [(self._of_all(keys), self._of_all(values)) for keys, values in self._fresh]
        self.lengths = torch.zeros_like(self.lengths).index_copy_(0, self._rows, lengths)

    def clear(self) -> None:
        """Drop all keys and values: no token of any row is known."""
        self._stored = []
        self.lengths = torch.zeros_like(self.lengths)

    def keep(self, slots: Tensor) -> None:
        """Of the latest run's new tokens keep some, in this order.

        Args:
            slots: ``[R, n]`` numbers of new tokens; -1 for none, only after the others.
        """
        assert self._fresh, "nothing was run"
        rows, kept = self._rows, slots >= 0
        if not kept.any():
            return
        self._reserve(int((self.lengths[rows] + kept.sum(1)).max()))
        for number in range(slots.shape[1]):
            some = kept[:, number].nonzero()[:, 0]
            into, at, slot = rows[some], self.lengths[rows[some]], slots[some, number]
            for (keys, values), fresh in zip(self._stored, self._fresh, strict=True):
                keys[into, :, at] = fresh[0][some, :, slot]
                values[into, :, at] = fresh[1][some, :, slot]
            self.lengths[into] += 1

    def _known(self, layer: int, rows: Tensor, P: int) -> tuple[Tensor, Tensor] | None:
        if not P:
            return None
        keys, values = (stored[:, :, :P] for stored in self._stored[layer])
        if len(rows) == len(self.lengths):  # all rows, in order: no copy is needed
            return keys, values
        return keys[rows], values[rows]

    def _of_all(self, fresh: Tensor) -> Tensor:
        """The latest run's keys or values ``[R, ...]`` as those of all rows ``[B, ...]``."""
        B = len(self.lengths)
        if len(self._rows) == B:
            return fresh
        return fresh.new_zeros(B, *fresh.shape[1:]).index_copy_(0, self._rows, fresh)

    def _reserve(self, length: int) -> None:
        """Room for ``length`` tokens, doubled when it is too small."""
        have = self._stored[0][0].shape[2] if self._stored else 0
        if have >= length:
            return
        room = max(length, 2 * have, 16)

        def grown(layer: int, which: int) -> Tensor:
            like = self._fresh[layer][which]
            new = like.new_zeros(len(self.lengths), like.shape[1], room, like.shape[3])
            if have:
                new[:, :, :have] = self._stored[layer][which]
            return new

        self._stored = [(grown(n, 0), grown(n, 1)) for n in range(self._layers)]


def recording_cache(layers: int) -> Cache:
    """A cache that keeps the keys and values of one forward, as `fresh` of each of its layers."""
    return Cache(layers=[_Layer(None) for _ in range(layers)])


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A model's attention mask ``[B, 1, N, P + N]``: 0 where ``allowed`` [B, N, P + N] is True."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


def one_after_another(length: int, device: torch.device) -> Tensor:
    """``[N, N]`` bool: each of N new tokens sees itself and those before it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


_WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "attention_window_size",
    "attention_chunk_size",
    "local_attention",
    "keep_window_size",
)
_KEYS = ("window_size", "max_position_embeddings", "index_topk", "indexer_budget")


def most_keys(config: PretrainedConfig) -> float:
    """Keys of one forward, known and new: local attention (GPT-Neo), masks of a fixed size and
    attention to the best keys count the tokens as they lie, side by side or not."""
    return _least(config, _KEYS)


def serves(config: PretrainedConfig, length: int, keys: int) -> bool:
    """Whether a `RaggedCache` stays clear of the model's limits.

    Args:
        config: the model's.
        length: of the longest sequence in a forward, its known tokens counted.
        keys: of the forward, known and new.
    """
    # A window is not in our mask: the sequence must not have outgrown it.
    return length <= _least(config, _WINDOWS) and keys <= most_keys(config)


def _least(config: PretrainedConfig, names: tuple[str, ...]) -> float:
    """The least of the limits that a configuration sets; -1 and 0 are none."""
    limits = [limit for name in names for limit in settings_of(config, name)]
    return min(
        (limit for limit in limits if isinstance(limit, int) and limit > 0), default=math.inf
    )
