"""What a recovery policy is given, and what it returns: prompts with a certificate per token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_inversion.recovery.measurements import Measurements

ALTERNATIVES = 5
"""Candidates that are kept beside a token that is not verified."""


State = Literal["verified", "conditional", "group", "unresolved"]
"""What is shown of a token: see ``TokenCertificate``."""


@dataclass(frozen=True)
class TokenCertificate:
    """One recovered token, and what running it has shown.

    Attributes:
        id: the token.
        state: ``verified``: it reproduces the target behind the tokens before it, and no token that
            was compared comes near. ``conditional``: the same, but a token before it is not
            verified. ``group``: others reproduce the target too. ``unresolved``: nothing is shown.
        residual: its distance to the target in std of each feature, see ``Calibration``.
        threshold: the residual up to which a token passes here.
        rival: the nearest other token that was compared; None without one.
        rival_residual: its residual.
        risk: a bound for the chance that another token is right, where the channel adds noise; None
            without noise, where residuals decide.
        compared: how many tokens were run at this position.
        proposer: which proposer named it.
        seconds: wall time spent at this position; prompts of one batch share their rounds.
        alternatives: the best candidates of a token that is not verified, itself first; of a group
            its members.
    """

    id: int
    state: State
    residual: float
    threshold: float
    rival: int | None
    rival_residual: float | None
    compared: int
    proposer: str
    seconds: float
    risk: float | None = None
    alternatives: tuple[int, ...] = ()

    @property
    def verified(self) -> bool:
        """Whether the token and all before it are verified."""
        return self.state == "verified"

    @property
    def margin(self) -> float | None:
        """How many times as far as the token its nearest rival is; None without a rival."""
        if self.rival_residual is None:
            return None
        return self.rival_residual / max(self.residual, 1e-9)

    def behind(self, verified: bool) -> TokenCertificate:
        """The certificate behind tokens that are all verified, or not."""
        if self.state not in ("verified", "conditional"):
            return self
        return replace(self, state="verified" if verified else "conditional")

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
        finite: whether the target holds numbers; nothing is recovered where it does not.
    """

    tokens: list[TokenCertificate] = field(default_factory=list)
    known: tuple[int, ...] = ()
    forwards: int = 0
    seconds: float = 0.0
    text: str | None = None
    finite: bool = True

    @property
    def ids(self) -> list[int]:
        """All tokens of the prompt."""
        return [*self.known, *(token.id for token in self.tokens)]

    @property
    def verified(self) -> bool:
        """Whether every token that was not given is verified."""
        return self.finite and all(token.verified for token in self.tokens)


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
    given = 0 if known is None else len(known)
    finite = [bool(target[row, :length].isfinite().all()) for row, length in enumerate(lengths)]
    lengths = [length if whole else given for length, whole in zip(lengths, finite, strict=True)]
    with torch.no_grad():
        for prompts in policy.recover(measurements, target, lengths, known, fitted):
            if after_round is not None:
                after_round(prompts)
    for prompt, whole in zip(prompts, finite, strict=True):
        prompt.finite = whole
    return prompts
