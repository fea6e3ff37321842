"""What a recovery policy is given, and what it returns: prompts with a certificate per token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_inversion.errors import InputError
from lightning_inversion.verification.certificate import Rows, TokenCertificate
from lightning_inversion.verification.measurements import Measurements

ALTERNATIVES = 5
"""Candidates that are kept beside a token that is not verified."""


@dataclass(frozen=True)
class Targets:
    """The features of B prompts, which a policy is to reproduce.

    Attributes:
        features: ``[B, T, F]``; nan in rows that are not stored.
        lengths: tokens of each prompt, the known ones among them.
        known: tokens with which every prompt begins.
        fitted: ``[B, T, D]`` vectors that a fit has optimised, nan where there are none; None
            without a fit.
    """

    features: Tensor
    lengths: Sequence[int]
    known: tuple[int, ...] = ()
    fitted: Tensor | None = None

    @property
    def known_ids(self) -> Tensor:
        """``[N]`` the known tokens."""
        return torch.tensor(self.known, dtype=torch.long, device=self.features.device)

    @property
    def finite(self) -> list[bool]:
        """Whether the rows of each prompt's unknown tokens hold numbers."""
        begin = len(self.known)
        rows = zip(self.features, self.lengths, strict=True)
        return [bool(own[begin:length].isfinite().all()) for own, length in rows]

    def of(self, rows: Sequence[int]) -> Targets:
        """Some of the prompts, without the padding that they do not need."""
        lengths = [self.lengths[row] for row in rows]
        part = torch.tensor(rows, device=self.features.device)
        fitted = None if self.fitted is None else self.fitted[part, : max(lengths)]
        features = self.features[part, : max(lengths)]
        return replace(self, features=features, lengths=lengths, fitted=fitted)


@dataclass
class RecoveredPrompt:
    """One recovered prompt.

    Attributes:
        tokens: one certificate a token, but for those that were given.
        known: tokens that were given.
        forwards: forwards of the truncated model that this prompt took part in.
        seconds: wall time until its last token.
        finite: whether the target holds numbers; nothing is recovered where it does not.
        order: the number of each token's row, where rows were in unknown order.
    """

    tokens: list[TokenCertificate] = field(default_factory=list)
    known: tuple[int, ...] = ()
    forwards: int = 0
    seconds: float = 0.0
    finite: bool = True
    order: tuple[int, ...] = ()

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
        needs_first_position: whether it begins at position 0, or after tokens that are known.
        rows: which hidden states of a prompt it reads.
    """

    needs_language_model: bool = False
    uses_fit: bool = False
    needs_first_position: bool = True
    rows: Rows = "all"

    @property
    def name(self) -> str:
        """The name in result rows."""
        return type(self).__name__

    @abstractmethod
    def recover(
        self, measurements: Measurements, targets: Targets
    ) -> Iterator[list[RecoveredPrompt]]:
        """Recover B prompts; yields the same list after each round, to the end."""


def recover_prompts(
    policy: RecoveryPolicy,
    measurements: Measurements,
    targets: Targets,
    after_round: Callable[[list[RecoveredPrompt]], None] | None = None,
) -> list[RecoveredPrompt]:
    """What a policy recovers in the end; nothing of a prompt whose features are not finite.

    Args:
        policy: which tokens are run, in which order.
        measurements: of the model.
        targets: the features to reproduce.
        after_round: called with the prompts as they stand.

    Raises:
        InputError: the known tokens do not reproduce the target.
    """
    prompts: list[RecoveredPrompt] = []
    check_known_prefix(measurements, targets)
    finite, given = targets.finite, len(targets.known)
    lengths = [
        length if whole else given for length, whole in zip(targets.lengths, finite, strict=True)
    ]
    with torch.no_grad():
        for prompts in policy.recover(measurements, replace(targets, lengths=lengths)):
            if after_round is not None:
                after_round(prompts)
    for prompt, whole in zip(prompts, finite, strict=True):
        prompt.finite = whole
    return prompts


@torch.no_grad()
def check_known_prefix(measurements: Measurements, targets: Targets) -> None:
    """Refuse known tokens whose features are not those of the targets.

    Without a causal mask features depend on what follows, and are not compared.

    Raises:
        InputError: names the prompt and the position.
    """
    transformer, calibration = measurements.transformer, measurements.calibration
    if not targets.known or not transformer.causal:
        return
    stored = targets.features[:, : len(targets.known)]
    own = transformer.features_of(targets.known_ids[None])
    positions = torch.arange(stored.shape[1], device=stored.device).expand(stored.shape[:2])
    residuals = calibration.residual(own, stored, positions)
    allowed = calibration.plausible[positions.clamp(max=1)]
    wrong = ((residuals > allowed) & stored.isfinite().all(-1)).nonzero()
    if len(wrong):
        row, position = wrong[0].tolist()
        raise InputError(
            f"The known prefix does not fit the hidden states of prompt {row + 1} of the batch: at "
            f"position {position} they are {float(residuals[row, position]):.2g} std from its "
            f"token's, and {float(allowed[row, position]):.2g} is allowed; correct known_prefix, "
            "or leave it out."
        )
