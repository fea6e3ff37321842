"""The few positions behind what is held: where the objective sees no others, they alone are run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_inversion.objectives import Objective
from lightning_inversion.transformer.prefix import KnownPrefix


@dataclass(frozen=True)
class Window:
    """Which positions of which rows an iteration has to run.

    Attributes:
        looked_at: ``[B, T]`` bool, where the objective looks.
        rows: ``[R]`` those that still move.
        lengths: ``[R]`` how many positions each begins with that are held.
        width: how many behind them are run.
    """

    looked_at: Tensor
    rows: Tensor
    lengths: Tensor
    width: int

    @classmethod
    def of(cls, looked_at: Tensor, held: Tensor) -> Window | None:
        """None where it would save nothing.

        Args:
            looked_at: ``[B, T]`` bool, where the objective looks.
            held: ``[B, T]`` bool, positions that do not move.
        """
        rows = looked_at.any(dim=1).nonzero()[:, 0]
        if not len(rows):
            return None
        positions = torch.arange(looked_at.shape[1], device=rows.device)
        lengths = held[rows].cummin(dim=1).values.sum(dim=1)
        ends = torch.where(looked_at[rows], positions + 1, 0).amax(dim=1)
        width = int((ends - lengths).max())
        return None if 2 * width > looked_at.shape[1] else cls(looked_at, rows, lengths, width)

    def distances(
        self, vectors: Tensor, prefix: KnownPrefix, objective: Objective, target: Tensor
    ) -> Tensor:
        """The distance of each row ``[B]``, 0 where it does not move; differentiable.

        Args:
            vectors: ``[B, T, D]`` the input.
            prefix: runs the window behind what is held.
            objective: of rows that are independent (``Objective.by_row``).
            target: ``[B, T, F]``.
        """
        rows, lengths, width, last = self.rows, self.lengths, self.width, target.shape[1] - 1
        prefix.begin(rows, vectors[rows], lengths)
        # Position 0 has statistics of its own in a probe: nothing else may stand in column 0.
        columns = torch.arange(width + 1, device=rows.device)
        shift = (lengths > 0).long()[:, None]
        places = (lengths[:, None] + columns - shift).clamp(max=last)
        inside = (columns >= shift) & (columns < width + shift)
        inside &= lengths[:, None] + columns - shift <= last
        run = (lengths[:, None] + columns[:width]).clamp(max=last)
        features = prefix.followed_by(rows, vectors[rows[:, None], run])
        features = features.gather(
            1, (columns - shift).clamp(0, width - 1)[..., None].expand(-1, -1, features.shape[-1])
        )
        mask = self.looked_at[rows[:, None], places] & inside
        distances = objective(features, target[rows[:, None], places], mask)
        return torch.zeros_like(target[:, 0, 0]).index_put((rows,), distances)
