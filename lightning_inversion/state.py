"""``BatchState``: the one record of a batch while it is optimised, and what a checkpoint holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_inversion.data.batch import PromptBatch
from lightning_inversion.proposers.proposals import Proposals
from lightning_inversion.recovery.search import PrefixSearch
from lightning_inversion.transformer.prefix import FixedPrefix

_STORED = ("values", "fixed", "verified", "focus", "stopped_at", "criterion_met_at", "ratio")


class BatchState(nn.Module):
    """The values, fixed positions and stopped rows of a batch while it is optimised.

    A position moves as long as it is not fixed and its row has not stopped.

    Args:
        batch: the prompts.
        values: ``[B, T, C]`` where the learnable input begins.
        target: ``[B, T, F]`` the features to match; None until they are computed.

    Attributes:
        values: the learnable input, the only parameter that is optimised.
        fixed: ``[B, T]`` bool, positions whose value is final: given, verified or decoded.
        verified: ``[B, T]`` bool, positions fixed to a token that reproduces the target.
        focus: ``[B, T]`` bool, the positions that the objective compares.
        stopped_at: ``[B]`` iteration at which the row stopped, -1 while it moves.
        criterion_met_at: ``[B]`` iteration at which the stopping criterion was first met, or -1.
        ratio: ``[B]`` latest distance ratio of the stopping criterion, nan before the first.
        iteration: the number of the iteration that runs or follows, from 0.
        prefix: keeps the keys and values of fixed positions; None without a causal mask.
        search: the schedule's search for the next tokens, with its ``proposals``; None without one.
        stored_search: what the search of a checkpoint has tried.
    """

    values: nn.Parameter
    target: Tensor | None
    fixed: Tensor
    verified: Tensor
    focus: Tensor
    stopped_at: Tensor
    criterion_met_at: Tensor
    ratio: Tensor

    def __init__(self, batch: PromptBatch, values: Tensor, target: Tensor | None = None) -> None:
        super().__init__()
        (B, T), device = batch.mask.shape, values.device
        self.batch = batch
        self.values = nn.Parameter(values.detach().clone())
        self.register_buffer("target", target)
        self.register_buffer("fixed", torch.zeros(B, T, dtype=torch.bool, device=device))
        self.register_buffer("verified", torch.zeros(B, T, dtype=torch.bool, device=device))
        self.register_buffer("focus", torch.ones(B, T, dtype=torch.bool, device=device))
        self.register_buffer("stopped_at", torch.full((B,), -1, device=device))
        self.register_buffer("criterion_met_at", torch.full((B,), -1, device=device))
        self.register_buffer("ratio", torch.full((B,), torch.nan, device=device))
        self.iteration = 0
        self.prefix: FixedPrefix | None = None
        self.search: PrefixSearch | None = None
        self.proposals: Proposals | None = None
        self.stored_search: dict[str, Tensor] = {}

    @classmethod
    def empty(cls) -> BatchState:
        """A state of no prompt, where there is no batch."""
        none = torch.zeros(0, 0, dtype=torch.bool)
        return cls(PromptBatch((), (), None, none), torch.zeros(0, 0, 0))

    @property
    def is_empty(self) -> bool:
        """Whether there is no prompt."""
        return not self.batch.index

    @property
    def stopped(self) -> Tensor:
        """``[B]`` bool, True for rows that no longer move."""
        return self.stopped_at >= 0

    @property
    def compared(self) -> Tensor:
        """``[B, T]`` bool, the positions that the next iteration compares with the target."""
        return self.batch.mask & self.focus & ~self.stopped[:, None]

    @property
    def lengths(self) -> Tensor:
        """``[B]`` tokens of each prompt."""
        return self.batch.mask.sum(1)

    @property
    def prefix_lengths(self) -> Tensor:
        """``[B]`` how many positions each row begins with that are fixed."""
        return self.fixed.cummin(dim=1).values.sum(dim=1)

    @torch.no_grad()
    def fix(
        self, rows: Tensor, positions: Tensor, values: Tensor, verified: Tensor | None = None
    ) -> None:
        """Give positions ``[R]`` of ``rows`` [R] their final values ``[R, C]``.

        ``verified`` [R] bool names those that are verified; None for none.
        """
        self.values[rows, positions] = values
        self.fixed[rows, positions] = True
        if verified is not None:
            self.verified[rows, positions] = verified

    def stop(self, rows: Tensor) -> None:
        """Rows ``[B]`` bool stop moving from this iteration on."""
        self.stopped_at[rows & ~self.stopped] = self.iteration

    def record_ratio(self, ratio: Tensor, met: Tensor) -> None:
        """Keep distance ratios ``[B]``, and where the criterion is met for the first time."""
        self.ratio = ratio
        first = met & (self.criterion_met_at < 0)
        # A row that has stopped was as it is now when it did.
        at = self.stopped_at.where(self.stopped, self.iteration)
        self.criterion_met_at[first] = at[first]

    @torch.no_grad()
    def hold(self, before: Tensor) -> None:
        """Put what does not move back to ``before`` [B, T, C]: momentum must not move it."""
        held = self.fixed | self.stopped[:, None]
        self.values.copy_(torch.where(held[..., None], before, self.values))

    # -- checkpoints -------------------------------------------------------------------------

    def to_checkpoint(self) -> dict[str, Any]:
        """Plain values and tensors on the CPU; the target is computed again."""
        search = self.stored_search if self.search is None else self.search.to_checkpoint()
        return {
            "batch": self.batch.to_checkpoint(),
            "search": {name: tensor.cpu() for name, tensor in search.items()},
            **{name: getattr(self, name).detach().cpu() for name in _STORED},
        }

    @classmethod
    def from_checkpoint(cls, stored: dict[str, Any], device: torch.device) -> BatchState:
        """The state of a checkpoint, without its target.

        Raises:
            LookupError, TypeError, ValueError: what is stored is no state.
        """
        batch, values = PromptBatch.from_checkpoint(stored["batch"]).to(device), stored["values"]
        if not values.is_floating_point() or values.shape[:2] != batch.mask.shape:
            raise ValueError("the input of a checkpoint does not fit its batch")
        state = cls(batch, values.to(device))
        for name in _STORED[1:]:
            before, after = getattr(state, name), stored[name]
            if before.shape != after.shape or before.dtype != after.dtype:
                raise ValueError(f"{name} of a checkpoint does not fit its batch")
            setattr(state, name, after.to(device))
        state.stored_search = dict(stored["search"])
        if not all(isinstance(tensor, Tensor) for tensor in state.stored_search.values()):
            raise TypeError("the search of a checkpoint is no search")
        return state
