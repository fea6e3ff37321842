"""One round of recovery: each row's best candidates, proposed by an order, run side by side."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_inversion.recovery.frontier import Frontier, Trial
from lightning_inversion.recovery.orders import CandidateOrder

_AT_A_TIME = 4096
"""Candidates of one forward, over all rows: bounds the memory."""


def round_of(
    frontier: Frontier, order: CandidateOrder, rows: Tensor, sizes: Tensor
) -> Iterator[tuple[Trial, tuple[str, ...]]]:
    """Try each row's best untried tokens; rows that are alike are run together.

    Args:
        frontier: where the rows stand; those that are certified go on.
        order: which tokens to try.
        rows: ``[R]``.
        sizes: ``[R]`` how many for each.

    Yields:
        What was found, and the name of the order that each column of candidates comes from.
    """
    # An order may speak in another voice once a first round has shown something.
    kinds = torch.stack([(frontier.rounds[rows] > 0).long(), sizes], dim=1)
    for kind in torch.unique(kinds, dim=0):
        members = rows[(kinds == kind).all(dim=1)]
        proposed = order.propose(frontier, members, int(kind[1]))
        at_a_time = max(1, _AT_A_TIME // proposed.ids.shape[1])
        for part in torch.split(torch.arange(len(members)), at_a_time):
            yield frontier.try_out(members[part], proposed.ids[part]), proposed.orders
