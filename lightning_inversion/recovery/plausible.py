"""``PlausibleTokens``: where no token is verified, what follows decides among plausible ones."""

from __future__ import annotations

import torch
from torch import Tensor

_ENOUGH_TO_DOUBT = 256
"""Candidates without a plausible one among them that put the token before in doubt."""


class PlausibleTokens:
    """For each row, the plausible tokens of its latest position, where none was verified.

    After a wrong token no next one reproduces the target, as all that follows depends on it. If
    none of many candidates is plausible, another of the plausible tokens is taken. If none helps,
    the one after which a candidate came closest stays, and recovery continues.

    Args:
        rows: B.
    """

    def __init__(self, rows: int) -> None:
        self._waiting: list[list[tuple[int, float]]] = [[] for _ in range(rows)]
        self._refuted: list[dict[int, tuple[float, float]]] = [{} for _ in range(rows)]

    def settle(self, row: int, plausible: list[tuple[int, float]]) -> None:
        """A token was taken: the first of ``plausible`` (ids, residuals), or a verified one.

        What was in doubt before it no longer is.
        """
        self._waiting[row] = plausible if len(plausible) > 1 else []
        self._refuted[row] = {}

    def in_doubt(self, rows: Tensor, tried: Tensor) -> Tensor:
        """``[R]`` bool: the token before is in doubt, after ``tried`` [R] candidates after it."""
        waiting = [bool(self._waiting[row]) for row in rows.tolist()]
        return torch.tensor(waiting, device=rows.device) & (tried >= _ENOUGH_TO_DOUBT)

    def next(self, row: int, nearest: float) -> int:
        """What to try instead of the token after which nothing came nearer than ``nearest``."""
        (token, residual), *others = self._waiting[row]
        self._refuted[row][token] = (nearest, residual)
        self._waiting[row] = others
        if others:
            return others[0][0]
        return min(self._refuted[row], key=lambda other: self._refuted[row][other][0])

    def residual(self, row: int, token: int) -> float:
        """The residual of a plausible token at its own position."""
        refuted = {other: own for other, (_, own) in self._refuted[row].items()}
        return {**dict(self._waiting[row]), **refuted}[token]
