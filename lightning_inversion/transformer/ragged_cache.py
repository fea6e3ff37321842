"""Keys and values of known tokens: rows of different lengths side by side, grown token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

if TYPE_CHECKING:
    from lightning_inversion.transformer.truncated import TruncatedTransformer


class _Behind(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's known keys and values; what a forward adds stands behind them, apart."""

    def __init__(self, keys: Tensor | None, values: Tensor | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fresh: tuple[Tensor, Tensor] | None = None
        if keys is not None and values is not None:
            self.dtype, self.device = keys.dtype, keys.device
            self.keys, self.values = keys, values
            self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The known ones followed by the forward's own, which are remembered as `fresh`."""
        self.fresh = (key_states.detach(), value_states.detach())
        if not self.is_initialized:
            return key_states, value_states
        assert self.keys is not None
        assert self.values is not None
        return (
            torch.cat([self.keys, key_states], dim=-2),
            torch.cat([self.values, value_states], dim=-2),
        )


class RaggedCache:
    """What an attention model keeps of each row's known tokens.

    A forward runs new tokens behind them, in any relation to each other: one after another (a
    continuation) or side by side (candidates for one place, tree attention as in SpecInfer, arXiv
    2305.09781). Afterwards `keep` says which of the new tokens are known from now on. Nothing is
    run twice, and a row's cost does not depend on the others' lengths but for padding.

    Args:
        rows: B.
        layers: how many blocks keep keys and values.
        device: where the model runs.

    Attributes:
        lengths: ``[B]`` known tokens of each row.
    """

    def __init__(self, rows: int, layers: int, device: torch.device) -> None:
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self._count = layers
        self._stored: list[tuple[Tensor, Tensor]] = []
        self._run: tuple[Tensor, list[_Behind]] | None = None

    def run(
        self,
        forward: Callable[[Tensor, Tensor, Cache], Tensor],
        rows: Tensor,
        sees: Tensor,
    ) -> Tensor:
        """Run new tokens behind the known ones of some rows.

        Args:
            forward: called with the mask ``[R, N, P + N]`` bool, the positions ``[R, N]`` and the
                cache of the P known tokens; returns what the model makes of the new ones.
            rows: ``[R]``.
            sees: ``[N, N]`` bool, which new token (row) sees which new token; its position is
                that of the tokens it sees, counted.
        """
        lengths = self.lengths[rows]
        P = int(lengths.max()) if self._stored else 0
        known = torch.arange(P, device=rows.device) < lengths[:, None]
        N = len(sees)
        mask = torch.cat([known[:, None].expand(-1, N, -1), sees.expand(len(rows), -1, -1)], dim=-1)
        positions = lengths[:, None] + sees.sum(-1) - 1
        whole = len(rows) == len(self.lengths)  # all rows, in order: no copy is needed
        layers: list[Any] = []
        for number in range(self._count):
            if not P:
                layers.append(_Behind(None, None))
                continue
            keys, values = self._stored[number]
            keys, values = keys[:, :, :P], values[:, :, :P]
            layers.append(_Behind(keys, values) if whole else _Behind(keys[rows], values[rows]))
        output = forward(mask, positions, Cache(layers=layers))
        self._run = rows, layers
        return output

    def begin(self, lengths: Tensor) -> None:
        """Of the latest run keep each row's first ``lengths`` [R] new tokens, and nothing else."""
        assert self._run is not None, "nothing was run"
        rows, layers = self._run
        B, whole = len(self.lengths), len(rows) == len(self.lengths)
        self._stored = []
        for layer in layers:
            assert layer.fresh is not None
            keys, values = layer.fresh
            if not whole:
                keys, values = (
                    one.new_zeros(B, *one.shape[1:]).index_copy_(0, rows, one)
                    for one in layer.fresh
                )
            self._stored.append((keys, values))
        self.lengths = torch.zeros_like(self.lengths).index_copy_(0, rows, lengths)

    def forget(self) -> None:
        """Nothing is known of any row."""
        self._stored = []
        self.lengths = torch.zeros_like(self.lengths)

    def keep(self, slots: Tensor) -> None:
        """Of the latest run's new tokens keep some, in this order.

        Args:
            slots: ``[R, n]`` places among the new tokens; -1 for none, only behind the others.
        """
        assert self._run is not None, "nothing was run"
        rows, layers = self._run
        kept = slots >= 0
        if not kept.any():
            return
        self._reserve(int((self.lengths[rows] + kept.sum(1)).max()), len(self.lengths), layers)
        for place in range(slots.shape[1]):
            some = kept[:, place].nonzero()[:, 0]
            into, at, slot = rows[some], self.lengths[rows[some]], slots[some, place]
            for (keys, values), layer in zip(self._stored, layers, strict=True):
                assert layer.fresh is not None
                keys[into, :, at] = layer.fresh[0][some, :, slot]
                values[into, :, at] = layer.fresh[1][some, :, slot]
            self.lengths[into] += 1

    def _reserve(self, length: int, rows: int, layers: list[_Behind]) -> None:
        """Room for ``length`` tokens, doubled when it is too small."""
        have = self._stored[0][0].shape[2] if self._stored else 0
        if have >= length:
            return
        room = max(length, 2 * have, 16)
        grown = []
        for number, layer in enumerate(layers):
            assert layer.fresh is not None
            pair = []
            for which in range(2):
                like = layer.fresh[which]
                new = like.new_zeros(rows, like.shape[1], room, like.shape[3])
                if have:
                    new[:, :, :have] = self._stored[number][which]
                pair.append(new)
            grown.append((pair[0], pair[1]))
        self._stored = grown


@torch.no_grad()
def cache_works(transformer: TruncatedTransformer) -> bool:
    """Whether candidates may be run behind keys and values: tried out against plain forwards.

    Surgery that shares blocks or takes positions away cannot have a cache of its own.
    """
    surgery = transformer.surgery
    if surgery.repeat_first or surgery.positions != "own" or not transformer.tree_attention:
        return False
    device = transformer.device
    vocabulary = transformer.embedding.vocabulary_size
    ids = torch.arange(10, device=device) * max(1, vocabulary // 10) % vocabulary
    text, others = ids[:4].expand(2, 4), ids[4:].reshape(2, 3)
    cache = RaggedCache(2, transformer.depth, device)
    rows = torch.arange(2, device=device)

    def run(embeds: Tensor, sees: Tensor) -> Tensor:
        return cache.run(
            lambda mask, positions, layers: transformer.run(embeds, mask, positions, layers),
            rows,
            sees,
        )

    causal = torch.ones(4, 4, dtype=torch.bool, device=device).tril()
    try:
        run(transformer.embedding(text), causal)
        cache.keep(torch.tensor([[0, 1, 2, 3], [0, 1, 2, -1]], device=device))
        ours = run(transformer.embedding(others), torch.eye(3, dtype=torch.bool, device=device))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError):
        return False  # a model that keeps something else than keys and values
    prefix, candidates = transformer.embedding(text), transformer.embedding(others)
    lengths = torch.tensor([4, 3], device=device)
    plain = transformer.candidates(prefix, lengths, candidates)
    alone = transformer.candidates(prefix, torch.zeros_like(lengths), candidates)
    rounding = (32 if transformer.dtype == torch.float32 else 4) * torch.finfo(
        transformer.dtype
    ).eps
    allowed = 0.01 * (plain - alone).norm() + rounding * plain.norm()
    return bool((ours - plain).norm() <= allowed)
