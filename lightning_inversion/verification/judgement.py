"""What comparing tokens with a target has shown: a ``Judgement`` of candidates, a ``Verdict``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lightning_inversion.verification.refutation import Decision


@dataclass(frozen=True)
class Judgement:
    """What comparing candidates with a target has shown, for R positions.

    Attributes:
        best: ``[R]`` the column of the candidate that came closest.
        rivals: ``[R]`` the nearest other token that was compared; -1 without one.
        rival_residuals: ``[R]`` its residual; infinite without one.
        verified: ``[R]`` bool; the best candidate reproduces the target, and no rival does.
        group: ``[R]`` bool; others reproduce it as well, so that which is right stays open.
        missing: tokens near the best candidate that must be compared before it is judged, for each
            position; None where there is none. Such a position is neither verified nor a group.
        scanned: ``[R]`` bool; the features of all tokens were looked through for those near it.
        risks: ``[R]`` a bound for the chance that another token is right; nan without told noise.
    """

    best: Tensor
    rivals: Tensor
    rival_residuals: Tensor
    verified: Tensor
    group: Tensor
    missing: list[Tensor | None]
    scanned: Tensor
    risks: Tensor

    def rival_of(self, row: int) -> tuple[int | None, float | None]:
        """The nearest other token at a position, and its residual; None without one."""
        rival = int(self.rivals[row])
        return (None, None) if rival < 0 else (rival, float(self.rival_residuals[row]))


@dataclass(frozen=True)
class Verdict:
    """What running decoded tokens has shown.

    Attributes:
        verified: ``[B, T]`` bool; True where the token and, in a causal model, all before it
            reproduce the target, and no rival does.
        conditional: ``[B, T]`` bool; the token and no rival reproduces the target, but one before
            it is not verified.
        group: ``[B, T]`` bool; the token reproduces the target, and so do others.
        residuals: ``[B, T]`` of each position, see ``Calibration``.
        thresholds: ``[B, T]`` the residual up to which a position counts as reproduced.
        decisions: of tokens that are verified or conditional because the next row refutes others,
            by row and position.
    """

    verified: Tensor
    conditional: Tensor
    group: Tensor
    residuals: Tensor
    thresholds: Tensor
    decisions: Mapping[tuple[int, int], Decision]

    @property
    def alone(self) -> Tensor:
        """``[B, T]`` bool; the token and no rival reproduces the target, after those before it."""
        return self.verified | self.conditional

    def state(
        self, row: int, position: int
    ) -> Literal["verified", "conditional", "group", "unresolved"]:
        """What is shown of a token; see ``TokenCertificate``."""
        if self.verified[row, position]:
            return "verified"
        if self.conditional[row, position]:
            return "conditional"
        return "group" if self.group[row, position] else "unresolved"
