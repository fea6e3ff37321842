"""The coloured text on a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.style import Style
from rich.text import Text

from lightning_inversion.attribution.result import AttributionResult
from lightning_inversion.attribution.shading import (
    DARK_PAGE,
    Shade,
    hexadecimal,
    legend_stops,
    strengths,
)
from lightning_inversion.files import one_line, visible


def lines(result: AttributionResult) -> Iterator[Text]:
    """The text, its prediction, the legend, and what the scores are."""
    yield coloured_text(result)
    if result.predictions:
        best = result.predictions[0]
        yield Text(f"predicted next token: {one_line(best.text)} ({best.probability:.1%})")
    yield _legend(result)
    yield Text(f"{result.target}: {result.quantity}", style="dim")
    for note in result.notes:
        yield Text(note, style="dim")


def coloured_text(result: AttributionResult) -> Text:
    """Each piece on the colour of the strongest of its tokens."""
    shown = strengths(result.token_scores, result.look).tolist()
    text = Text()
    for piece in result.pieces:
        strength = max((shown[token] for token in piece.tokens), key=_size)
        text.append(visible(piece.text), style=_style(strength, result))
    return text


def _size(strength: float) -> float:
    return -1.0 if math.isnan(strength) else abs(strength)


def _style(strength: float, result: AttributionResult) -> Style:
    if math.isnan(strength):
        return Style(underline=True)
    shade = Shade.of(strength, result.look.palette, DARK_PAGE)
    return Style(color=hexadecimal(shade.ink), bgcolor=hexadecimal(shade.background))


def _legend(result: AttributionResult) -> Text:
    lowest, highest = result.ends
    text = Text(f"{lowest} ")
    for colour in legend_stops(result.look, result.signed, DARK_PAGE):
        text.append("  ", style=Style(bgcolor=hexadecimal(colour)))
    return text.append(f" {highest}")
