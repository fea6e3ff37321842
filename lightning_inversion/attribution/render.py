"""Scores as a page of HTML, as lines of a terminal, and as a table and an image for TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from rich.style import Style
from rich.text import Text
from torch import Tensor

from lightning_inversion.attribution.config import TEXT_FILE, Choices, Display, differing
from lightning_inversion.attribution.scores import Scores
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

MOST_MAP_TOKENS = 160
"""A map of more tokens has more cells than a browser scrolls smoothly."""
_NOT_COLOURED = (200, 200, 200)
_SINK = 0.5
"""The share of the first token from which it is called an attention sink."""
_BAR = 10
"""Characters of the longest bar of a table."""


def page(scores: Scores, display: Display) -> str:
    """A page in one file: no script, nothing fetched, everything escaped."""
    return _template("page.html").render(**_content(scores, display))


def fragment(scores: Scores, display: Display) -> str:
    """An element for a notebook: the text, the prediction, the legend and the notes."""
    return _template("fragment.html").render(**_content(scores, display))


def index(texts: Sequence[tuple[Scores, Display]], pages: Sequence[str] = ()) -> str:
    """A page of several texts, with links to theirs where these have an address."""
    return _template("index.html").render(_index_content(texts, pages))


def index_fragment(texts: Sequence[tuple[Scores, Display]]) -> str:
    """An element for a notebook: several texts in colours."""
    return _template("index_fragment.html").render(_index_content(texts, ()))


def _index_content(texts: Sequence[tuple[Scores, Display]], pages: Sequence[str]) -> dict[str, Any]:
    scores, display = texts[0]
    return {
        "entries": [
            {
                "tiles": _tiles(*text),
                "next": one_line(text[0].predictions[0].text) if text[0].predictions else "",
                "page": page,
            }
            for text, page in zip(texts, pages or [""] * len(texts), strict=True)
        ],
        "quantity": scores.quantity,
        "shown": _shown(display),
        "model": f"{scores.model['model']} ({scores.model['class']})",
        "version": scores.model["version"],
        "signed": scores.signed,
        "legend_light": _legend_gradient(scores, display, LIGHT_PAGE),
        "legend_dark": _legend_gradient(scores, display, DARK_PAGE),
    }


def terminal_lines(scores: Scores, display: Display) -> Iterator[Text]:
    """The coloured text, its prediction, the legend, what the scores are, and the notes."""
    shown = strengths(scores.token_scores, display).tolist()
    text = Text()
    for tokens in _tiles_of(scores.tokens):
        strongest = max((shown[token] for token in tokens), key=_size)
        style = Style(underline=True)
        if not math.isnan(strongest):
            shade = Shade.of(strongest, display.palette, DARK_PAGE)
            style = Style(color=hexadecimal(shade.ink), bgcolor=hexadecimal(shade.background))
        text.append(visible(scores.tokens[tokens[0]]), style=style)
    yield text
    if scores.predictions:
        best = scores.predictions[0]
        yield Text(f"predicted next token: {one_line(best.text)} ({best.probability:.1%})")
    lowest, highest = legend_ends(scores, display)
    legend = Text(f"{lowest} ")
    for colour in legend_stops(display, scores.signed, DARK_PAGE):
        legend.append("  ", style=Style(bgcolor=hexadecimal(colour)))
    yield legend.append(f" {highest}")
    yield Text(f"{scores.target}: {scores.quantity}", style="dim")
    for note in notes_of(scores, display):
        yield Text(note, style="dim")


def score_lines(scores: Scores) -> Iterator[str]:
    """A line for each token, for a program: its position, raw score and text, between tabs."""
    for position, (text, score) in enumerate(
        zip(scores.tokens, scores.token_scores.tolist(), strict=True)
    ):
        shown = one_line(text).replace("\t", "␉")
        yield f"{position}\t{score:.6g}\t{shown}"


def notes_of(scores: Scores, display: Display) -> tuple[str, ...]:
    """The notes of the scores, and one on a first token that holds more than half of them."""
    sizes = scores.token_scores.double().nan_to_num(0.0).abs()
    share = float(sizes[0] / sizes.sum().clamp_min(torch.finfo(torch.float64).tiny))
    if len(sizes) < 3 or share <= _SINK or display.leave_out_first:
        return scores.notes
    sink = (
        f"The first token holds {share:.0%} of the attribution: models often rest attention on it "
        "that is needed nowhere (attention sink). --leave_out_first true gives the scale without "
        "it."
    )
    return (*scores.notes, sink)


def markdown_table(scores: Scores, display: Display) -> str:
    """A row a token, with its raw score and a bar; TensorBoard removes colours from text."""
    shown = strengths(scores.token_scores, display).nan_to_num(0.0).tolist()
    rows = zip(scores.tokens, scores.token_scores.tolist(), shown, strict=True)
    return "\n".join(
        [
            f"{_in_cell(scores.target)}: {scores.quantity}, {_in_cell(scores.model['model'])}",
            "",
            "| # | token | score | |",
            "| --- | --- | --- | --- |",
            *(
                f"| {position} | {_in_cell(text)} | {score:.6g} | {_bar(size)} |"
                for position, (text, score, size) in enumerate(rows)
            ),
        ]
    )


def image_strip(scores: Scores, display: Display, side: int = 24) -> Tensor:
    """Bytes [3, rows * side, T * side]: a square a token; for a map, a row a prediction."""
    rows = scores.token_scores[None] if len(scores.queries) == 1 else scores.scores
    picture = torch.tensor(
        [[_pixel(x, display) for x in strengths(row, display).tolist()] for row in rows]
    )
    large = picture.repeat_interleave(side, 0).repeat_interleave(side, 1)
    return large.permute(2, 0, 1).to(torch.uint8)


def legend_ends(scores: Scores, display: Display) -> tuple[str, str]:
    """The labels of the legend's ends: raw scores, where they are the same for all rows."""
    minus = "-" if scores.signed and display.palette != "original" else ""
    if display.scale == "rank" or len(scores.queries) > 1:
        highest = "highest rank" if display.scale == "rank" else "largest"
        return (f"-{highest}" if minus else "0"), highest
    shown = scores.token_scores
    coloured = shown[strengths(shown, display).isfinite()]
    if not len(coloured):
        return "", ""
    if display.normalise == "minmax":
        return f"{float(coloured.min()):.4g}", f"{float(coloured.max()):.4g}"
    highest = f"{float(coloured.abs().max()):.4g}"
    return (f"-{highest}" if minus else "0"), highest


