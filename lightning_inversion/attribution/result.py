"""What an attribution found, raw, and the ways to look at it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_inversion.attribution.config import Choices, Look, Method
from lightning_inversion.attribution.shading import strengths
from lightning_inversion.transformer.tokens import Piece

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

SCHEMA = 1
"""Version of the keys of `to_dict` and `to_records`."""


@dataclass(frozen=True)
class Query:
    """One prediction, or one state, that is attributed to the tokens up to it.

    Args:
        position: of the last token that it can depend on.
        token: the target's id; None for features.
        text: the target's text.
        probability: of the target; None for features.
        against: the text of the token it is compared with, or None.
    """

    position: int
    token: int | None = None
    text: str = ""
    probability: float | None = None
    against: str | None = None


@dataclass(frozen=True)
class Prediction:
    """A next token and its probability."""

    token: int
    text: str
    probability: float


@dataclass(frozen=True)
class AttributionResult:
    """Scores of the tokens of a text, and all that is needed to get them again.

    Args:
        text: what was attributed.
        ids: [T] its tokens.
        pieces: the same as text; a piece is one token, or several that make up a character.
        queries: [R] what was attributed: one, or with `every_token` one a position.
        scores: [R, T], raw; NaN where a token is after the query's position.
        parts: the raw scores that `scores` is made of, by method.
        method: that was used; never auto.
        signed: whether a negative score means that the token speaks against the target.
        predictions: the most probable next tokens; empty for features.
        choices: every option.
        look: how to show it.
        replacement: what occluded tokens became, or '' where none did.
        model: name, type, dtype, device and versions.
        command: that gives the same result.
        forwards: rows that went through the model.
        notes: what was decided for the user.
    """

    text: str
    ids: tuple[int, ...]
    pieces: tuple[Piece, ...]
    queries: tuple[Query, ...]
    scores: Tensor
    parts: dict[str, Tensor]
    method: Method
    signed: bool
    predictions: tuple[Prediction, ...]
    choices: Choices
    look: Look
    replacement: str
    model: dict[str, Any]
    command: str
    forwards: int
    notes: tuple[str, ...] = ()

    @cached_property
    def token_scores(self) -> Tensor:
        """[T], one raw score a token: of the one query, or the mean size over those of a map."""
        if len(self.queries) == 1:
            return self.scores[0]
        return self.scores.abs().nanmean(0)

    @cached_property
    def token_texts(self) -> tuple[str, ...]:
        """[T]. A token that only begins a character is '', the one that ends it has it."""
        texts = [""] * len(self.ids)
        for piece in self.pieces:
            texts[piece.tokens[-1]] = piece.text
        return tuple(texts)

    @property
    def target(self) -> str:
        """What was attributed, in words."""
        if self.choices.depth is not None:
            where = "each position" if len(self.queries) > 1 else "the last position"
            return f"the features after {self.choices.depth} blocks at {where}"
        if self.choices.every_token:
            what = "each next token"
        else:
            (query,) = self.queries
            chosen = "the given token" if self.choices.token else "the predicted token"
            what = f"{chosen} {query.text!r}"
        against = self.queries[0].against
        return what if against is None else f"{what} rather than {against!r}"

    @property
    def quantity(self) -> str:
        """What a score is, in words."""
        chosen, parts = self.choices, []
        probed = chosen.depth is not None
        gradient = (
            f"rms over {chosen.probes} directions" if probed else f"{chosen.scalar}"
        ) + f", {chosen.reduction}"
        if self.method in ("gradient", "combined"):
            parts.append(f"gradient x input ({gradient})")
        if self.method == "integrated":
            parts.append(f"integrated gradients ({gradient}, {chosen.steps} steps)")
        if self.method in ("occlusion", "combined"):
            distance = chosen.occlusion_distance
            what = f"drop of {chosen.scalar}" if distance == "drop" else distance
            parts.append(f"occlusion ({what})")
        if self.method == "combined":
            weight = f"{chosen.weight:g} and {1 - chosen.weight:g}"
            return f"{' and '.join(reversed(parts))}, each by its largest, weighed {weight}"
        return parts[0]

    @property
    def ends(self) -> tuple[str, str]:
        """What the ends of the legend stand for: raw scores, where they are the same for all."""
        low = "-" if self.signed and self.look.palette != "document" else ""
        if self.look.scale == "rank" or len(self.queries) > 1:
            largest = "highest rank" if self.look.scale == "rank" else "largest"
            return (f"{low}{largest}" if low else "0"), largest
        shown = self.token_scores
        coloured = shown[strengths(shown, self.look).isfinite()]
        largest = f"{float(coloured.abs().max()):.4g}"
        if self.look.normalise == "minmax":
            return f"{float(coloured.min()):.4g}", f"{float(coloured.max()):.4g}"
        return (f"-{largest}" if low else "0"), largest

    def looking(self, **look: Any) -> AttributionResult:
        """The same result, shown otherwise: fields of `Look`."""
        return replace(self, look=replace(self.look, **look))

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values; None where a token is after a query's position."""
        return {
            "schema": SCHEMA,
            "text": self.text,
            "ids": list(self.ids),
            "tokens": list(self.token_texts),
            "method": self.method,
            "quantity": self.quantity,
            "target": self.target,
            "signed": self.signed,
            "queries": [asdict(query) for query in self.queries],
            "scores": _numbers(self.scores),
            "parts": {name: _numbers(part) for name, part in self.parts.items()},
            "predictions": [asdict(prediction) for prediction in self.predictions],
            "choices": asdict(self.choices),
            "look": asdict(self.look),
            "replacement": self.replacement,
            "model": self.model,
            "command": self.command,
            "forwards": self.forwards,
            "notes": list(self.notes),
        }

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as JSON; with indent None, one line."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False, indent=indent)

    def to_records(self) -> list[dict[str, Any]]:
        """One flat row for each token of each query: for a data frame."""
        texts = self.token_texts
        return [
            {
                "schema": SCHEMA,
                "position": token,
                "id": self.ids[token],
                "token": texts[token],
                "target_position": query.position + 1,
                "target": query.text,
                "score": float(self.scores[row, token]),
                **{name: float(part[row, token]) for name, part in self.parts.items()},
            }
            for row, query in enumerate(self.queries)
            for token in range(query.position + 1)
        ]

    def to_html(self) -> str:
        """A page of its own: no script, nothing fetched, everything escaped."""
        from lightning_inversion.attribution.render import page

        return page(self)

    def _repr_html_(self) -> str:
        from lightning_inversion.attribution.render import fragment

        return fragment(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from lightning_inversion.attribution.terminal import lines

        yield from lines(self)

    def print(self) -> None:
        """The coloured text on the terminal."""
        from rich.console import Console

        Console().print(self)


def _numbers(scores: Tensor) -> list[list[float | None]]:
    return [[None if math.isnan(x) else x for x in row] for row in _rows(scores)]


def _rows(scores: Tensor) -> Iterator[list[float]]:
    yield from scores.to(torch.float64).tolist()
