"""``Calibration``: when a residual verifies a token, measured for a model, depth and channel."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_inversion.transformer.linear_probe import LinearProbe
from lightning_inversion.transformer.sparse import kept_features, where_kept
from lightning_inversion.transformer.truncated import TruncatedTransformer
from lightning_inversion.verification.held_out import HeldOut, HeldOutRuns, size_of
from lightning_inversion.verification.noise import NOISE, NoiseKind, NoiseName
from lightning_inversion.verification.rarity import NEAREST_SHARE, rarity, rarity_around_each

_COUNTED = 0.95
"""Of the share of features that is told to be kept: the rest may be 0, or was counted otherwise."""
CLEARANCE = 1.5
"""How many times the residual of a verified token that of every rival must be."""
RISK = 1e-6
"""The largest chance that a verified token is another one, where a chance can be given."""
_SAFETY = 3.0
"""How many times the largest residual of a right token another machine may have."""
_ODD = 0.01
"""Share of the held-out tokens that may be odd: they move no threshold."""
_MANY_FEATURES = 64
"""Of fewer features a target that is of no token may be as near to one token, and to no other."""


class Channel(Protocol):
    """What happens to features on their way to the target."""

    @property
    def noise(self) -> float:
        """Standard deviation of the noise, in the features' own units."""

    @property
    def noise_kind(self) -> NoiseName:
        """How the noise is distributed."""

    @property
    def largest(self) -> float:
        """The share of each position's features that is kept; see ``keep_largest``."""

    def __call__(self, features: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Features ``[..., F]`` after all that happens."""

    def without_noise(self, features: Tensor) -> Tensor:
        """Features ``[..., F]`` after all else that happens, such as rounding."""


@dataclass(frozen=True)
class Calibration:
    """Residuals of right and wrong tokens, measured on held-out prompts; the thresholds between.

    A residual is the root mean square over the features of their difference in std of each feature
    over random tokens: 1 is about the distance of another token. Unlike a difference relative to
    the norm, it is not dominated by a few massive activations. Where the channel adds noise, it is
    in std of the noise instead, and a right token's is about 1; under Laplace noise it is the mean
    of the absolute differences, divided by that of the noise.

    Each value has two entries: for position 0, which sees no other token, and for later ones.

    Attributes:
        mean: ``[2, F]`` mean of each feature over random tokens.
        std: ``[2, F]`` the unit of each feature's difference.
        left_out: ``[2, F, K]`` orthonormal directions in which rounding errs most, in units of
            ``std``; a residual leaves them out. K is 0 where a model computes in float32.
        rounding: ``[2]`` the residual that another rounding gives a right token at most.
        threshold: ``[2]`` the residual up to which a token is verified where no rival is near; 0
            where right and wrong tokens cannot be distinguished.
        plausible: ``[2]`` the residual up to which a token may be right.
        right: ``[2]`` the residual of right tokens, but for the odd ones.
        wrong: ``[2]`` the median over right tokens of the smallest residual of a wrong one, the 15
            nearest embeddings included.
        radius: ``[2]`` the distance of embeddings beyond which no token has features as near as
            the threshold.
        gain: ``[2]`` the smallest residual that a distance of 1 between embeddings gives.
        freedom: ``[2]`` how many directions the errors of rounding have, as independent as these
            are: half of what the share of each counts (the participation ratio).
        dimension: ``[2]`` the power by which random tokens get rare near the target.
        common: ``[2]`` the residual that the nearest 5% of random tokens have.
        noisy: ``[2]`` how many features' worth of told noise there is; 0 without noise.
        flattened: ``[2]`` how much likelier noise may be after rounding; ``NoiseKind.flattened``.
        hidden: ``[2]`` bool; told noise is so strong that tokens far from the right one's
            embedding could pass for the target too.
        features: how many features of a position are compared at least: all, or 95% of those that
            were kept.
        power: of the kind of noise, see ``NoiseKind``; 2 without noise.
    """

    mean: Tensor
    std: Tensor
    left_out: Tensor
    rounding: Tensor
    threshold: Tensor
    plausible: Tensor
    right: Tensor
    wrong: Tensor
    radius: Tensor
    gain: Tensor
    freedom: Tensor
    dimension: Tensor
    common: Tensor
    noisy: Tensor
    flattened: Tensor
    hidden: Tensor
    features: int
    power: int = 2

    @property
    def verifies(self) -> bool:
        """Whether tokens can be verified at every position, without comparing them with all."""
        told = (self.noisy > 0) & (~self.hidden | self.has_many_features)
        return bool(((self.threshold > 0) | told).all()) and not self.is_too_sparse

    @property
    def has_many_features(self) -> bool:
        """Whether features are so many that none is matched by chance where all are compared."""
        return self.features >= _MANY_FEATURES

    @property
    def is_sparse(self) -> bool:
        """Whether only the largest features of each position are compared."""
        return self.features < self.std.shape[1]

    @property
    def is_too_sparse(self) -> bool:
        """Whether they are so few that nothing is verified.

        How rare tokens are near the target is measured for features that do not depend on it.
        """
        return self.is_sparse and not self.has_many_features

    @property
    def has_noise(self) -> bool:
        """Whether the channel adds noise, under which tokens are verified with a probability."""
        return bool((self.noisy > 0).any())

    @property
    def noise_kind(self) -> NoiseKind:
        """How told noise is distributed."""
        return NoiseKind(self.power)

    def residual(self, features: Tensor, target: Tensor, positions: Tensor) -> Tensor:
        """Residual ``[...]`` of features ``[..., F]`` to a target ``[..., F]`` at positions."""
        standard = (features - target) / self.std[positions.clamp(max=1)]
        if self.is_sparse:
            standard = where_kept(standard, target, self.features, self.power)
        if not self.left_out.shape[2]:
            return self.noise_kind.residual(standard)
        first, later = (size_of(standard, directions) for directions in self.left_out)
        return torch.where(positions == 0, first, later)

    def passes(self, residuals: Tensor, positions: Tensor) -> Tensor:
        """Whether residuals ``[...]`` at positions ``[...]`` are those of a right token.

        Rivals decide whether such a token is verified: see ``apart``. A threshold of 0 passes
        nothing, and neither does an infinite one.
        """
        limit = self.limit(positions)
        return (residuals <= limit) & (limit > 0) & limit.isfinite()

    def limit(self, positions: Tensor) -> Tensor:
        """The residual ``[...]`` up to which a token at positions ``[...]`` passes."""
        limits = torch.where(self.noisy > 0, self.plausible, self.threshold)
        if self.is_too_sparse:
            limits = torch.zeros_like(limits)
        return limits[positions.clamp(max=1)]

    def apart(
        self, residuals: Tensor, rivals: Tensor, positions: Tensor, vocabulary: int
    ) -> Tensor:
        """Whether tokens that pass are apart from the nearest of their rivals.

        Without noise, a rival's residual must be beyond what may be a right token's, and at least
        1.5 times the token's own. A residual that rounding does not explain may come from noise of
        unknown std, under which the token is ``(rival / residual) ** F`` times as likely as the
        rival, at the best std for each: with few features the rival must be farther. With told
        noise, the chance that any other token is right is bounded by 1e-6; see ``risk``.

        Args:
            residuals: ``[R]`` of the tokens.
            rivals: ``[R]`` the smallest of other tokens.
            positions: ``[R]``.
            vocabulary: how many tokens there are.
        """
        kind = positions.clamp(max=1)
        explained, bar = self.bar(residuals, positions, vocabulary)
        farther = max(CLEARANCE, (vocabulary / RISK) ** (1 / self.features))
        times = torch.where(explained, CLEARANCE, farther)
        clear = (rivals > bar) & (rivals >= times * residuals)
        unlikely = self.risk(residuals, rivals, positions, vocabulary) <= RISK
        return torch.where(self.noisy[kind] > 0, unlikely, clear)

    def bar(self, residuals: Tensor, positions: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
        """Whether rounding explains residuals ``[R]``, and what a rival's must be beyond then."""
        kind = positions.clamp(max=1)
        explained = residuals <= self.rounding[kind]
        right = self._right(residuals, kind, vocabulary)
        return explained, torch.where(explained, right, self.threshold[kind])

    def _right(self, residuals: Tensor, kind: Tensor, vocabulary: int) -> Tensor:
        """The residual ``[R]`` of the right token at most, where another one has ``residuals``.

        It is within what rounding gives. A low precision errs by much, and in many directions: if
        the right token's residual was unusual and several times as large as the other's, its error
        would have to point at the other token. For each token there is a chance of
        ``times ** -freedom`` for that.
        """
        if not self.left_out.shape[2]:
            return self.rounding[kind]
        times = (vocabulary / RISK) ** (1 / self.freedom[kind])
        return torch.maximum(times * residuals, self.right[kind]).minimum(self.rounding[kind])

    def risk(self, residuals: Tensor, rivals: Tensor, positions: Tensor, vocabulary: int) -> Tensor:
        """A bound ``[R]`` for the chance that another token is right, under told noise.

        Every token of the vocabulary counts as if it was as near as the best rival.
        """
        likelier = self.likelier(residuals, rivals, positions)
        return (vocabulary * (-likelier.clamp(0, 700)).exp()).clamp(max=1.0)

    def summed_risk(self, residuals: Tensor, others: Tensor, positions: Tensor) -> Tensor:
        """The same where all that may be right are among the others ``[R, K]``; see ``risk``."""
        likelier = self.likelier(residuals[:, None], others, positions[:, None])
        return (-likelier.clamp(0, 700)).exp().sum(1)

    def likelier(self, residuals: Tensor, rivals: Tensor, positions: Tensor) -> Tensor:
        """The log of how many times as likely a token is as its rival, at least, under told noise.

        If the rival is right, its exponential has a mean of at most 1 (Hoelder's inequality, as
        rounding makes a feature count for less than the noise alone would).
        """
        kind = positions.clamp(max=1)
        times = self.noise_kind.likelier(residuals, rivals)
        return self.noisy[kind] * times - self.flattened[kind]

    def within(self, residuals: Tensor, positions: Tensor, vocabulary: int) -> Tensor:
        """The distance ``[R]`` of embeddings up to which another token may be the right one.

        Where rounding explains the residuals ``[R]`` of tokens, it explains that of the right one
        too: the features of the two are no farther apart than both residuals together.
        """
        kind = positions.clamp(max=1)
        both = (residuals + self._right(residuals, kind, vocabulary)) / self.gain[kind]
        explained = residuals <= self.rounding[kind]
        return torch.where(explained, both.minimum(self.radius[kind]), self.radius[kind])

    def no_token(self, target: Tensor, positions: Tensor) -> Tensor:
        """The residual ``[R]`` that a rival would have which explains the target by its size alone.

        Under told noise a token with small features may pass for a target that is not of this
        model. So the token must also be likelier than the mean feature, under noise of the
        likeliest std for the target ``[R, F]``. Infinite without noise.
        """
        kind = positions.clamp(max=1)
        residuals = self.noise_kind.of_any_size(self.residual(self.mean[kind], target, positions))
        return torch.where(self.noisy[kind] > 0, residuals, torch.inf)

    def unseen(self, residuals: Tensor, positions: Tensor, vocabulary: int) -> Tensor:
        """How many of the tokens that were not run have residuals as small as ``[R]``, expected.

        Random tokens get rare towards the target as a power of the residual; the power is the
        dimension of their features, and low where few features are kept. What rounding explains
        counts as equally small, but for a low precision with many features, whose errors are large.
        """
        kind = positions.clamp(max=1)
        _, bar = self.bar(residuals, positions, vocabulary)
        small = residuals if self.left_out.shape[2] else bar
        share = (small / self.common[kind]).clamp(max=1.0) ** self.dimension[kind]
        return vocabulary * NEAREST_SHARE * torch.where(self.noisy[kind] > 0, 0.0, share)

    # -- measuring ---------------------------------------------------------------------------

    @classmethod
    def measure(
        cls,
        transformer: TruncatedTransformer,
        probe: LinearProbe,
        channel: Channel | None = None,
        text: Tensor | None = None,
        runs: HeldOutRuns | None = None,
    ) -> Calibration:
        """Run held-out prompts; decide by their residuals.

        Args:
            transformer: the frozen model.
            probe: for the std of each feature.
            channel: what has happened to the targets.
            text: ``[N, T]`` ids of text to use beside random tokens.
            runs: of the prompts, where they were run before.
        """
        stored = Tensor.clone if channel is None else channel.without_noise
        runs = runs or HeldOutRuns.measure(transformer, text)
        F = transformer.feature_size
        sparse = channel is not None and channel.largest < 1
        kept = kept_features(_COUNTED * channel.largest, F) if channel and sparse else F
        kinds = HeldOut.measure(transformer, probe, stored, runs, kept)
        parts = [_thresholds(kind) for kind in kinds]
        measured: dict[str, Any] = {
            name: torch.stack([parts[0][name], parts[-1][name]]) for name in parts[0]
        }
        measured["freedom"] = (measured["freedom"] * kept / F).clamp_min(1.0)
        calibration = cls(mean=probe.mean, std=probe.std, features=kept, **measured)
        if channel is None or not channel.noise:
            return calibration
        return _with_noise(calibration, channel, transformer.embedding.vocabulary_size)


def _thresholds(held_out: HeldOut) -> dict[str, Tensor]:
    """Thresholds for one kind of position; see the attributes of ``Calibration``."""
    right, wrong, gains = held_out.right, held_out.wrong, held_out.gains
    right, zero = right[right.isfinite()], right.new_zeros(())
    largest = right.max() if len(right) else zero + torch.inf
    usual = (_quantile(right, 1 - _ODD) if len(right) else largest).clamp_min(1e-9)
    nearest = wrong.median() if len(wrong) else zero
    able = (nearest > CLEARANCE * usual) & nearest.isfinite()
    threshold = torch.where(able, (usual * nearest).sqrt(), zero)
    gain = (_quantile(gains, _ODD) / 2 if len(gains) else zero).clamp_min(1e-30)
    dimension, common = min(
        (rarity(held_out.drawn), rarity_around_each(held_out.drawn)),
        key=lambda pair: float(pair[0] * (threshold / pair[1]).log()),
    )
    return {
        "left_out": held_out.left_out,
        "freedom": held_out.freedom,
        "rounding": torch.minimum(_SAFETY * largest.clamp_min(1e-9), threshold),
        "threshold": threshold,
        "plausible": torch.maximum(threshold, 1.2 * largest),
        "right": usual,
        "wrong": nearest,
        "radius": (threshold + largest) / gain,
        "gain": gain,
        "dimension": dimension,
        "common": common,
        "noisy": zero,
        "flattened": zero,
        "hidden": torch.zeros_like(zero, dtype=torch.bool),
    }


def _quantile(values: Tensor, share: float) -> Tensor:
    """Unlike ``torch.quantile`` without interpolation, and with infinite values."""
    ordered = values.sort().values
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def _with_noise(calibration: Calibration, channel: Channel, vocabulary: int) -> Calibration:
    """The calibration in std of told noise, the rounding's share in it taken off."""
    noise, kind = channel.noise, NOISE[channel.noise_kind]
    rounding = calibration.right[:, None] * calibration.std
    std = (noise**2 + rounding.square()).sqrt()
    F, zero = calibration.features, torch.zeros_like(calibration.threshold)
    largest = kind.largest(F)
    # A token that was not compared, whose features are nearer than this, could be the right one.
    apart = calibration.wrong * calibration.std.median(dim=1).values / noise
    able = F * kind.separation(apart[:, None]) > kind.reach(F, largest, math.log(vocabulary / RISK))
    return replace(
        calibration,
        std=std,
        left_out=calibration.left_out[:, :, :0],
        rounding=zero,
        threshold=zero,
        plausible=torch.full_like(zero, largest),
        right=torch.ones_like(zero),
        radius=zero,
        # Of sparse features the kept ones may be those that are rounded most.
        noisy=(noise**2 / std.square()).topk(F, largest=False).values.sum(-1),
        flattened=kind.flattened(noise, rounding.topk(F).values),
        hidden=~able,
        power=kind.power,
    )
