"""``NoiseKind``: Gaussian or Laplace noise, and what residuals mean under it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

NoiseName = Literal["gaussian", "laplace"]


@dataclass(frozen=True)
class NoiseKind:
    """Independent noise in each feature, of the density ``exp(-|x / unit| ** power / power)``.

    Its likelihood depends on the mean of ``|x / unit| ** power`` over the features alone. The root
    of that mean is the residual, and is about 1 for the noise itself.

    Attributes:
        power: 2 for Gaussian noise, 1 for Laplace noise.
    """

    power: int

    @property
    def unit(self) -> float:
        """The unit of the density, in std of the noise."""
        return 1.0 if self.power == 2 else math.sqrt(0.5)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Noise of std 1, drawn on the CPU, so that it does not depend on the device."""
        if self.power == 2:
            return torch.randn(shape, generator=generator)
        up, down = torch.empty(2, *shape).exponential_(generator=generator)
        return torch.sub(up, down) * self.unit

    def residual(self, standard: Tensor) -> Tensor:
        """Residual ``[...]`` of differences ``[..., F]`` in std of the noise."""
        if self.power == 2:
            return torch.sqrt(standard.square().mean(-1))
        return torch.div(standard.abs().mean(-1), self.unit)

    def likelier(self, residuals: Tensor, rivals: Tensor) -> Tensor:
        """The log of how many times as likely one residual is as another, for each feature.

        A residual above 1 counts as the std of the noise, which then was told too small.
        """
        own = residuals**self.power
        return (rivals**self.power - own) / (self.power * own.clamp(min=1.0))

    def of_any_size(self, residuals: Tensor) -> Tensor:
        """The residual that is as likely as these are under noise of the likeliest std."""
        log = residuals.clamp_min(1e-15).log()
        return (1 + self.power * log).clamp_min(0) ** (1 / self.power)

    def largest(self, features: int) -> float:
        """The residual that noise of so many features exceeds once in ten thousand.

        Wilson and Hilferty's approximation of the chi-squared distribution, of ``2 F / power``
        degrees of freedom.
        """
        error = self.power / (9 * features)
        return float((1 - error + 3.72 * error**0.5) ** (3 / self.power))

    def flattened(self, noise: float, rounding: Tensor) -> Tensor:
        """The log ``[...]`` of how much likelier noise with rounding is than noise of that std.

        At most, for errors of rounding ``[..., F]`` in std, which are symmetric, and noise of the
        std of both together. Two Gaussians add up to one. A Laplace density is at most
        ``E exp(error / unit)`` times as large after rounding: where errors are small, their
        variance in the noise's; where they are large, the ratio of the units and a little more.
        """
        if self.power == 2:
            return torch.zeros_like(rounding[..., 0])
        variance = noise**2 + rounding.square()
        share = rounding.square() / variance
        return ((variance / noise**2).log() / 2 + 2 * share).sum(-1)

    def separation(self, standard: Tensor) -> Tensor:
        """How far apart ``[...]`` two tokens are whose features differ by ``[..., F]`` std.

        A sum over the features; see ``reach``.
        """
        if self.power == 2:
            return standard.square().sum(-1)
        size = standard.abs() / self.unit
        return (size.square() / (2 + size)).sum(-1)

    def reach(self, features: int, residual: float, needed: float) -> float:
        """The separation from which on a right token leaves a wrong one so small a residual.

        If a token is right whose features differ from another one's by v, the other one's residual
        is that of noise and v together. Chernoff's bound for its being at most ``residual``, for
        any s > 0: the mean of ``exp(-s |noise + v| ** power)`` is ``(1 + power s) ** (-F / power)``
        without v. Each feature of v makes it smaller, for Gaussian noise by
        ``exp(-s v^2 / (1 + 2 s))``, and for Laplace noise and s up to 1/2 by
        ``exp(-s v^2 / (2 + |v|))`` at least. The separation is the sum of these terms without s.

        Args:
            features: F.
            residual: of the wrong token.
            needed: minus the log of the chance for that.
        """
        s = torch.linspace(0.005, 0.5 if self.power == 1 else 4.0, 800, dtype=torch.float64)
        slope = s / (1 + 2 * s) if self.power == 2 else s
        alone = s * residual**self.power - torch.log1p(self.power * s) / self.power
        return float(((features * alone + needed) / slope).min())


NOISE: dict[NoiseName, NoiseKind] = {"gaussian": NoiseKind(2), "laplace": NoiseKind(1)}
