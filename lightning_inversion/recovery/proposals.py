"""Which token to try next: candidate orders, and what they know."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_inversion.errors import InputError
from lightning_inversion.recovery.search import PrefixSearch
from lightning_inversion.transformer.embedding import best_tokens


@dataclass(frozen=True)
class Candidates:
    """Tokens to try.

    Attributes:
        ids: ``[R, K]``, the most likely first; ``[R, W, K]`` for W places.
        orders: the name of the order that each column comes from.
    """

    ids: Tensor
    orders: tuple[str, ...]


class Proposer(ABC):
    """Ranks the whole vocabulary for the next token of each text.

    A subclass gives `scores`, and what it needs: state of its own begins with `begin`, hears of
    each token that is settled by `advance`, and of one that was wrong by `take_back`. Your own
    class, given by its ``class_path``, is as good as ours.
    """

    needs_language_model: bool = False

    @property
    def name(self) -> str:
        """How certificates call it."""
        return type(self).__name__

    def begin(self, search: PrefixSearch) -> None:  # noqa: B027 - most have no state
        """A batch of texts begins."""

    def advance(self, rows: Tensor, ids: Tensor) -> None:  # noqa: B027
        """Each of ``rows`` [R] goes on with its token of ``ids`` [R]."""

    def take_back(self, rows: Tensor) -> None:  # noqa: B027
        """The last token of each of ``rows`` [R] was wrong after all; another one will follow."""

    def speaks(self, later: bool) -> bool:
        """Whether a mixture should listen, in the first round at a place or in the later ones."""
        return True

    def ahead(
        self, search: PrefixSearch, rows: Tensor, width: int, count: int
    ) -> Candidates | None:
        """The ``count`` best tokens of each of the next ``width`` places.

        None, as here, where the tokens in between must be known to say anything. A place may lie
        behind a text's end: what is said of it is ignored.
        """
        return None

    @abstractmethod
    def scores(self, search: PrefixSearch, rows: Tensor) -> Tensor:
        """``[R, V]`` log-likelihood of each token, up to a constant a row."""

    def propose(self, search: PrefixSearch, rows: Tensor, count: int) -> Candidates:
        """The ``count`` best tokens that were not tried yet."""
        ids = best_untried(self.scores(search, rows), search.tried[rows], count)
        return Candidates(ids, (self.name,) * ids.shape[1])


def best_untried(scores: Tensor, tried: Tensor, count: int) -> Tensor:
    """``[R, count]`` the untried tokens with the best of scores ``[R, V]``.

    A row with fewer left repeats tried ones at its end.
    """
    scores = scores.masked_fill(tried, -torch.inf)
    return best_tokens(scores, min(count, scores.shape[1])).indices


def with_surprise(log_probabilities: Tensor, share: float) -> Tensor:
    """Log-probabilities ``[R, V]`` of which a share is spread evenly, so that nothing is ruled out.

    Args:
        log_probabilities: normalised.
        share: between 0 and 1.
    """
    even = torch.tensor(
        math.log(share / log_probabilities.shape[1]), device=log_probabilities.device
    )
    return torch.logaddexp(log_probabilities + math.log1p(-share), even)


class Exhaustive(Proposer):
    """Every token in the order of its id: brute force."""

    def scores(self, search: PrefixSearch, rows: Tensor) -> Tensor:
        """The lower the id, the sooner."""
        V = search.tried.shape[1]
        return -torch.arange(V, device=rows.device, dtype=torch.float32).expand(len(rows), V)


class Mixture(Proposer):
    """Several orders together: the sum of what they know, and each one's own favourites.

    Orders fail on different tokens. Their log-likelihoods are added (a product of experts, Hinton
    2002), which ranks highest what all find likely; from the second round at a place on, a share
    of the places goes to each order's own best, so that none can hide what another sees.

    Args:
        orders: the parts.
        alone: the share of a later round's candidates, between 0 and 1, that they name alone.
    """

    def __init__(self, orders: list[Proposer], alone: float = 0.5) -> None:
        if not orders or not 0 <= alone <= 1:
            raise InputError(
                "--model.recovery: a mixture needs one order or more, and alone between 0 and 1; "
                f"it has {len(orders)} and {alone}."
            )
        self.orders, self.alone = orders, alone
        self.needs_language_model = any(order.needs_language_model for order in orders)

    @property
    def name(self) -> str:
        """The parts'."""
        return "+".join(order.name for order in self.orders)

    def begin(self, search: PrefixSearch) -> None:
        """Every part begins."""
        for order in self.orders:
            order.begin(search)

    def advance(self, rows: Tensor, ids: Tensor) -> None:
        """Every part hears of it."""
        for order in self.orders:
            order.advance(rows, ids)

    def take_back(self, rows: Tensor) -> None:
        """Every part hears of it."""
        for order in self.orders:
            order.take_back(rows)

    def ahead(
        self, search: PrefixSearch, rows: Tensor, width: int, count: int
    ) -> Candidates | None:
        """Those of the first part that can say."""
        parts = (order.ahead(search, rows, width, count) for order in self.orders)
        return next((part for part in parts if part is not None), None)

    def scores(self, search: PrefixSearch, rows: Tensor) -> Tensor:
        """The sum of the parts'."""
        later = bool((search.rounds[rows] > 0).all())
        return torch.stack(
            [order.scores(search, rows) for order in self.orders if order.speaks(later)]
        ).sum(0)

    def propose(self, search: PrefixSearch, rows: Tensor, count: int) -> Candidates:
        """Most by the sum, the rest by each part alone."""
        later = bool((search.rounds[rows] > 0).all())
        speaking = [order for order in self.orders if order.speaks(later)]
        parts = [order.scores(search, rows) for order in speaking]
        tried = search.tried[rows]
        each = int(self.alone * count / len(parts)) if later else 0
        chosen = [best_untried(torch.stack(parts).sum(0), tried, count - each * len(parts))]
        names = ["+".join(order.name for order in speaking)] * chosen[0].shape[1]
        for order, scores in zip(speaking, parts, strict=True):
            if each:
                tried = tried.scatter(1, chosen[-1], True)
                chosen.append(best_untried(scores, tried, each))
                names += [order.name] * chosen[-1].shape[1]
        return Candidates(torch.cat(chosen, dim=1), tuple(names))
