"""``Calibration``: when a residual verifies a token, measured for a model, depth and channel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lightning_inversion.progress import counted
from lightning_inversion.transformer.blocks import most_positions
from lightning_inversion.transformer.embedding import best_tokens
from lightning_inversion.transformer.linear_probe import LinearProbe
from lightning_inversion.transformer.prefix import KnownPrefix
from lightning_inversion.transformer.rounding import rounded_differently
from lightning_inversion.transformer.truncated import TruncatedTransformer

CLEARANCE = 1.5
"""How many times the residual of a verified token that of every rival must be."""
RISK = 1e-6
"""The largest chance that a verified token is another one, where a chance can be given."""
_PROMPTS = 16
_LENGTH = 12
_FIRST = 128
"""More first tokens, for the errors of rounding there."""
_LEFT_OUT = 16
"""Directions that residuals leave out at most, of those in which a low precision errs."""
_COARSE = 1e-5
"""Types whose epsilon is larger are of low precision."""
_NEIGHBOURS = 15
_RANDOM = 16
_ROUNDINGS = 2
"""Draws of another rounding."""
_SAFETY = 3.0
"""How many times the largest residual of a right token another machine may have."""
_ODD = 0.01
"""Share of the held-out tokens that may be odd: they move no threshold."""
_NEAREST_SHARE = 0.05
"""Share of the random tokens, the nearest ones, whose residuals show how fast they get rare."""
_NEAREST = 4
"""Of a target's own random tokens the nearest ones, which show how fast tokens get rare there."""


class Channel(Protocol):
    """What happens to features on their way to the target."""

    @property
    def noise(self) -> float:
        """Standard deviation of Gaussian noise, in the features' own units."""

    def without_noise(self, features: Tensor) -> Tensor:
        """Features ``[..., F]`` after all else that happens, such as rounding."""