def _bar(strength: float) -> str:
    return "█" * round(_BAR * _size(strength))


def _size(strength: float) -> float:
    return -1.0 if math.isnan(strength) else abs(strength)


def _pixel(strength: float, display: Display) -> Colour:
    if math.isnan(strength):
        return _NOT_COLOURED
    return Shade.of(strength, display.palette, LIGHT_PAGE).background


def _in_cell(text: str) -> str:
    """`text` as markdown shows it literally, in one cell."""
    plain = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{c}" if c in "\\`*_{}[]()#+-.!|~$" else c for c in plain)


def _tiles_of(tokens: Sequence[str]) -> list[list[int]]:
    """Positions by tile: a token with text, and those after it that only complete its character.

    A first token without text is a tile of its own.
    """
    tiles: list[list[int]] = []
    for position, text in enumerate(tokens):
        if text or not tiles:
            tiles.append([position])
        else:
            tiles[-1].append(position)
    return tiles


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


def _content(scores: Scores, display: Display) -> dict[str, Any]:
    shown = strengths(scores.token_scores, display).tolist()
    mapped = len(scores.queries) > 1 and len(scores.ids) <= MOST_MAP_TOKENS
    rows = len(scores.queries) if mapped else 0
    return {
        "scores": scores,
        "tiles": _tiles(scores, display),
        "lines": [_line(scores, token, x, display) for token, x in enumerate(shown)],
        "map_rows": [_map_row(scores, row, display) for row in range(rows)],
        "most_map_tokens": MOST_MAP_TOKENS,
        "ends": legend_ends(scores, display),
        "legend_light": _legend_gradient(scores, display, LIGHT_PAGE),
        "legend_dark": _legend_gradient(scores, display, DARK_PAGE),
        "text_file": TEXT_FILE if scores.command.endswith(f" - < {TEXT_FILE}") else "",
        "facts": _facts(scores, display),
        "notes": notes_of(scores, display),
    }


def _parts_of(scores: Scores, token: int) -> dict[str, float]:
    """The parts of a token's score, where it has several; those of a map are in the JSON."""
    if len(scores.parts) == 1 or len(scores.queries) > 1:
        return {}
    return {name: float(part[0, token]) for name, part in scores.parts.items()}


def _tiles(scores: Scores, display: Display) -> list[dict[str, str]]:
    shown = strengths(scores.token_scores, display).tolist()
    return [_tile(scores, tokens, shown, display) for tokens in _tiles_of(scores.tokens)]


def _tile(
    scores: Scores, tokens: Sequence[int], shown: Sequence[float], display: Display
) -> dict[str, str]:
    """A stretch of text with its raw scores, and its colours: a band for each of its tokens."""
    text, titles = scores.tokens[tokens[0]], []
    for number, token in enumerate(tokens, 1):
        parts = "".join(f", {name} {part:.4g}" for name, part in _parts_of(scores, token).items())
        title = f"{one_line(text)}  #{token} id {scores.ids[token]}: "
        title += f"{float(scores.token_scores[token]):.4g}{parts}"
        titles.append(title + (f"  ({number} of {len(tokens)} tokens)" if len(tokens) > 1 else ""))
    style = _style([shown[token] for token in tokens], display)
    return {"text": visible(text), "title": "\n".join(titles), "style": style}


def _line(scores: Scores, token: int, strength: float, display: Display) -> dict[str, Any]:
    """A row of the table of tokens."""
    return {
        "position": token,
        "text": one_line(scores.tokens[token]) or "(continues)",
        "id": scores.ids[token],
        "score": f"{float(scores.token_scores[token]):.6g}",
        "parts": [f"{part:.6g}" for part in _parts_of(scores, token).values()],
        "style": _style([strength], display),
    }


def _map_row(scores: Scores, row: int, display: Display) -> dict[str, Any]:
    """A row of the map: a prediction, and the style and title of each token up to it."""
    query, texts = scores.queries[row], [one_line(text) for text in scores.tokens]
    label = texts[query.position] if query.token is None else one_line(query.text)
    shown = strengths(scores.scores[row], display).tolist()
    cells = [
        (
            _style([shown[token]], display),
            f"{label} <- {texts[token]}  #{token}: {float(scores.scores[row, token]):.4g}",
        )
        for token in range(query.position + 1)
    ]
    title = "" if query.probability is None else f"probability {query.probability:.2%}"
    return {"label": label, "title": title, "cells": cells}


def _style(strengths_of_tokens: Sequence[float], display: Display) -> str:
    """Background and ink, on a light page and on a dark one; "" where nothing is coloured."""
    if all(math.isnan(strength) for strength in strengths_of_tokens):
        return ""
    values = [0.0 if math.isnan(strength) else strength for strength in strengths_of_tokens]
    strongest = max(range(len(values)), key=lambda i: abs(values[i]))
    styles = []
    for theme, page_colour in (("l", LIGHT_PAGE), ("d", DARK_PAGE)):
        shades = [Shade.of(value, display.palette, page_colour) for value in values]
        ink = "#000" if shades[strongest].ink == BLACK else "#fff"
        background = _bands([shade.background for shade in shades])
        styles.append(f"--{theme}:{background};--{theme}i:{ink}")
    return ";".join(styles)


def _bands(colours: Sequence[Colour]) -> str:
    if len(colours) == 1:
        return hexadecimal(colours[0])
    share = 100 / len(colours)
    stops = ",".join(
        f"{hexadecimal(colour)} {i * share:.4g}% {(i + 1) * share:.4g}%"
        for i, colour in enumerate(colours)
    )
    return f"linear-gradient(90deg,{stops})"


def _legend_gradient(scores: Scores, display: Display, page_colour: Colour) -> str:
    stops = legend_stops(display, scores.signed, page_colour)
    return f"linear-gradient(90deg,{','.join(map(hexadecimal, stops))})"


def _facts(scores: Scores, display: Display) -> list[tuple[str, str]]:
    """What the footer lists: all that is needed to compute the scores again."""
    model, choices = scores.model, scores.choices
    options = differing(choices, Choices())
    facts = [
        ("scores", scores.quantity),
        ("target", scores.target),
        ("replacement", scores.replacement or "none"),
        ("shown", _shown(display)),
        ("model", f"{model['model']} ({model['class']})"),
        ("computed in", f"{model['quantization'] or model['dtype']} on {model['device']}"),
        ("tokens", f"{len(scores.ids)}, {scores.forwards} forwards"),
        ("options", ", ".join(f"{k}={v!r}" for k, v in options.items()) or "defaults"),
        (
            "versions",
            f"lightning-inversion {model['version']}, torch {model['version_torch']}, "
            f"transformers {model['version_transformers']}, Python {model['version_python']}",
        ),
    ]
    if choices.depth is not None:
        facts.insert(-1, ("seed", str(choices.seed)))
    return facts


def _shown(display: Display) -> str:
    """How scores become colours, in words."""
    ends = (("first", display.leave_out_first), ("last", display.leave_out_last))
    left_out = "".join(f", the {end} token left out" for end, is_out in ends if is_out)
    return f"{display.scale}, by {display.normalise}{left_out}"
