"""``Mixture``: several proposers together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_inversion.errors import InputError
from lightning_inversion.proposers.open_positions import OpenPositions
from lightning_inversion.proposers.proposals import (
    Candidates,
    Proposals,
    Proposer,
    best_untried,
)


class Mixture(Proposer):
    """Several proposers together: the sum of their log-likelihoods, and each one's own best.

    Proposers fail on different tokens. Their sum (a product of experts, Hinton 2002) ranks highest
    what all find likely. From the second round at a position on, a share of the candidates is each
    proposer's own best, so that none can hide what another finds. A proposer that waits, as it
    needs evidence, is not in the sum.

    Args:
        proposers: the parts.
        share_alone: the share of a later round's candidates, between 0 and 1, that the parts name
            alone.
    """

    def __init__(self, proposers: list[Proposer], share_alone: float = 0.5) -> None:
        if not proposers or not 0 <= share_alone <= 1:
            raise InputError(
                "--model.recovery: a mixture needs one proposer or more, and share_alone between "
                f"0 and 1; it has {len(proposers)} and {share_alone}."
            )
        self.proposers, self.share_alone = proposers, share_alone
        self.needs_language_model = any(part.needs_language_model for part in proposers)

    @property
    def name(self) -> str:
        """The names of the parts."""
        return "+".join(part.name for part in self.proposers)

    def begin(self, search: OpenPositions) -> Proposals:
        parts = [part.begin(search) for part in self.proposers]
        waits = [part.waits for part in self.proposers]
        return MixedProposals(search, parts, waits, self.share_alone)


class MixedProposals(Proposals):
    """The proposals of several proposers together for one batch; see ``Mixture``.

    Args:
        search: of the batch.
        parts: the proposals that are mixed.
        waits: the rounds at a position that must have failed before each has a part.
        share_alone: the share of a later round's candidates that the parts name alone.
    """

    def __init__(
        self,
        search: OpenPositions,
        parts: Sequence[Proposals],
        waits: Sequence[int],
        share_alone: float,
    ) -> None:
        super().__init__(search, "+".join(part.name for part in parts))
        self.parts, self.waits, self.share_alone = list(parts), list(waits), share_alone
        self.stages = max(1, *waits)

    def update(self, rows: Tensor) -> None:
        for part in self._ready(rows):
            part.update(rows)

    def accept(self, rows: Tensor, ids: Tensor) -> None:
        for part in self.parts:
            part.accept(rows, ids)

    def take_back(self, rows: Tensor) -> None:
        for part in self.parts:
            part.take_back(rows)

    def ahead(self, rows: Tensor, width: int, count: int) -> Candidates | None:
        """The candidates of the first part that has some for several positions."""
        found = (part.ahead(rows, width, count) for part in self.parts)
        return next((candidates for candidates in found if candidates is not None), None)

    def scores(self, rows: Tensor) -> Tensor:
        return torch.stack([part.scores(rows) for part in self._summed(rows)]).sum(0)

    def propose(self, rows: Tensor, count: int) -> Candidates:
        """The best tokens by the sum, then each part's own best."""
        summed = self._summed(rows)
        ready = [*summed, *(part for part in self._ready(rows) if part not in summed)]
        scores = [part.scores(rows) for part in ready]
        tried = self.search.tried[rows]
        alone = self.share_alone if self._failed(rows) else 0.0
        each = int(alone * count / len(ready))
        total = torch.stack(scores[: len(summed)]).sum(0)
        chosen = [best_untried(total, tried, count - each * len(ready))]
        names = ["+".join(part.name for part in summed)] * chosen[0].shape[1]
        for part, own in zip(ready, scores, strict=True):
            if each:
                tried = tried.scatter(1, chosen[-1], True)
                chosen.append(best_untried(own, tried, each))
                names += [part.name] * chosen[-1].shape[1]
        return Candidates(torch.cat(chosen, dim=1), tuple(names))

    def _failed(self, rows: Tensor) -> int:
        """The rounds that have failed at the position of each of ``rows``, at least."""
        return int(self.search.rounds[rows].min())

    def _summed(self, rows: Tensor) -> list[Proposals]:
        """The parts whose log-likelihoods are summed: those that rank tokens from the beginning."""
        return self._that_have_waited(rows, min(self.waits))

    def _ready(self, rows: Tensor) -> list[Proposals]:
        return self._that_have_waited(rows, self._failed(rows))

    def _that_have_waited(self, rows: Tensor, rounds: int) -> list[Proposals]:
        """The parts that wait for so many rounds at most; slow ones wait for one where others can
        name the first candidates."""
        parts = [
            part for part, waits in zip(self.parts, self.waits, strict=True) if waits <= rounds
        ]
        quick = [part for part in parts if not part.slow]
        return parts if self._failed(rows) or not quick else quick