@dataclass(frozen=True)
class Calibration:
    """Residuals of right and wrong tokens, measured on held-out prompts; the thresholds between.

    A residual is the root mean square over the features of their difference in std of each feature
    over random tokens: 1 is about the distance of another token. Unlike a difference relative to
    the norm, it is not dominated by a few massive activations. Where the channel adds noise, it is
    in std of the noise instead, and a right token's is about 1.

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
        noisy: ``[2]`` how many features' worth of told noise there is; 0 without noise, and where
            the noise is so strong that tokens which are not compared could pass for the target.
        told: ``[2]`` the same, however strong the noise is.
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
    told: Tensor

    def comparing_all(self) -> Calibration:
        """The calibration where a token is compared with the whole vocabulary.

        No token is left that could pass for the target unseen, however strong told noise is.
        """
        return replace(self, noisy=self.told)

    @property
    def verifies(self) -> bool:
        """Whether tokens can be verified at every position."""
        return bool(((self.threshold > 0) | (self.noisy > 0)).all())

    @property
    def has_noise(self) -> bool:
        """Whether the channel adds noise, under which tokens are verified with a probability."""
        return bool((self.noisy > 0).any())

    def residual(self, features: Tensor, target: Tensor, positions: Tensor) -> Tensor:
        """Residual ``[...]`` of features ``[..., F]`` to a target ``[..., F]`` at positions."""
        standard = (features - target) / self.std[positions.clamp(max=1)]
        if not self.left_out.shape[2]:
            return _size(standard)
        first, later = (_size(standard, directions) for directions in self.left_out)
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
        return limits[positions.clamp(max=1)]

    def apart(
        self, residuals: Tensor, rivals: Tensor, positions: Tensor, vocabulary: int
    ) -> Tensor:
        """Whether tokens that pass are apart from the nearest of their rivals.

        Without noise, a rival's residual must be beyond what may be a right token's, and at least
        1.5 times the token's own. A residual that rounding does not explain may come from noise of
        unknown std, under which the token is ``(rival / residual) ** F`` times as likely as the
        rival, at the best std for each: with few features the rival must be farther. With told
        Gaussian noise, the chance that any other token is right is bounded by 1e-6; see ``risk``.

        Args:
            residuals: ``[R]`` of the tokens.
            rivals: ``[R]`` the smallest of other tokens.
            positions: ``[R]``.
            vocabulary: how many tokens there are.
        """
        kind = positions.clamp(max=1)
        explained, bar = self._bar(residuals, kind, vocabulary)
        farther = max(CLEARANCE, (vocabulary / RISK) ** (1 / self.std.shape[1]))
        times = torch.where(explained, CLEARANCE, farther)
        clear = (rivals > bar) & (rivals >= times * residuals)
        likelier = self._likelier(residuals, rivals, positions) >= math.log(vocabulary / RISK)
        return torch.where(self.noisy[kind] > 0, likelier, clear)

    def _bar(self, residuals: Tensor, kind: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
        """Whether rounding explains residuals ``[R]``, and what a rival's must be beyond then."""
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

    def risk(self, residual: Tensor, rival: Tensor, position: Tensor, vocabulary: int) -> float:
        """A bound for the chance that another token is right, under told noise.

        Every token of the vocabulary counts as if it was as near as the best rival.
        """
        likelier = float(self._likelier(residual, rival, position))
        return min(1.0, vocabulary * math.exp(-min(max(likelier, 0.0), 700.0)))

    def _likelier(self, residuals: Tensor, rivals: Tensor, positions: Tensor) -> Tensor:
        """The log of how many times as likely a token is as its rival, under Gaussian noise."""
        noisy = self.noisy[positions.clamp(max=1)]
        return noisy / 2 * (rivals.square() - residuals.square())

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
        model. So the token must also be likelier than a Gaussian about the mean feature with the
        variance that the target ``[R, F]`` has. Infinite without noise.
        """
        kind = positions.clamp(max=1)
        power = ((target - self.mean[kind]) / self.std[kind]).square().mean(-1)
        residual = (1 + power.clamp_min(1e-30).log()).clamp_min(0).sqrt()
        return torch.where(self.noisy[kind] > 0, residual, torch.inf)

    def unseen(self, residuals: Tensor, positions: Tensor, vocabulary: int) -> Tensor:
        """How many of the tokens that were not run have residuals as small as ``[R]``, expected.

        Random tokens get rare towards the target as a power of the residual; the power is the
        dimension of their features, and low where few features are kept. What rounding explains
        counts as equally small, but for a low precision with many features, whose errors are large.
        """
        kind = positions.clamp(max=1)
        _, bar = self._bar(residuals, kind, vocabulary)
        small = residuals if self.left_out.shape[2] else bar
        share = (small / self.common[kind]).clamp(max=1.0) ** self.dimension[kind]
        return vocabulary * _NEAREST_SHARE * torch.where(self.noisy[kind] > 0, 0.0, share)

    # -- measuring ---------------------------------------------------------------------------

    @classmethod
    @torch.no_grad()
    def measure(
        cls,
        transformer: TruncatedTransformer,
        probe: LinearProbe,
        channel: Channel | None = None,
        text: Tensor | None = None,
        seed: int = 1,
    ) -> Calibration:
        """Run held-out prompts whole, with other roundings, and token by token.

        A model that is not causal runs them whole twice, alone and beside others.

        Args:
            transformer: the frozen model.
            probe: for the std of each feature.
            channel: what has happened to the targets.
            text: ``[N, T]`` ids of text to use beside random tokens.
            seed: of the random tokens and roundings.
        """
        ids = _held_out(transformer, text, seed)
        runs = (_roundings(transformer, _first_tokens(transformer, seed), seed),
                _roundings(transformer, ids, seed))  # fmt: skip
        errors = [
            ((run[1:] - run[:1])[:, :, kind:] / probe.std[kind]).flatten(0, 2).nan_to_num(0, 0, 0)
            for kind, run in enumerate(runs)
        ]
        left_out = torch.stack([_most_erring(some, transformer.dtype) for some in errors])
        first, targets = (run if channel is None else channel.without_noise(run) for run in runs)
        right: tuple[list[Tensor], list[Tensor]] = ([], [])
        wrong: tuple[list[Tensor], list[Tensor]] = ([], [])
        drawn: tuple[list[Tensor], list[Tensor]] = ([], [])
        gains: tuple[list[Tensor], list[Tensor]] = ([], [])
        right[0].append(_size((runs[0][:1] - first) / probe.std[0], left_out[0]))
        first_duplicate = transformer.embedding.first_duplicate.to(ids.device)
        for position, candidates, features in _runs(transformer, ids, seed):
            kind = min(position, 1)
            difference = (features - targets[:, :, position, None]) / probe.std[kind]
            residuals = _size(difference, left_out[kind])
            right[kind].append(residuals[:, :, 0])
            others = residuals[0, :, 1:]
            # A duplicate of the right token is not wrong: nothing distinguishes the two.
            same = first_duplicate[candidates[:, 1:]] == first_duplicate[candidates[:, :1]]
            known = ~same & others.isfinite()
            vectors = transformer.embedding(candidates)
            distances = (vectors[:, 1:] - vectors[:, :1]).norm(dim=-1)
            wrong[kind].append(others.masked_fill(~known, torch.inf).amin(1))
            # Tokens that are nearly alike are always compared; rounding decides their residuals.
            usual = transformer.embedding.std * transformer.embedding.width**0.5
            apart = known & (distances > 0.05 * usual)
            drawn[kind].append(others[:, -_RANDOM:].masked_fill(~apart[:, -_RANDOM:], torch.inf))
            gains[kind].append((others / distances)[apart])
        parts = [
            _thresholds(
                torch.cat([one.flatten() for one in right[kind]]),
                torch.cat(wrong[kind]),
                torch.cat(drawn[kind]),
                torch.cat(gains[kind]),
            )
            for kind in (0, 1)
        ]
        measured = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        freedom = torch.stack([_freedom(*some) for some in zip(errors, left_out, strict=True)])
        calibration = cls(
            mean=probe.mean, std=probe.std, left_out=left_out, freedom=freedom, **measured
        )
        return _with_noise(calibration, 0.0 if channel is None else channel.noise)


def _size(standard: Tensor, left_out: Tensor | None = None) -> Tensor:
    """Root mean square ``[...]`` of differences ``[..., F]``, without directions ``[F, K]``."""
    squares = standard.square().mean(-1)
    if left_out is not None and left_out.shape[1]:
        along = (standard @ left_out).square().sum(-1) / standard.shape[-1]
        squares = (squares - along).clamp_min(0)
    size: Tensor = squares.sqrt()
    return size


def _most_erring(errors: Tensor, dtype: torch.dtype) -> Tensor:
    """The directions ``[F, K]`` of most of the errors ``[N, F]`` of a low precision, else none.

    A massive activation that is rounded errs far more in a few directions than in the others.
    """
    F = errors.shape[1]
    count = min(_LEFT_OUT, F // 32) if torch.finfo(dtype).eps > _COARSE else 0
    if not count:
        return errors.new_zeros(F, 0)
    axes: Tensor = torch.linalg.eigh((errors.T @ errors).double()).eigenvectors
    return axes[:, -count:].to(errors.dtype)


def _freedom(errors: Tensor, left_out: Tensor) -> Tensor:
    """Half the participation ratio of the directions of errors ``[N, F]``, at least 1."""
    errors = errors - (errors @ left_out) @ left_out.T
    directions = errors / errors.norm(dim=1, keepdim=True).clamp_min(1e-30)
    products = directions @ directions.T
    ratio: Tensor = products.trace().square() / products.square().sum().clamp_min(1e-30)
    return (ratio / 2).clamp_min(1.0)


def _thresholds(right: Tensor, wrong: Tensor, drawn: Tensor, gains: Tensor) -> dict[str, Tensor]:
    """Thresholds for one kind of position; see the attributes of ``Calibration``.

    Args:
        right: residuals of right tokens.
        wrong: the smallest residual of a wrong token beside each right one.
        drawn: residuals of random tokens, a row for each target; infinite for others.
        gains: residuals of wrong tokens divided by the distance of their embeddings.
    """
    right, zero = right[right.isfinite()], right.new_zeros(())
    largest = right.max() if len(right) else zero + torch.inf
    usual = (_quantile(right, 1 - _ODD) if len(right) else largest).clamp_min(1e-9)
    nearest = wrong.median() if len(wrong) else zero
    able = (nearest > CLEARANCE * usual) & nearest.isfinite()
    threshold = torch.where(able, (usual * nearest).sqrt(), zero)
    gain = (_quantile(gains, _ODD) / 2 if len(gains) else zero).clamp_min(1e-30)
    dimension, common = min(
        (_rarity(drawn), _rarity_around_each(drawn)),
        key=lambda pair: float(pair[0] * (threshold / pair[1]).log()),
    )
    return {
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
        "told": zero,
    }


def _quantile(values: Tensor, share: float) -> Tensor:
    """Unlike ``torch.quantile`` without interpolation, and with infinite values."""
    ordered = values.sort().values
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def _rarity(residuals: Tensor) -> tuple[Tensor, Tensor]:
    """By which power random tokens get rare near the target, and from which residual on.

    Hill's estimator of the lower tail (Hill 1975), the local intrinsic dimension.
    """
    finite = residuals[residuals.isfinite()]
    if not len(finite):
        return residuals.new_zeros(()), residuals.new_full((), 1e-30)
    nearest = finite.sort().values[: max(2, round(_NEAREST_SHARE * len(finite)))].double()
    common = nearest[-1].clamp_min(1e-30)
    return _power(common, nearest).to(residuals), common.to(residuals)


def _rarity_around_each(residuals: Tensor) -> tuple[Tensor, Tensor]:
    """The same from the nearest random tokens of each target ``[N, K]`` alone.

    Where tokens of some targets lie closer together, as keys and values of positions that take
    the attention do, all residuals together look like those of few dimensions. The estimates of
    all targets are averaged (Levina and Bickel 2004, by MacKay and Ghahramani's mean), and the
    closest target gives the residual.
    """
    nearest = residuals.sort(dim=1).values[:, :_NEAREST].double()
    nearest = nearest[nearest[:, -1].isfinite()]
    if not nearest.numel():
        return residuals.new_zeros(()), residuals.new_full((), 1e-30)
    farthest = nearest[:, -1:].clamp_min(1e-30)
    power = _power(farthest, nearest[:, :-1])
    share = (_NEAREST / residuals.shape[1] / _NEAREST_SHARE) ** (-1 / float(power))
    return power.to(residuals), (farthest.min() * share).to(residuals)


def _power(common: Tensor, nearest: Tensor) -> Tensor:
    """The power by which residuals get rare below ``common``, by the mean of their logs."""
    return 1 / (common / nearest.clamp_min(1e-30)).log().mean().clamp_min(1e-3)


def _with_noise(calibration: Calibration, noise: float) -> Calibration:
    """The calibration in std of told noise, the rounding's share in it taken off."""
    if not noise:
        return calibration
    rounding = calibration.right[:, None] * calibration.std
    std = (noise**2 + rounding.square()).sqrt()
    F = std.shape[1]
    # A token that was not compared, whose features are nearer than this, could be the right one.
    apart = calibration.wrong * calibration.std.median(dim=1).values / noise
    able = apart > _reach_of_noise(F)
    told = (noise**2 / std.square()).sum(-1)
    return Calibration(
        mean=calibration.mean,
        std=std,
        left_out=calibration.left_out[:, :, :0],
        rounding=torch.zeros_like(calibration.rounding),
        threshold=torch.zeros_like(calibration.threshold),
        plausible=torch.full_like(calibration.plausible, _largest_residual_of_noise(F)),
        right=torch.ones_like(calibration.right),
        wrong=calibration.wrong,
        radius=torch.zeros_like(calibration.radius),
        gain=calibration.gain,
        freedom=calibration.freedom,
        dimension=calibration.dimension,
        common=calibration.common,
        noisy=torch.where(able, told, 0.0),
        told=told,
    )


def _largest_residual_of_noise(features: int) -> float:
    """What the root mean square of so many standard normal numbers exceeds once in ten thousand.

    Wilson and Hilferty's approximation of the chi-squared distribution.
    """
    error = 2 / (9 * features)
    return float((1 - error + 3.72 * error**0.5) ** 1.5)


def _reach_of_noise(features: int) -> float:
    """How far a wrong token's features may be, in std of the noise, and still pass for the target.

    The distance d adds d^2 to the mean square of the residual, give or take 2 d / sqrt(F), and the
    noise's own mean square varies by sqrt(2 / F); each may be off as far as once in ten thousand.
    """
    varies = 3.72 / math.sqrt(features)
    allowed = _largest_residual_of_noise(features) ** 2 - 1 + varies * math.sqrt(2)
    return varies + math.sqrt(varies**2 + allowed)


def _roundings(transformer: TruncatedTransformer, ids: Tensor, seed: int) -> Tensor:
    """Features ``[1 + roundings, N, T, F]``: as the model rounds, then as others might."""
    runs = [transformer.features_of(ids)]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(_ROUNDINGS):
        with rounded_differently(transformer, generator):
            runs.append(transformer.features_of(ids))
    return torch.stack(runs)


def _runs(
    transformer: TruncatedTransformer, ids: Tensor, seed: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each position, candidates ``[N, K]``, the right one first, and features ``[N, K, F]``."""
    rows = torch.arange(len(ids), device=ids.device)
    prefix = KnownPrefix(transformer, len(ids))
    # Without a causal mask each candidate takes a forward of its own: fewer positions must do.
    positions = range(0, ids.shape[1], 1 if transformer.causal else _LENGTH // 2)
    for position in counted(positions, "calibrating thresholds"):
        candidates = _right_and_wrong(transformer, ids[:, position], seed + position)
        if transformer.causal:
            features = prefix.candidates(rows, transformer.embedding(candidates))
            prefix.keep(rows, torch.zeros_like(rows))
        else:
            features = _in_context(transformer, ids, position, candidates)
        yield position, candidates, features


def _held_out(transformer: TruncatedTransformer, text: Tensor | None, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = transformer.embedding.vocabulary_size
    length = min(_LENGTH, most_positions(transformer.model.config) or _LENGTH)
    ids = torch.randint(vocabulary, (_PROMPTS, length), generator=generator)
    if text is not None and text.shape[1] >= length:
        half = min(_PROMPTS // 2, len(text))
        ids[:half] = text[-half:, -length:].cpu()
    return ids.to(transformer.device)


def _first_tokens(transformer: TruncatedTransformer, seed: int) -> Tensor:
    """Prompts ``[N, 1]`` of a random token each: position 0 has one token in each other prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(transformer.embedding.vocabulary_size, (_FIRST, 1), generator=generator)
    return ids.to(transformer.device)


def _in_context(
    transformer: TruncatedTransformer, ids: Tensor, position: int, candidates: Tensor
) -> Tensor:
    """Features ``[N, K, F]`` at a position with each of ``candidates`` [N, K] in the prompt."""
    prompts = ids[:, None].repeat(1, candidates.shape[1], 1)
    prompts[:, :, position] = candidates
    return torch.stack([transformer.features_of(some)[:, position] for some in prompts])


def _right_and_wrong(transformer: TruncatedTransformer, right: Tensor, seed: int) -> Tensor:
    """The right token, its nearest neighbours, and random tokens, ``[R, 1 + 15 + 16]``."""
    embedding = transformer.embedding
    near = embedding.dot(embedding(right)) - embedding.norms.square() / 2
    count = min(_NEIGHBOURS, embedding.vocabulary_size - 1)
    near.scatter_(1, right[:, None], -torch.inf)
    neighbours = best_tokens(near, count).indices
    generator = torch.Generator().manual_seed(seed)
    size = (len(right), _RANDOM)
    random = torch.randint(embedding.vocabulary_size, size, generator=generator)
    return torch.cat([right[:, None], neighbours, random.to(right.device)], dim=1)
