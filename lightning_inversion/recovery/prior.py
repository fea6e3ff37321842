"""The language model's own expectation as a candidate order."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_inversion.errors import InputError
from lightning_inversion.recovery.proposals import Proposer, with_surprise
from lightning_inversion.recovery.search import PrefixSearch
from lightning_inversion.transformer.language_model import Continuations


class LanguageModelPrior(Proposer):
    """Tokens in the order of their probability after the known prefix.

    Before a first token nothing is expected: all are alike.

    Args:
        surprise: the share of the probability that is spread evenly over the vocabulary, so that a
            text which the model finds absurd can be read too.
    """

    needs_language_model = True

    def __init__(self, surprise: float = 0.05) -> None:
        if not 0 < surprise < 1:
            raise InputError(
                f"--model.recovery: surprise must lie between 0 and 1, and is {surprise}."
            )
        self.surprise = surprise

    def begin(self, search: PrefixSearch) -> None:
        """Nothing is known of any text."""
        language_model = search.measurements.language_model
        assert language_model is not None
        self._continuations = Continuations(language_model, search.rows)
        self._begun = torch.zeros(search.rows, dtype=torch.bool, device=search.target.device)

    def advance(self, rows: Tensor, ids: Tensor) -> None:
        """The texts go on."""
        self._continuations.append(rows, ids)
        self._begun[rows] = True

    def take_back(self, rows: Tensor) -> None:
        """A token less."""
        self._continuations.drop_last(rows)

    def scores(self, search: PrefixSearch, rows: Tensor) -> Tensor:
        """log of (1 - surprise) p + surprise / V."""
        V = search.tried.shape[1]
        scores = torch.zeros(len(rows), V, device=rows.device)
        begun = self._begun[rows]
        if begun.any():
            chances = self._continuations.log_probabilities(rows[begun]).to(rows.device)
            scores[begun] = with_surprise(chances, self.surprise)
        return scores
