"""What a recovery policy is given, and what it returns: prompts with a certificate per token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_inversion.recovery.verification import Measurements

ALTERNATIVES = 5
"""Candidates that are kept beside a token that is not verified."""


@dataclass(frozen=True)
class TokenCertificate:
    """One recovered token, and what running it has shown.

    Attributes:
        id: the token.
        verified: True where it reproduces the target behind the tokens before it. It does not
            compare with tokens that were not run.
        residual: its distance to the target in std of each feature, see ``Calibration``.
        threshold: the residual up to which a token is verified here.
        runner_up: the residual of the nearest other candidate that was run; None without one.
        candidates: how many tokens were run at this position.
        proposer: which proposer named it.
        seconds: wall time spent at this position; prompts of one batch share their rounds.
        duplicates: other tokens with the same embedding, which no hidden state
            distinguishes.
        alternatives: the best candidates of a token that is not verified, itself first.
    """

    id: int
    verified: bool
    residual: float
    threshold: float
    runner_up: float | None
    candidates: int
    proposer: str
    seconds: float
    duplicates: tuple[int, ...] = ()
    alternatives: tuple[int, ...] = ()

    @property
    def margin(self) -> float | None:
        """The runner-up's residual in units of the threshold; None without either."""
        if self.runner_up is None or not self.threshold:
            return None
        return self.runner_up / self.threshold

    def replaced_by(self, other: int, residual: float) -> TokenCertificate:
        """The certificate of another alternative, which the rest of the prompt supports."""
        others = tuple(token for token in self.alternatives if token != other)
        return replace(self, id=other, residual=residual, alternatives=(other, *others))


@dataclass
class RecoveredPrompt:
    """One recovered prompt.

    Attributes:
        tokens: one certificate a token, but for those that were given.
        known: tokens that were given.
        forwards: forwards of the truncated model that this prompt took part in.
        seconds: wall time until its last token.
        text: all tokens decoded, where a tokenizer was given; see ``api.recover``.
    """

    tokens: list[TokenCertificate] = field(default_factory=list)
    known: tuple[int, ...] = ()
    forwards: int = 0
    seconds: float = 0.0
    text: str | None = None

    @property
    def ids(self) -> list[int]:
        """All tokens of the prompt."""
        return [*self.known, *(token.id for token in self.tokens)]

    @property
    def verified(self) -> bool:
        """Whether every token that was not given is verified."""
        return all(token.verified for token in self.tokens)


class RecoveryPolicy(ABC):
    """Names the tokens of a batch of prompts from left to right.

    Attributes:
        needs_language_model: whether it uses the whole model with its head.
        uses_fit: whether the input that a fit has optimised helps it.
    """

    needs_language_model: bool = False
    uses_fit: bool = False

    @property
    def name(self) -> str:
        """The name in result rows."""
        return type(self).__name__

    @abstractmethod
    def recover(
        self,
        measurements: Measurements,
        target: Tensor,
        lengths: list[int],
        known: Tensor | None = None,
        fitted: Tensor | None = None,
    ) -> Iterator[list[RecoveredPrompt]]:
        """Recover B prompts; yields the same list after each round, to the end.

        Args:
            measurements: of the model.
            target: ``[B, T, F]`` features to reproduce.
            lengths: tokens of each prompt.
            known: ``[N]`` tokens with which every prompt begins.
            fitted: ``[B, T, D]`` vectors that a fit has optimised, nan where there are none; only
                where ``uses_fit``.
        """


def recover_prompts(
    policy: RecoveryPolicy,
    measurements: Measurements,
    target: Tensor,
    lengths: list[int],
    known: Tensor | None = None,
    fitted: Tensor | None = None,
    after_round: Callable[[list[RecoveredPrompt]], None] | None = None,
) -> list[RecoveredPrompt]:
    """What a policy recovers in the end; see ``RecoveryPolicy.recover``.

    Args:
        policy: which tokens are run, in which order.
        measurements: of the model.
        target: ``[B, T, F]`` features to reproduce.
        lengths: tokens of each prompt.
        known: ``[N]`` tokens with which every prompt begins.
        fitted: ``[B, T, D]`` vectors that a fit has optimised.
        after_round: called with the prompts as they stand.
    """
    prompts: list[RecoveredPrompt] = []
    with torch.no_grad():
        for prompts in policy.recover(measurements, target, lengths, known, fitted):
            if after_round is not None:
                after_round(prompts)
    return prompts
