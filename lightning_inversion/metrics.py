"""How much was recovered: torchmetrics over decoded tokens and distances.

Token arguments are ``[B, T]`` (or ``[B, T, k]``, best first) with a boolean ``mask [B, T]``.
"""

import torch
from torch import Tensor
from torchmetrics import Metric


def token_accuracy(decoded: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Share of each row's tokens that are right, ``[B]``; ``decoded``, ``ids`` [B, T].

    Example:
        >>> ids, mask = torch.tensor([[5, 6, 0]]), torch.tensor([[True, True, False]])
        >>> token_accuracy(torch.tensor([[5, 9, 9]]), ids, mask)
        tensor([0.5000])
    """
    return ((decoded == ids) & mask).sum(1) / mask.sum(1)


def exact_match(decoded: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Whether each row is right as a whole, ``[B]`` bool."""
    return ((decoded == ids) | ~mask).all(1)


def top_k_accuracy(ranked: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Share of each row's tokens among the k best, ``[B]``; ``ranked [B, T, k]``.

    One minus this at k = 5 is the 'Hamming' metric of the source's author (``hamming``).
    """
    return ((ranked == ids[..., None]).any(-1) & mask).sum(1) / mask.sum(1)


def hamming(ranked: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Share of each row's tokens that are *not* among the decoded k best, ``[B]``."""
    return 1 - top_k_accuracy(ranked, ids, mask)


def row_distance(generated: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """||O(a_g) - O(a)||_1 of each row, ``[B]``; features ``[B, T, F]``."""
    return ((generated - target).abs() * mask[..., None]).sum((1, 2))


def distance_ratio(generated: Tensor, shifted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """||O(a_g) - O(a)||_1 / ||O(a') - O(a)||_1 of each row, ``[B]``; features ``[B, T, F]``.

    The source's stopping criterion is this ratio below 1.
    """
    return row_distance(generated, target, mask) / row_distance(shifted, target, mask)


class _Mean(Metric):
    """Mean over all rows seen, on all processes."""

    full_state_update = False
    total: Tensor
    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rows", torch.tensor(0), dist_reduce_fx="sum")

    def _add(self, values: Tensor) -> None:
        self.total += values.double().sum()
        self.rows += values.numel()

    def compute(self) -> Tensor:
        """The mean; nan before the first row."""
        return self.total / self.rows


class TokenAccuracy(_Mean):
    """Mean over rows of the share of tokens that are right.

    >>> metric = TokenAccuracy()
    >>> metric.update(torch.tensor([[1, 2]]), torch.tensor([[1, 3]]), torch.ones(1, 2).bool())
    >>> float(metric.compute())
    0.5
    """

    def update(self, decoded: Tensor, ids: Tensor, mask: Tensor) -> None:
        """Add rows: ``decoded``, ``ids``, ``mask`` [B, T]."""
        self._add(token_accuracy(decoded, ids, mask))


class ExactMatch(_Mean):
    """Share of rows that are right as a whole.

    >>> metric = ExactMatch()
    >>> metric.update(torch.tensor([[1, 2]]), torch.tensor([[1, 2]]), torch.ones(1, 2).bool())
    >>> float(metric.compute())
    1.0
    """

    def update(self, decoded: Tensor, ids: Tensor, mask: Tensor) -> None:
        """Add rows: ``decoded``, ``ids``, ``mask`` [B, T]."""
        self._add(exact_match(decoded, ids, mask))


class TopKAccuracy(_Mean):
    """Mean over rows of the share of tokens among the k best.

    >>> metric = TopKAccuracy()
    >>> metric.update(torch.tensor([[[4, 1]]]), torch.tensor([[1]]), torch.ones(1, 1).bool())
    >>> float(metric.compute())
    1.0
    """

    def update(self, ranked: Tensor, ids: Tensor, mask: Tensor) -> None:
        """Add rows: ``ranked [B, T, k]``, ``ids``, ``mask`` [B, T]."""
        self._add(top_k_accuracy(ranked, ids, mask))


class Hamming(_Mean):
    """Mean over rows of the share of tokens not among the k best."""

    def update(self, ranked: Tensor, ids: Tensor, mask: Tensor) -> None:
        """Add rows: ``ranked [B, T, k]``, ``ids``, ``mask`` [B, T]."""
        self._add(hamming(ranked, ids, mask))
