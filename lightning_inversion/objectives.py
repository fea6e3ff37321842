"""Distances between features: one number for each row, rows independent.

Every objective maps ``generated [B, T, F]``, ``target [B, T, F]`` and ``mask [B, T]`` (True where a
position counts) to ``[B]``. The loss of a run is the sum over rows, so that a row's trajectory does
not depend on what shares its batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from lightning_inversion.errors import InputError
from lightning_inversion.transformer.linear_probe import LinearProbe
from lightning_inversion.transformer.prefix import FixedPrefix
from lightning_inversion.transformer.selection import check_slice, slice_of

_SMALLEST_NORM = 1e-8


class Objective(nn.Module, ABC):
    """Distance of features: ``([B, T, F], [B, T, F], [B, T]) -> [B]``.

    Rows must stay independent, and positions outside the mask must not count. Any subclass can be
    selected by its ``class_path``; the arguments of its constructor become options.

    Attributes:
        by_row: a row's distance follows from the row alone, wherever it stands in the batch, and
            only from the positions in its mask.

    Example:
        >>> class Huber(Objective):
        ...     def forward(self, generated, target, mask):
        ...         loss = torch.nn.functional.huber_loss(generated, target, reduction="none")
        ...         return (loss * mask[..., None]).sum((1, 2))
        >>> Huber()(torch.tensor([[[0.5, 3.0]]]), torch.zeros(1, 1, 2), torch.tensor([[True]]))
        tensor([2.6250])
    """

    by_row = True

    def calibrate(self, probe: Callable[[], LinearProbe]) -> None:
        """Take what is needed from the frozen model's probe; most objectives need nothing."""

    @abstractmethod
    def forward(self, generated: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """The distance of each row."""


class _Norm(Objective):
    """What L1 and L2 share: a norm of the whole row, or of each position beside its target's."""

    order: float

    def __init__(self, relative: bool = False, squared: bool = False) -> None:
        super().__init__()
        if squared and not relative:
            raise InputError("objective.squared squares relative distances; set relative true too.")
        self.relative, self.squared = relative, squared

    def forward(self, generated: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        difference = (generated - target) * mask[..., None]
        distance: Tensor
        if not self.relative:
            distance = torch.linalg.vector_norm(difference, ord=self.order, dim=(1, 2))
            return distance
        size = torch.linalg.vector_norm(target, ord=self.order, dim=2).clamp_min(_SMALLEST_NORM)
        distance = torch.linalg.vector_norm(difference, ord=self.order, dim=2)
        quotient: Tensor = distance / size
        return (quotient.square() if self.squared else quotient).sum(dim=1)


class L1(_Norm):
    """||O(a_g) - O(a)||_1, the source's metric.

    Args:
        relative: False sums over the whole row (the source); True divides the distance at each
            position by the norm of the target there and sums the quotients, so that a position
            with massive activations weighs no more than another.
        squared: with ``relative``, square each position's quotient: its gradient fades as the
            distance does.

    Example:
        >>> generated, target = torch.zeros(1, 2, 2), torch.tensor([[[3.0, 4.0], [9.0, 9.0]]])
        >>> L1()(generated, target, torch.tensor([[True, False]]))
        tensor([7.])
    """

    order = 1.0


class L2(_Norm):
    """||O(a_g) - O(a)||_2, not squared.

    Args:
        relative: False sums over the whole row (the source); True divides the distance at each
            position by the norm of the target there and sums the quotients, so that a position
            with massive activations weighs no more than another.
        squared: with ``relative``, square each position's quotient: its gradient fades as the
            distance does.
    """

    order = 2.0


class CosineDistance(Objective):
    """1 - cos of the angle between features (section 'Indirect input representation via cosine').

    Args:
        each_position: False flattens a row to one vector (the source); True sums the distance of
            each position.
        absolute: take abs(cos), as the author's code does; opposite directions then count as equal.

    Example:
        >>> right, up = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]])
        >>> CosineDistance()(right, up, torch.tensor([[True]]))
        tensor([1.])
    """

    def __init__(self, each_position: bool = False, absolute: bool = False) -> None:
        super().__init__()
        self.each_position, self.absolute = each_position, absolute

    def forward(self, generated: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        keep = mask[..., None]
        if not self.each_position:
            generated, target = (generated * keep).flatten(1), (target * keep).flatten(1)
        cosine = cosine_similarity(generated, target, dim=-1, eps=_SMALLEST_NORM)
        distance = 1 - (cosine.abs() if self.absolute else cosine)
        return (distance * mask).sum(dim=1) if self.each_position else distance


class Standardized(Objective):
    """Another objective on features in units of their std over random tokens.

    Trained models have massive activations: a few features hundreds of times larger than the rest,
    which decide a plain distance. In units of its own std, every feature counts.

    Args:
        objective: the distance of the standardised features; default relative L2 plus cosine.
    """

    def __init__(self, objective: Objective | None = None) -> None:
        super().__init__()
        self.objective = objective or WeightedSum(
            first=CosineDistance(each_position=True), second=L2(relative=True, squared=True)
        )
        self.probe: LinearProbe | None = None
        self.by_row = self.objective.by_row

    def calibrate(self, probe: Callable[[], LinearProbe]) -> None:
        """Take the std of each feature from the model's probe."""
        self.probe = probe()

    def forward(self, generated: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        assert self.probe is not None, "calibrate has not run"
        positions = torch.arange(target.shape[1], device=target.device)
        distance: Tensor = self.objective(
            self.probe.standardize(generated, positions),
            self.probe.standardize(target, positions),
            mask,
        )
        return distance


class WeightedSum(Objective):
    """alpha * first + beta * second (the source's linear combination of cosine and L1).

    Args:
        alpha: weight of the first objective.
        beta: weight of the second objective.
        first: the source's is the cosine distance.
        second: the source's is the L1 distance.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        first: Objective | None = None,
        second: Objective | None = None,
    ) -> None:
        super().__init__()
        if min(alpha, beta) < 0 or max(alpha, beta) == 0:
            raise InputError(
                f"objective.alpha and objective.beta must not be negative nor both 0, and are "
                f"{alpha} and {beta}."
            )
        self.alpha, self.beta = alpha, beta
        self.first, self.second = first or CosineDistance(), second or L1()
        self.by_row = self.first.by_row and self.second.by_row

    def calibrate(self, probe: Callable[[], LinearProbe]) -> None:
        """Calibrate both objectives."""
        self.first.calibrate(probe)
        self.second.calibrate(probe)

    def forward(self, generated: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        first: Tensor = self.first(generated, target, mask)
        second: Tensor = self.second(generated, target, mask)
        return self.alpha * first + self.beta * second


class Narrowed(Objective):
    """Another objective on a range of the features, each row its own.

    Section 'Noise on a Discreet Channel': widths of one prompt run as rows of one batch.

    Rows take the ranges in turn; with ``data.repeat`` as large as their number, every prompt is
    run at every range. Features outside are 0 on both sides, which no distance here counts.

    Args:
        ranges: slices of the features, as ['0:64', '0:128'].
        objective: the distance of what is left; default ``L1``.
    """

    def __init__(self, ranges: list[str], objective: Objective | None = None) -> None:
        super().__init__()
        if not ranges:
            raise InputError("objective.ranges must name at least one slice, as ['0:64'].")
        for one in ranges:
            check_slice(one, "objective.ranges")
        self.ranges, self.objective = list(ranges), objective or L1()
        self.by_row = False  # its range follows from its number in the batch
        if isinstance(self.objective, Standardized):
            raise InputError(
                "Narrowed.objective Standardized would move the zeros outside a range; put "
                "Narrowed into Standardized.objective instead."
            )

    def calibrate(self, probe: Callable[[], LinearProbe]) -> None:
        """Calibrate the inner objective."""
        self.objective.calibrate(probe)

    def forward(self, generated: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """The distance of each row within its range."""
        rows, _, features = target.shape
        if rows % len(self.ranges):
            raise InputError(
                f"objective.ranges holds {len(self.ranges)} slices and the batch {rows} rows; set "
                f"--data.repeat {len(self.ranges)}, and --data.batch_size to a multiple of it."
            )
        inside = torch.zeros(len(self.ranges), 1, features, dtype=torch.bool, device=target.device)
        for row, one in enumerate(self.ranges):
            inside[row, :, slice_of(one)] = True
        outside = ~inside.repeat(rows // len(self.ranges), 1, 1)
        distance: Tensor = self.objective(
            generated.masked_fill(outside, 0.0), target.masked_fill(outside, 0.0), mask
        )
        return distance


@dataclass(frozen=True)
class Window:
    """Which positions of which rows an iteration has to run.

    Attributes:
        compared: ``[B, T]`` bool, the positions that the objective compares.
        rows: ``[R]`` those that still move.
        lengths: ``[R]`` how many positions each begins with that are fixed.
        width: how many after them are run.
    """

    compared: Tensor
    rows: Tensor
    lengths: Tensor
    width: int

    @classmethod
    def of(cls, compared: Tensor, prefix_lengths: Tensor) -> Window | None:
        """None where it would save nothing.

        Args:
            compared: ``[B, T]`` bool, the positions that the objective compares.
            prefix_lengths: ``[B]`` how many positions each row begins with that are fixed.
        """
        rows = compared.any(dim=1).nonzero()[:, 0]
        if not len(rows):
            return None
        positions = torch.arange(compared.shape[1], device=rows.device)
        lengths = prefix_lengths[rows]
        ends = torch.where(compared[rows], positions + 1, 0).amax(dim=1)
        width = int((ends - lengths).max())
        return None if 2 * width > compared.shape[1] else cls(compared, rows, lengths, width)

    def distances(
        self, vectors: Tensor, prefix: FixedPrefix, objective: Objective, target: Tensor
    ) -> Tensor:
        """The distance of each row ``[B]``, 0 where it does not move; differentiable.

        Args:
            vectors: ``[B, T, D]`` the input.
            prefix: runs the window after what is fixed.
            objective: of rows that are independent (``Objective.by_row``).
            target: ``[B, T, F]``.
        """
        rows, lengths, width, last = self.rows, self.lengths, self.width, target.shape[1] - 1
        prefix.begin(rows, vectors[rows], lengths)
        # Position 0 has statistics of its own in a probe: nothing else may stand in column 0.
        columns = torch.arange(width + 1, device=rows.device)
        shift = (lengths > 0).long()[:, None]
        positions = (lengths[:, None] + columns - shift).clamp(max=last)
        inside = (columns >= shift) & (columns < width + shift)
        inside &= lengths[:, None] + columns - shift <= last
        run = (lengths[:, None] + columns[:width]).clamp(max=last)
        features = prefix.followed_by(rows, vectors[rows[:, None], run])
        features = features.gather(
            1, (columns - shift).clamp(0, width - 1)[..., None].expand(-1, -1, features.shape[-1])
        )
        mask = self.compared[rows[:, None], positions] & inside
        distances = objective(features, target[rows[:, None], positions], mask)
        return torch.zeros_like(target[:, 0, 0]).index_put((rows,), distances)
