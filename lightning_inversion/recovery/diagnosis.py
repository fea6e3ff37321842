"""Why captured features fit no token: scans of position 0, in seconds, before any search.

The commonest mistakes look alike: nothing is verified. A first token sees no other, so its features
follow from the token alone, and a few tokens run in other ways tell the mistakes apart: one block
less or more, with and without the final norm, minus the mean over the features, times a factor.
A first row that is no first position looks like a later one. The tokens to run are those that the
linear probe reads; where they explain nothing, the whole vocabulary is scanned for others.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lightning_inversion.recovery.later_rows import LaterRows
from lightning_inversion.recovery.likely_first import (
    FirstTokens,
    ReadFirstTokens,
    ScannedFirstTokens,
)
from lightning_inversion.recovery.policy import Targets
from lightning_inversion.recovery.variants import CLEAR, OtherCuts, Variants
from lightning_inversion.verification.measurements import Measurements
from lightning_inversion.verification.noise import NoiseName

_SAMPLE, _OF_A_ROW = 16, 4
"""Tokens that are run for position 0, and for each row that may be the first one."""
_SCANNED = 8
"""Prompts of a batch that are scanned; what most of them have is taken for the others'."""
_ROWS = 256
"""Rows of a prompt that may be its first position."""
_KINDS: dict[NoiseName, tuple[str, str]] = {
    "gaussian": ("Gaussian", ""),
    "laplace": ("Laplace", " --data.noise_kind laplace"),
}
"""What noise is called, and the option that names it."""
_EQUALLY_LIKELY = (math.pi / (2 * math.e)) ** 0.5
"""The mean size of noise, in its std, at which both kinds are as likely."""
_ENOUGH_FEATURES = 32
"""Features that show whether a difference looks like noise."""


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with the features of a prompt whose position 0 fits no token.

    Attributes:
        residual: of the nearest token, in std of each feature.
        threshold: the residual up to which it would be plausible.
        token: the nearest token.
        cause: what the features fit instead; None where nothing fits.
        way_out: the option to set, or what to do.
        near: whether one token is clearly the nearest: something was added to its features, or they
            were computed otherwise, and the search may find the others.
        noise: kind and std of what was added, where it looks like noise; else None.
        scanned: whether the prompt was looked at by itself.
    """

    residual: float
    threshold: float
    token: int
    cause: str | None = None
    way_out: str | None = None
    near: bool = False
    noise: tuple[NoiseName, float] | None = None
    scanned: bool = False

    @property
    def has_option(self) -> bool:
        """Whether an option makes the features fit."""
        return self.way_out is not None and self.way_out.startswith("set ")

    @property
    def finding(self) -> str:
        """What is wrong, and the way out."""
        if self.cause is not None:
            return f"{self.cause}; {self.way_out}"
        if self.near:
            return (
                "one token is clearly the nearest, so that the features were computed in another "
                "precision, or noise was added; set --model.transformer.dtype as they were computed"
            )
        return (
            "nor would one at another depth, with or without the final norm, centred or scaled; if "
            "the rows are of later positions, give the tokens before them as --data.known_prefix "
            "or set --model.recovery Reading, or LastPosition for the last row of a short text; a "
            "few tokens of each position are tried, and none is verified"
        )

    def __str__(self) -> str:
        return (
            f"position 0 fits no token (the nearest has residual {self.residual:.2g}, and "
            f"{self.threshold:.2g} would be plausible); {self.finding}"
        )


@torch.no_grad()
def diagnose(
    measurements: Measurements,
    targets: Targets,
    cuts: OtherCuts | None = None,
) -> list[Diagnosis | None]:
    """What is wrong with each prompt; None where a token fits position 0.

    Args:
        measurements: of a causal model; those of first tokens alone will do.
        targets: of prompts from position 0 on.
        cuts: the model at other depths; without it only this one is scanned.
    """
    known = targets.known_ids if targets.known else None
    read = _Scans(measurements, ReadFirstTokens(measurements), cuts, known)
    found = read.explained(targets)
    failed = [one for one in found if one is not None]
    if len(failed) > _SCANNED or not all(one.cause for one in failed):
        every = measurements.derived(ScannedFirstTokens)
        found = _Scans(measurements, every, cuts, known).explained(targets)
    return _with_common_noise(found)


def _with_common_noise(found: list[Diagnosis | None]) -> list[Diagnosis | None]:
    """The same noise in all prompts that seem to have some: they came the same way."""
    noises = [one.noise for one in found if one is not None and one.noise is not None]
    if not noises:
        return found
    kind = Counter(name for name, _ in noises).most_common(1)[0][0]
    std = (sum(std**2 for _, std in noises) / len(noises)) ** 0.5
    name, more = _KINDS[kind]
    cause = f"that token is clearly the nearest, and {name} noise of std {std:.2g} was added"
    way_out = f"set --data.noise {std:.2g}{more}"
    return [
        one
        if one is None or not one.near or (one.scanned and one.noise is None)
        else replace(one, cause=cause, way_out=way_out)
        for one in found
    ]


class _Scans:
    def __init__(
        self,
        measurements: Measurements,
        tokens: FirstTokens,
        cuts: OtherCuts | None,
        known: Tensor | None,
    ) -> None:
        self.measurements, self.tokens, self.known = measurements, tokens, known
        self.transformer = measurements.transformer
        self.threshold = float(measurements.calibration.plausible[0])
        self.cuts = cuts

    @cached_property
    def variants(self) -> Variants:
        """The model, cut otherwise."""
        return Variants(self.measurements, self.tokens, self.cuts)

    def explained(self, targets: Targets) -> list[Diagnosis | None]:
        """The diagnosis of each prompt; None where a token fits."""
        target, lengths = targets.features, targets.lengths
        found = self.unfit(target[:, 0])
        failed = [(row, one) for row, one in enumerate(found) if one is not None]
        for row, unfit in failed[:_SCANNED]:
            found[row] = self.explain(target[row, : lengths[row]], unfit)
        scanned = Counter((one.cause, one.way_out) for one in found if one and one.scanned)
        for row, unfit in failed[_SCANNED:]:
            cause, way_out = scanned.most_common(1)[0][0]
            found[row] = replace(unfit, cause=cause, way_out=way_out)
        return found

    def unfit(self, rows: Tensor) -> list[Diagnosis | None]:
        """What is wrong at position 0, not yet explained; None where a token fits rows [B, F]."""
        if self.known is None:
            ids = self.tokens.nearest(rows, _SAMPLE)
        else:
            ids = self.known[:1].expand(len(rows), 1)
        residuals = self._residuals(ids, rows)
        found: list[Diagnosis | None] = []
        for own, tokens in zip(residuals, ids, strict=True):
            residual, token = float(own.min()), int(tokens[own.argmin()])
            if residual <= self.threshold:
                found.append(None)
                continue
            others = own[self._differ(tokens, token)]
            near = bool(len(others)) and residual <= CLEAR * float(others.min())
            found.append(Diagnosis(residual, self.threshold, token, near=near))
        return found

    def explain(self, rows: Tensor, unfit: Diagnosis) -> Diagnosis:
        """The diagnosis of the features ``[T, F]`` of one prompt, with its cause."""
        first, residual = rows[0], unfit.residual
        found = self.variants.explain(first, residual, self.known) or self._first_row_behind(rows)
        if found is None and self.known is not None:
            found = (
                "the known prefix does not reproduce its own rows",
                "correct --data.known_prefix, or set --data.first_position where its rows are "
                "left out",
            )
        if found is None and not unfit.near:
            found = self._later_position(rows)
        cause, way_out = found or (None, None)
        near = unfit.near and found is None
        noise = self._noise(first, unfit.token) if near else None
        return replace(unfit, cause=cause, way_out=way_out, near=near, noise=noise, scanned=True)

    def _noise(self, row: Tensor, token: int) -> tuple[NoiseName, float] | None:
        """Kind and std of what a row ``[F]`` has beside a token's features, if it looks like noise.

        Noise is as large in features that vary much as in those that vary little. Another
        precision, or another model, changes large features more. It is as large in the directions
        in which tokens differ most: a projection leaves those as they are. The kind is the likelier
        one; the mean size of Gaussian noise is 0.80 of its std, that of Laplace noise 0.71.
        """
        ids = torch.tensor([[token]], device=row.device)
        added = (row - self.transformer.features_of(ids)[0, 0]).double()
        if len(added) < _ENOUGH_FEATURES:
            return None
        std = added.square().mean().sqrt()
        size = float(added.abs().mean() / std)
        kind: NoiseName = "gaussian" if size > _EQUALLY_LIKELY else "laplace"
        usual, varies = (0.798, 0.26) if kind == "gaussian" else (0.707, 0.5)
        order = self.measurements.calibration.std[0].argsort()
        calm, lively = (half.square().mean().sqrt() for half in added[order].chunk(2))
        # Both vary by chance: three standard errors, and a little more.
        ratio = abs(math.log(float(calm / lively)))
        chance = 3 / len(added) ** 0.5
        wide = 2**0.5 if kind == "gaussian" else 5**0.5
        if ratio > 0.1 + chance * wide or abs(size - usual) > 0.01 + chance * varies:
            return None
        for share in (0.125, 0.25, 0.5):
            most = self._directions[: round(share * len(added))]
            power = (most @ added).square().sum()
            inside, outside = len(most), len(added) - len(most)
            rest = (added.square().sum() - power).clamp_min(1e-30) / outside
            ratio = abs(math.log(float((power / inside).clamp_min(1e-30) / rest)))
            if ratio > 0.2 + 3 * (2 / inside + 2 / outside) ** 0.5:
                return None
        return kind, float(std)

    @cached_property
    def _directions(self) -> Tensor:
        """``[K, F]`` the directions in which first tokens differ, the most first."""
        features = self.transformer.features_of(self.variants.reference[:, None])[:, 0].double()
        directions: Tensor = torch.linalg.svd(features - features.mean(0), full_matrices=False).Vh
        return directions

    def _residuals(self, ids: Tensor, rows: Tensor) -> Tensor:
        """``[B, K]`` of tokens ``[B, K]`` as the first of a prompt with rows ``[B, F]``."""
        features = self.transformer.features_of(ids.reshape(-1, 1)).view(*ids.shape, -1)
        calibration = self.measurements.calibration
        return calibration.residual(features, rows[:, None], torch.zeros_like(ids))

    def _differ(self, ids: Tensor, token: int) -> Tensor:
        """Which of the tokens have another embedding than one of them."""
        duplicates = self.transformer.embedding.first_duplicate.to(ids.device)
        return duplicates[ids] != duplicates[token]

    # -- rows that are no first position -----------------------------------------------------

    def _first_row_behind(self, rows: Tensor) -> tuple[str, str] | None:
        """A later row that fits as position 0: padding on the left, or another text before."""
        some = rows[1:_ROWS]
        if not len(some):
            return None
        residuals = self._residuals(self.tokens.nearest(some, _OF_A_ROW), some).amin(1)
        row = int(residuals.argmin()) + 1
        if float(residuals.min()) > self.threshold:
            return None
        before = "row 0 is" if row == 1 else f"rows 0 to {row - 1} are"
        return (
            f"row {row} fits as the first position, so that {before} padding or another text",
            f"leave {'it' if row == 1 else 'them'} out, for one prompt by "
            f"--data.layout.padding left --data.layout.lengths [{len(rows) - row}]",
        )

    def _later_position(self, rows: Tensor) -> tuple[str, str] | None:
        """Whether rows ``[T, F]`` read as tokens of later positions."""
        if not self.measurements.derived(LaterRows).include(rows):
            return None
        return (
            "row 0 is no first position, and looks like a later one",
            "give the tokens before it as --data.known_prefix and their number as "
            "--data.first_position, or read each row by itself with --model.recovery Reading",
        )
