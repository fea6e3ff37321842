"""A result as a page of HTML: one file, no script, nothing fetched, everything escaped."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from lightning_inversion.attribution.config import Choices, different
from lightning_inversion.attribution.provenance import TEXT_FILE
from lightning_inversion.attribution.result import AttributionResult, Query
from lightning_inversion.attribution.shading import (
    BLACK,
    DARK_PAGE,
    LIGHT_PAGE,
    Colour,
    Shade,
    hexadecimal,
    legend_stops,
    strengths,
)
from lightning_inversion.files import one_line, visible

# Above this a map of every token has more cells than a browser scrolls smoothly.
MOST_MAP_TOKENS = 160


@dataclass(frozen=True)
class Tile:
    """A piece of text with its colours; one that is made of several tokens has a band for each.

    Args:
        text: what is shown.
        title: the raw scores, for whoever points at it.
        style: the colours, as custom properties of CSS.
        left_out: not coloured on purpose.
    """

    text: str
    title: str
    style: str
    left_out: bool


@dataclass(frozen=True)
class Line:
    """A row of the table of tokens."""

    position: int
    text: str
    id: int
    score: str
    parts: tuple[str, ...]
    style: str


@dataclass(frozen=True)
class MapRow:
    """A row of the map: a prediction, and the colours of the tokens up to it."""

    label: str
    title: str
    cells: tuple[tuple[str, str], ...]


def page(result: AttributionResult) -> str:
    """The whole page."""
    return _template("page.html").render(**_content(result))


def fragment(result: AttributionResult) -> str:
    """What a notebook shows: the text, the prediction and the legend, in an element of its own."""
    return _template("fragment.html").render(**_content(result))


@cache
def _template(name: str) -> Template:
    environment = Environment(
        loader=PackageLoader("lightning_inversion.attribution", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["one_line"] = one_line
    return environment.get_template(name)


def _content(result: AttributionResult) -> dict[str, Any]:
    shown = strengths(result.token_scores, result.look).tolist()
    return {
        "result": result,
        "tiles": _tiles(result, shown),
        "lines": _lines(result, shown),
        "map_rows": _map_rows(result),
        "most_map_tokens": MOST_MAP_TOKENS,
        "legend_light": _legend(result, LIGHT_PAGE),
        "legend_dark": _legend(result, DARK_PAGE),
        "text_in_file": result.command.endswith(f" - < {TEXT_FILE}"),
        "facts": _facts(result),
    }


def _tiles(result: AttributionResult, shown: list[float]) -> list[Tile]:
    tiles = []
    for piece in result.pieces:
        several = len(piece.tokens) > 1
        titles = [
            f"{one_line(piece.text)}  {_raw(result, token)}"
            + (f"  ({part} of {len(piece.tokens)} tokens)" if several else "")
            for part, token in enumerate(piece.tokens, 1)
        ]
        strongest = [shown[token] for token in piece.tokens]
        tiles.append(
            Tile(
                visible(piece.text),
                "\n".join(titles),
                _style(strongest, result),
                all(math.isnan(strength) for strength in strongest),
            )
        )
    return tiles


def _raw(result: AttributionResult, token: int) -> str:
    """The raw scores of a token in words."""
    scores = [f"{float(result.token_scores[token]):.4g}"]
    if len(result.parts) > 1 and len(result.queries) == 1:
        scores += [f"{name} {float(part[0, token]):.4g}" for name, part in result.parts.items()]
    return f"#{token} id {result.ids[token]}: " + ", ".join(scores)


def _lines(result: AttributionResult, shown: list[float]) -> list[Line]:
    texts = result.token_texts
    with_parts = len(result.parts) > 1 and len(result.queries) == 1
    return [
        Line(
            position=token,
            text=one_line(texts[token]) or "(begins the next)",
            id=result.ids[token],
            score=f"{float(result.token_scores[token]):.6g}",
            parts=tuple(f"{float(part[0, token]):.6g}" for part in result.parts.values())
            if with_parts
            else (),
            style=_style([shown[token]], result),
        )
        for token in range(len(result.ids))
    ]


def _map_rows(result: AttributionResult) -> list[MapRow]:
    if len(result.queries) == 1 or len(result.ids) > MOST_MAP_TOKENS:
        return []
    texts = [one_line(text) for text in result.token_texts]
    rows = []
    for row, query in enumerate(result.queries):
        label = _label(query, texts)
        shown = strengths(result.scores[row], result.look).tolist()
        cells = tuple(
            (
                _style([shown[token]], result),
                f"{label} <- {texts[token]}  #{token}: {float(result.scores[row, token]):.4g}",
            )
            for token in range(query.position + 1)
        )
        title = "" if query.probability is None else f"probability {query.probability:.2%}"
        rows.append(MapRow(label, title, cells))
    return rows


def _label(query: Query, texts: list[str]) -> str:
    return texts[query.position] if query.token is None else one_line(query.text)


def _style(strengths_of_tokens: list[float], result: AttributionResult) -> str:
    """Background and ink, on a light page and on a dark one."""
    if all(math.isnan(strength) for strength in strengths_of_tokens):
        return ""
    values = [0.0 if math.isnan(strength) else strength for strength in strengths_of_tokens]
    parts = []
    for theme, page_colour in (("l", LIGHT_PAGE), ("d", DARK_PAGE)):
        shades = [Shade.of(value, result.look.palette, page_colour) for value in values]
        strongest = shades[max(range(len(values)), key=lambda i: abs(values[i]))]
        ink = "#000" if strongest.ink == BLACK else "#fff"
        parts.append(f"--{theme}:{_bands([s.background for s in shades])};--{theme}i:{ink}")
    return ";".join(parts)


def _bands(colours: list[Colour]) -> str:
    if len(colours) == 1:
        return hexadecimal(colours[0])
    share = 100 / len(colours)
    stops = ",".join(
        f"{hexadecimal(colour)} {i * share:.4g}% {(i + 1) * share:.4g}%"
        for i, colour in enumerate(colours)
    )
    return f"linear-gradient(90deg,{stops})"


def _legend(result: AttributionResult, page_colour: Colour) -> str:
    stops = legend_stops(result.look, result.signed, page_colour)
    return f"linear-gradient(90deg,{','.join(hexadecimal(colour) for colour in stops)})"


def _facts(result: AttributionResult) -> list[tuple[str, str]]:
    """All that is needed to get the same scores again."""
    model = result.model
    look = result.look
    shown = f"{look.scale}, by {look.normalise}" + (
        ", the last token left out" if look.leave_out_last else ""
    )
    facts = [
        ("scores", result.quantity),
        ("target", result.target),
        ("replacement", result.replacement or "none"),
        ("shown", shown),
        ("model", f"{model['model']} ({model['class']})"),
        ("computed in", f"{model['quantization'] or model['dtype']} on {model['device']}"),
        ("tokens", f"{len(result.ids)}, {result.forwards} forwards"),
    ]
    options = different(result.choices, Choices())
    facts.append(("options", ", ".join(f"{k}={v!r}" for k, v in options.items()) or "defaults"))
    if result.choices.depth is not None:
        facts.append(("seed", str(asdict(result.choices)["seed"])))
    facts.append(
        (
            "versions",
            f"lightning-inversion {model['version']}, torch {model['version_torch']}, "
            f"transformers {model['version_transformers']}, Python {model['version_python']}",
        )
    )
    return facts
