"""``LanguageModelPrior``: tokens by how likely the language model finds them next."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_inversion.errors import InputError
from lightning_inversion.proposers.open_positions import OpenPositions
from lightning_inversion.proposers.proposals import (
    UNIFORM_SHARE,
    Proposals,
    Proposer,
    mix_with_uniform,
)
from lightning_inversion.transformer.language_model import Continuations

_REMEMBERED = 0.7
"""What an earlier token counts for the question whether a prompt is text."""
_EVEN = 0.999
"""Share of the probability that is spread evenly at most."""


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
