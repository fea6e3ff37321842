"""Rows in unknown order: which of them fits after the tokens found so far?

Attention determines the order. A first token sees no other, so that one row alone is reproduced by
a token at position 0; after it, one row alone is reproduced by a token at position 1; and so on.
The linear probe reads the tokens of each row without knowing its position (a bag of tokens), and
the readings of all rows that are left are run after the prefix. For T rows that is about T * T / 2
candidates where each first reading is right. Where none of 256 readings fits, the token of each row
is searched for as if it were the next one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from lightning_inversion.errors import InputError
from lightning_inversion.proposers.probe_proposer import ProbeRanking
from lightning_inversion.recovery.policy import Targets
from lightning_inversion.recovery.token_recovery import TokenRecovery
from lightning_inversion.transformer.embedding import best_tokens
from lightning_inversion.transformer.prefix import FixedPrefix
from lightning_inversion.verification.first_tokens import FirstTokenFeatures
from lightning_inversion.verification.measurements import Measurements

_ROUNDS = (0, 1, 4, 16, 64, 256)
"""Readings of each row that are run, the best first, until a row fits."""
_SEARCHED = 1024
"""Tokens that are run for each row that is left, where no reading fits."""
_NEAREST = 4
"""First tokens of the scan that are run for each row."""


@dataclass(frozen=True)
class RowOrder:
    """The order of the rows of one prompt.

    Attributes:
        rows: ``T`` numbers of rows; those that fit nowhere stand at the end, as they were.
        found: how many of them were found, from position 0 on.
    """

    rows: tuple[int, ...]
    found: int


@torch.no_grad()
def in_order(measurements: Measurements, targets: Targets) -> tuple[Targets, list[RowOrder]]:
    """Put the rows of each prompt in the order of its text.

    Args:
        measurements: of a causal model.
        targets: their rows are in any order; those of known tokens that are not stored are the
            first ones.

    Returns:
        The targets, and the order of each prompt.

    Raises:
        InputError: the model is not causal.
    """
    if not measurements.transformer.causal:
        raise InputError(
            "--data.order unknown needs a causal model: without a causal mask every row depends on "
            "the whole prompt, and no order can be found."
        )
    features, orders = targets.features.clone(), []
    for number, length in enumerate(targets.lengths):
        rows = targets.features[number, :length]
        order = _Ordering(measurements, rows).find(targets.known_ids)
        features[number, :length] = rows[list(order.rows)]
        orders.append(order)
    return replace(targets, features=features), orders


class _Ordering:
    """The rows ``[T, F]`` of one prompt while their order is looked for."""

    def __init__(self, measurements: Measurements, rows: Tensor) -> None:
        self.measurements, self.rows = measurements, rows
        self.embedding = measurements.transformer.embedding
        self.prefix = FixedPrefix(measurements.transformer, 1)
        self.row = torch.zeros(1, dtype=torch.long, device=rows.device)
        stored = rows.isfinite().all(-1)
        self.found = torch.empty(0, dtype=torch.long, device=rows.device)
        self.order: list[int] = (~stored).nonzero()[:, 0].tolist()
        self.left = stored.nonzero()[:, 0]

    def find(self, known: Tensor) -> RowOrder:
        """Take the row that fits best, position by position, until none fits."""
        if self.order:  # rows of known tokens that are not stored
            self.found = known[: len(self.order)]
            vectors = self.embedding(self.found[None])
            self.prefix.begin(self.row, vectors, self.row + len(self.order))
        while len(self.left):
            for ids in self._candidates(known):
                fits = self._fitting(ids)
                if fits is not None:
                    break
            else:
                break
            self.order.append(fits)
            self.left = self.left[self.left != fits]
        left = self.left.tolist()
        if not self.order and left:  # the nearest to a first token stands first, for the diagnosis
            nearest = self.left[self._scan().amin(1).argmin()]
            left.sort(key=lambda row: row != int(nearest))
        return RowOrder((*self.order, *left), len(self.order))

    def _candidates(self, known: Tensor) -> Iterator[Tensor]:
        """Tokens ``[K]`` to run at the next position, the likeliest first."""
        position = len(self.order)
        if position < len(known):
            yield known[position, None]
            return
        readings = self._later if position else self._readings(kind=0)
        for begin, end in pairwise(_ROUNDS):
            yield _distinct(readings[self.left, begin:end])
        if position and self.measurements.language_model is not None:
            yield _distinct(self._searched())
        if not position:
            yield _distinct(self._scan().topk(_NEAREST, largest=False).indices)

    def _fitting(self, ids: Tensor) -> int | None:
        """The row that one of the tokens ``[K]`` reproduces at the next position; keeps both."""
        position = torch.tensor(len(self.order), device=ids.device)
        features = self.prefix.candidates(self.row, self.embedding(ids)[None])[0]
        calibration, at = self.measurements.calibration, position.expand(len(ids))
        rows = self.rows[self.left]
        residuals = torch.stack([calibration.residual(features, row, at) for row in rows])
        residuals = residuals.nan_to_num(nan=torch.inf)
        row, token = divmod(int(residuals.argmin()), len(ids))
        if not bool(calibration.passes(residuals[row, token], position)):
            return None
        self.prefix.keep(self.row, self.row + token)
        self.found = torch.cat([self.found, ids[token, None]])
        return int(self.left[row])

    # -- the bag of tokens -------------------------------------------------------------------

    @cached_property
    def _later(self) -> Tensor:
        return self._readings(kind=1)

    def _readings(self, kind: int) -> Tensor:
        """``[T, K]`` the likeliest tokens of each row as the first one (kind 0), or a later one."""
        ranking, probe = self.measurements.derived(ProbeRanking), self.measurements.probe
        count, found = min(_ROUNDS[-1], self.embedding.vocabulary_size), []
        for rows in torch.split(self.rows.nan_to_num(), self.embedding.at_a_time):
            at = torch.full((len(rows),), kind, device=rows.device)
            found.append(best_tokens(ranking.likelihood(probe(rows, at), at), count).indices)
        return torch.cat(found)

    def _searched(self) -> Tensor:
        """``[N]`` the token that the search finds for each row that is left, as the next one."""
        rows, length = self.rows[self.left], len(self.order) + 1
        features = rows.new_full((len(rows), length, rows.shape[1]), torch.nan)
        features[:, -1] = rows
        targets = Targets(features, [length] * len(rows), tuple(self.found.tolist()))
        *_, found = TokenRecovery(budget=_SEARCHED).recover(self.measurements, targets)
        return torch.tensor([one.tokens[-1].id for one in found], device=rows.device)

    def _scan(self) -> Tensor:
        """``[N, V]`` distances of each row that is left to the features of first tokens."""
        scan, rows = self.measurements.derived(FirstTokenFeatures), self.rows[self.left]
        at = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
        return scan.distances(self.measurements.probe.standardize(rows, at))


def _distinct(ids: Tensor) -> Tensor:
    found: Tensor = ids.flatten().unique()  # type: ignore[no-untyped-call]
    return found
