"""Proposers: what each of them ranks tokens by, and how several are combined.

A proposer is a description that a YAML file can hold. ``begin`` puts it to work on one batch and
returns its ``Proposals``, which hold all that changes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_inversion.errors import InputError
from lightning_inversion.recovery.open_positions import OpenPositions
from lightning_inversion.transformer.embedding import best_tokens
from lightning_inversion.transformer.language_model import Continuations

NEARNESS = 0.15
"""Weight of the squared distance to a token, in std of the embedding, in its log-likelihood."""
_REMEMBERED = 0.7
"""What an earlier token counts for the question whether a prompt is text."""
_EVEN = 0.999
"""Share of the probability that is spread evenly at most."""
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


# -- the language model's prior --------------------------------------------------------------


class LanguageModelPrior(Proposer):
    """Tokens by their probability after the tokens found so far.

    At position 0 all tokens are alike. A prompt is either text or nothing that the model expects:
    the less likely it found the tokens that it was asked about, the more evenly it ranks the next.

    Args:
        uniform_share: the share of the probability that is spread evenly over the vocabulary at
            least, so that a prompt which the model finds unlikely can be recovered too.
    """

    needs_language_model = True

    def __init__(self, uniform_share: float = UNIFORM_SHARE) -> None:
        if not 0 < uniform_share < 1:
            raise InputError(
                f"--model.recovery: uniform_share must lie between 0 and 1, and is {uniform_share}."
            )
        self.uniform_share = uniform_share

    def begin(self, search: OpenPositions) -> Proposals:
        return _Prior(search, self.name, self.uniform_share)


class _Prior(Proposals):
    def __init__(self, search: OpenPositions, name: str, uniform_share: float) -> None:
        super().__init__(search, name)
        language_model = search.measurements.language_model
        assert language_model is not None
        rows, device = len(search.target), search.target.device
        self._uniform_share = uniform_share
        # Each token that it sees runs through all blocks, a candidate through those that are kept.
        self.slow = 2 * search.transformer.depth <= language_model.layers
        self._continuations = Continuations(language_model, rows)
        self._begun = torch.zeros(rows, dtype=torch.bool, device=device)
        # By how much likelier each prompt is as text than as tokens drawn evenly: the log.
        self._likelier = torch.zeros(rows, device=device)

    def accept(self, rows: Tensor, ids: Tensor) -> None:
        even = -math.log(self.search.tried.shape[1])
        for row, token in zip(rows.tolist(), ids.tolist(), strict=True):
            found = self._continuations.log_probability(row, token)
            if found is not None:
                self._likelier[row] = _REMEMBERED * self._likelier[row] + found - even
        self._continuations.append(rows, ids)
        self._begun[rows] = True

    def take_back(self, rows: Tensor) -> None:
        self._continuations.drop_last(rows)

    def scores(self, rows: Tensor) -> Tensor:
        """log of (1 - share) p + share / V, the share as likely as it is that this is no text."""
        scores = torch.zeros(len(rows), self.search.tried.shape[1], device=rows.device)
        begun = self._begun[rows]
        if begun.any():
            chances = self._continuations.log_probabilities(rows[begun]).to(rows.device)
            odds = self._uniform_share / (1 - self._uniform_share)
            share = torch.sigmoid(math.log(odds) - self._likelier[rows[begun], None])
            share = share.clamp(self._uniform_share, _EVEN)
            scores[begun] = mix_with_uniform(chances, share)
        return scores


# -- vectors that a fit has optimised --------------------------------------------------------


class NearestToInput(Proposals):
    """Tokens near the vectors of an optimised input.

    Args:
        search: of the batch.
        vectors: ``[B, T, D]``; nan where there are none: after a prompt's end, and for all of a
            prompt that the fit did not have.
    """

    def __init__(self, search: OpenPositions, vectors: Tensor) -> None:
        super().__init__(search, type(self).__name__)
        self.vectors = vectors

    def scores(self, rows: Tensor) -> Tensor:
        return self._nearness(self.vectors[rows, self.search.positions(rows)])

    def ahead(self, rows: Tensor, width: int, count: int) -> Candidates | None:
        """The nearest tokens, where each of the prompts has vectors; a prompt has all or none."""
        last = self.vectors.shape[1] - 1
        positions = self.search.positions(rows)[:, None] + torch.arange(width, device=rows.device)
        vectors = self.vectors[rows[:, None], positions.clamp(max=last)]
        if vectors[:, 0].isnan().any():
            return None
        ids = [best_tokens(self._nearness(some), count).indices for some in vectors.unbind(1)]
        return Candidates(torch.stack(ids, dim=1), (self.name,) * count)

    def _nearness(self, vectors: Tensor) -> Tensor:
        embedding = self.search.transformer.embedding
        given = ~vectors.isnan().any(dim=1, keepdim=True)
        near = embedding.nearness(vectors.nan_to_num())
        return torch.where(given, near * (2 * NEARNESS / embedding.std**2), 0.0)


# -- several together ------------------------------------------------------------------------


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
