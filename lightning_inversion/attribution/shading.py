"""Raw scores -> strengths -> colours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_inversion.attribution.config import Display, Palette

Colour = tuple[int, int, int]

BLACK, WHITE = (0, 0, 0), (255, 255, 255)
LIGHT_PAGE, DARK_PAGE = (255, 255, 255), (22, 24, 29)
_RED, _BLUE = (214, 40, 40), (33, 102, 172)
_ORIGINAL = 110
"""The source's `red, green, blue = int(score * 255), 110, 110`."""


def strengths(scores: Tensor, display: Display) -> Tensor:
    """Raw scores [T] -> [T] in [-1, 1]: 1 is the strongest colour, NaN is not coloured.

    Args:
        scores: raw; NaN stays.
        display: the normalisation, the scale, and whether the first or last token is left out.
    """
    shown = scores.double().clone()
    finite = shown.isfinite()
    for left_out, end in ((display.leave_out_first, 0), (display.leave_out_last, -1)):
        if left_out and int(finite.sum()) > 1:
            shown[int(finite.nonzero()[end])] = torch.nan
            finite = shown.isfinite()
    if not finite.any():
        return shown
    values = shown[finite]
    if display.scale == "rank":
        values = _ranks(values)
    else:
        if display.normalise == "minmax":
            values = values - values.min()
        values = values / values.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    if display.scale == "sqrt":
        values = values.sign() * values.abs().sqrt()
    shown[finite] = values
    return shown


def _ranks(values: Tensor) -> Tensor:
    """The rank of each size among the sizes, in (0, 1], with its sign; equal sizes share a rank."""
    sizes, rank = torch.unique(values.abs(), return_inverse=True)
    ranks: Tensor = (rank + 1) / len(sizes) * values.sign()
    return ranks


@dataclass(frozen=True)
class Shade:
    """A background, and black or white ink that contrasts with it."""

    background: Colour
    ink: Colour

    @classmethod
    def of(cls, strength: float, palette: Palette, page: Colour) -> Shade:
        """The shade of a strength from -1 to 1, on a page of the given colour."""
        if palette == "original":
            red = round(max(0.0, strength) * 255)
            background = (red, _ORIGINAL, _ORIGINAL)
        else:
            background = _between(page, _RED if strength >= 0 else _BLUE, min(1.0, abs(strength)))
        return cls(background, ink_on(background))


def _between(first: Colour, second: Colour, part: float) -> Colour:
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(first, second, strict=True))
    return red, green, blue


def ink_on(background: Colour) -> Colour:
    """Black or white, whichever contrasts more: never less than 4.58 to 1."""
    return max(BLACK, WHITE, key=lambda ink: contrast(ink, background))


def contrast(first: Colour, second: Colour) -> float:
    """The contrast ratio of WCAG 2, from 1 to 21."""
    light, dark = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: Colour) -> float:
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (channel / 255 for channel in colour)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def hexadecimal(colour: Colour) -> str:
    """A colour as '#rrggbb'."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def legend_stops(display: Display, signed: bool, page: Colour, count: int = 9) -> list[Colour]:
    """Colours from the lowest strength to the highest."""
    lowest = -1.0 if signed and display.palette != "original" else 0.0
    return [
        Shade.of(lowest + (1 - lowest) * step / (count - 1), display.palette, page).background
        for step in range(count)
    ]
