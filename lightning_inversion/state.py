"""Where each row of a batch stands."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Progress(nn.Module):
    """Where each row of the batch stands; travels with the checkpoint.

    Attributes:
        met_at: ``[B]`` iteration at which the stopping criterion was first met, -1 before.
        stopped_at: ``[B]`` iteration at which the row stopped moving, -1 while it moves.
        ratio: ``[B]`` the latest distance ratio of the stopping criterion, nan before the first.
        verified: ``[B, T]`` True where the token was verified and fixed.
        focus: ``[B, T]`` True where the objective looks; callbacks narrow it.
    """

    met_at: Tensor
    stopped_at: Tensor
    ratio: Tensor
    verified: Tensor
    focus: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.allocate((0, 0), torch.device("cpu"))

    def allocate(self, shape: Sequence[int], device: torch.device) -> None:
        """Start afresh for a batch of ``shape`` [B, T]."""
        rows, length = shape
        self.register_buffer("met_at", torch.full((rows,), -1, device=device))
        self.register_buffer("stopped_at", torch.full((rows,), -1, device=device))
        self.register_buffer("ratio", torch.full((rows,), float("nan"), device=device))
        verified = torch.zeros(rows, length, dtype=torch.bool, device=device)
        self.register_buffer("verified", verified)
        self.register_buffer("focus", torch.ones_like(verified))

    @property
    def stopped(self) -> Tensor:
        """``[B]`` bool, True for rows that no longer move."""
        return self.stopped_at >= 0
