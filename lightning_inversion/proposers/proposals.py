"""Proposers: what each of them ranks tokens by, and how several are combined.

A proposer is a description that a YAML file can hold. ``begin`` puts it to work on one batch and
returns its ``Proposals``, which hold all that changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_inversion.proposers.open_positions import OpenPositions
from lightning_inversion.transformer.embedding import best_tokens

UNIFORM_SHARE = 0.05
"""Share of the probability that is spread evenly over the vocabulary, so that none is 0."""


@dataclass(frozen=True)
class Candidates:
    """Tokens to run.

    Attributes:
        ids: ``[R, K]``, the most likely first; ``[R, W, K]`` for W positions.
        proposers: the name of the proposer of each of the K columns.
    """

    ids: Tensor
    proposers: tuple[str, ...]


class Proposals(ABC):
    """A proposer at work on one batch: it ranks the vocabulary for the next token of each prompt.

    Args:
        search: of the batch.
        name: the proposer's, as certificates show it.

    Attributes:
        stages: rounds at a position after which those that follow are proposed in the same way;
            rows at different stages are not run together.
        slow: whether its scores cost more than running a few candidates.
    """

    stages: int = 1
    slow: bool = False

    def __init__(self, search: OpenPositions, name: str) -> None:
        self.search, self.name = search, name

    def update(self, rows: Tensor) -> None:  # noqa: B027 - most need nothing
        """A round begins for ``rows`` [R]: use what earlier rounds have shown."""

    def accept(self, rows: Tensor, ids: Tensor) -> None:  # noqa: B027
        """Each of ``rows`` [R] continues with its token of ``ids`` [R]."""

    def take_back(self, rows: Tensor) -> None:  # noqa: B027
        """The last token of each of ``rows`` [R] was wrong; ``accept`` gives another one next."""

    def ahead(self, rows: Tensor, width: int, count: int) -> Candidates | None:
        """The ``count`` best tokens of each of the next ``width`` positions.

        None where the tokens in between must be known. A position may lie after a prompt's end;
        its candidates are ignored.
        """
        return None

    @abstractmethod
    def scores(self, rows: Tensor) -> Tensor:
        """Log-likelihood ``[R, V]`` of each token, up to a constant a row. Changes nothing."""

    def propose(self, rows: Tensor, count: int) -> Candidates:
        """The ``count`` best tokens that were not tried yet."""
        ids = best_untried(self.scores(rows), self.search.tried[rows], count)
        return Candidates(ids, (self.name,) * ids.shape[1])


def best_untried(scores: Tensor, tried: Tensor, count: int) -> Tensor:
    """The untried tokens ``[R, count]`` with the best of scores ``[R, V]``.

    A row with fewer left repeats tried ones at its end.
    """
    scores = scores.masked_fill(tried, -torch.inf)
    return best_tokens(scores, min(count, scores.shape[1])).indices


class Proposer(ABC):
    """Ranks the whole vocabulary for the next token of each prompt.

    Any subclass can be selected by its ``class_path``; ``Exhaustive`` is the shortest one. A
    proposer ranks all tokens, so that a bad one costs time and never a right token. It holds
    settings only, so that one object serves several recoveries at once.

    Attributes:
        needs_language_model: whether it uses the whole model with its head.
        waits: rounds at a position that must have failed before it has a part in a mixture, to
            which it then names its own best tokens alone.
    """

    needs_language_model: bool = False
    waits: int = 0

    @property
    def name(self) -> str:
        """The name in certificates and result rows."""
        return type(self).__name__

    @abstractmethod
    def begin(self, search: OpenPositions) -> Proposals:
        """Start to work on the batch of ``search``."""


def mix_with_uniform(log_probabilities: Tensor, share: float | Tensor) -> Tensor:
    """Log-probabilities ``[R, V]`` with a share of the probability given evenly to all tokens.

    Args:
        log_probabilities: normalised.
        share: between 0 and 1; ``[R, 1]`` for a share of each row.
    """
    shares = torch.as_tensor(share, device=log_probabilities.device)
    even = (shares / log_probabilities.shape[1]).log()
    return torch.logaddexp(log_probabilities + (-shares).log1p(), even)


class Exhaustive(Proposer):
    """Every token in the order of its id: brute force."""

    def begin(self, search: OpenPositions) -> Proposals:
        return _InOrderOfId(search, self.name)


class _InOrderOfId(Proposals):
    def scores(self, rows: Tensor) -> Tensor:
        V = self.search.tried.shape[1]
        return -torch.arange(V, device=rows.device, dtype=torch.float32).expand(len(rows), V)
