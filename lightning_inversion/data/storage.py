"""What happens to features between the model and the file that holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from lightning_inversion.errors import InputError
from lightning_inversion.transformer.sparse import keep_largest
from lightning_inversion.verification.noise import NOISE, NoiseName

MOST_NOISE = 1e15
"""Std of noise that can be told; float32 holds the sum of its squares over any features."""


@dataclass(frozen=True)
class Storage:
    """What happens to features between the model and the file.

    The largest are kept, noise is added to these, they are multiplied by a factor, then rounded.

    Args:
        dtype: the type that they are rounded to.
        noise: standard deviation of the noise added, in the features' own units.
        noise_kind: how it is distributed, ``gaussian`` or ``laplace``.
        centred: the mean over the features of each position was subtracted, as TransformerLens
            does; the model itself then gives centred ones (``TruncatedTransformer.centred``).
        scale: the factor that they were multiplied by.
        largest: the share of each position's features that was kept, the largest by size; the
            others are 0.
    """

    dtype: str = "float32"
    noise: float = 0.0
    noise_kind: NoiseName = "gaussian"
    centred: bool = False
    scale: float = 1.0
    largest: float = 1.0

    def check(self, option: str) -> None:
        """Refuse what cannot be.

        Args:
            option: what the names of the options begin with in messages, as ``--data.``.

        Raises:
            InputError: names the option.
        """
        if not 0 <= self.noise <= MOST_NOISE:
            raise InputError(
                f"{option}noise must be between 0 and {MOST_NOISE:.0e}, and is {self.noise}."
            )
        if self.noise_kind not in get_args(NoiseName):
            known = ", ".join(get_args(NoiseName))
            raise InputError(
                f"{option}noise_kind: {self.noise_kind!r} is unknown; choose from {known}."
            )
        if not 0 < self.largest <= 1:
            raise InputError(
                f"{option}largest is a share of the features, above 0 and at most 1, and is "
                f"{self.largest}."
            )
        if not 0 < abs(self.scale) < float("inf"):
            raise InputError(f"{option}scale is a factor other than 0, and is {self.scale}.")

    @property
    def summary(self) -> str | None:
        """What happens to the features, in a few words, but for the centring; None for nothing."""
        parts = {
            f"largest {self.largest:g}": self.largest < 1,
            f"{self.noise_kind} noise {self.noise:g}": self.noise > 0,
            f"times {self.scale:g}": self.scale != 1,
            self.dtype: self.dtype != "float32",
        }
        return ", ".join(part for part, happens in parts.items() if happens) or None

    def __call__(self, features: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Features ``[..., F]`` read back from the file in the model's units, in their own type."""
        kept = keep_largest(features, self.largest)
        if self.noise:
            drawn = NOISE[self.noise_kind].draw(tuple(features.shape), generator)
            noisy = kept + self.noise * drawn.to(kept)
            kept = noisy if kept is features else noisy.masked_fill(kept == 0, 0.0)
        return self._rounded(kept)

    def without_noise(self, features: Tensor) -> Tensor:
        """Features ``[..., F]`` after all but the noise."""
        return self._rounded(keep_largest(features, self.largest))

    def _rounded(self, features: Tensor) -> Tensor:
        return self.read_back((self.scale * features).to(float_type(self.dtype)).to(features))

    def read_back(self, stored: Tensor) -> Tensor:
        """Stored features in the model's units: the factor is divided out."""
        return stored / self.scale if self.scale != 1 else stored


def float_type(name: str) -> torch.dtype:
    """The type of this name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
