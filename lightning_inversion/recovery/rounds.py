"""One round of recovery: each row's best candidates, proposed by an order, run side by side."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_inversion.recovery.proposals import Candidates, Proposer
from lightning_inversion.recovery.search import PrefixSearch, Trial

_AT_A_TIME = 4096
"""Candidates of one forward, over all rows: bounds the memory."""


def round_of(
    search: PrefixSearch,
    order: Proposer,
    rows: Tensor,
    sizes: Tensor,
    left: Tensor,
    beside: int = 1,
) -> Iterator[tuple[Trial, tuple[str, ...]]]:
    """Try each row's best untried tokens; rows that are alike are run together.

    Where an order's first guesses have been right for several places in a row, the next places are
    run with them in one forward.

    Args:
        search: where the rows stand; those that are verified go on.
        order: which tokens to try.
        rows: ``[R]``.
        sizes: ``[R]`` how many for each.
        left: ``[R]`` places that each has still to find.
        beside: candidates of each place at least, where several places are run.

    Yields:
        What was found, and the name of the order that each column of candidates comes from.
    """
    widths = _widths(search, rows, left)
    # An order may speak in another voice once a first round has shown something.
    kinds = torch.stack([(search.rounds[rows] > 0).long(), sizes, widths], dim=1)
    for kind in torch.unique(kinds, dim=0):
        alike = (kinds == kind).all(dim=1).nonzero()[:, 0]
        size, widest = int(kind[1]), int(torch.minimum(kind[2], left[alike].max()))
        for some in torch.split(alike, search.transformer.embedding.at_a_time):
            members = rows[some]
            proposed = _proposed(search, order, members, size, widest, beside)
            ids = proposed.ids.view(len(members), -1, len(proposed.orders))
            at_a_time = max(1, _AT_A_TIME // ids[0].numel())
            for part in torch.split(torch.arange(len(members), device=rows.device), at_a_time):
                for trial in search.run_ahead(members[part], ids[part], left[some[part]]):
                    yield trial, proposed.orders


def _proposed(
    search: PrefixSearch, order: Proposer, rows: Tensor, size: int, width: int, beside: int
) -> Candidates:
    """For the next ``width`` places or as many as can be run together, else the next alone."""
    while width > 1:
        count = max(beside, size // width)
        if search.prefix.reaches(rows, width, count):
            ahead = order.ahead(search, rows, width, count)
            return order.propose(search, rows, size) if ahead is None else ahead
        width //= 2
    return order.propose(search, rows, size)


def _widths(search: PrefixSearch, rows: Tensor, left: Tensor) -> Tensor:
    """``[R]`` places to run together: up to a power of two, so that many rows are alike."""
    fresh = search.count[rows] == 0
    reach = torch.minimum(search.reach[rows], left).clamp(min=1)
    powers = 2 ** reach.double().log2().ceil().long()
    return torch.where(fresh, powers, 1)
