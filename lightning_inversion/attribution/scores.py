"""The raw scores of a text, and everything needed to compute them again."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from lightning_inversion.attribution.config import Choices, Method
from lightning_inversion.errors import InputError

SCHEMA = 2
"""Version of the keys of `to_dict` and `to_records`."""


@dataclass(frozen=True)
class Query:
    """One prediction, or one hidden state, that is attributed to the tokens up to it.

    Args:
        position: of the last token that it depends on.
        token: the target's id; None for features.
        text: the target's text.
        probability: of the target; None for features.
        against: the text of the token whose scalar is subtracted, or None.
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


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of the tokens of a text.

    Args:
        text: what was attributed.
        ids: [T] its tokens.
        tokens: [T] their texts; of a character that several tokens make up, the first has all.
        queries: [R] what was attributed: one, or with `every_token` one a position.
        scores: [R, T], raw; NaN where a token is after the query's position.
        parts: the raw scores from which `scores` is computed, by method.
        method: that was used; never auto.
        predictions: the most probable next tokens; empty for features.
        choices: every option.
        replacement: what occluded tokens became, or '' where none did.
        model: name, type, dtype, device and versions.
        command: that gives the same result.
        forwards: rows that went through the model.
        notes: fallbacks that were taken and limits that were met.
    """

    text: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    queries: tuple[Query, ...]
    scores: Tensor
    parts: dict[str, Tensor]
    method: Method
    predictions: tuple[Prediction, ...]
    choices: Choices
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

    @property
    def signed(self) -> bool:
        """Whether a negative score means that the token counts against the target."""
        if self.choices.depth is not None or self.method == "combined":
            return False
        if self.method == "occlusion":
            return self.choices.occlusion_distance == "drop"
        return self.choices.reduction == "sum"

    @property
    def target(self) -> str:
        """A phrase for what was attributed."""
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
        """A phrase for what a score is."""
        chosen, parts = self.choices, []
        differentiated = (
            chosen.scalar if chosen.depth is None else f"rms over {chosen.probes} directions"
        )
        gradient = f"{differentiated}, {chosen.reduction}"
        if self.method in ("occlusion", "combined"):
            distance = chosen.occlusion_distance
            parts.append(
                f"occlusion ({f'drop of {chosen.scalar}' if distance == 'drop' else distance})"
            )
        if self.method in ("gradient", "combined"):
            parts.append(f"gradient x input ({gradient})")
        if self.method == "integrated":
            parts.append(f"integrated gradients ({gradient}, {chosen.steps} steps)")
        if self.method == "lrp":
            parts.append(f"layer-wise relevance propagation ({gradient})")
        if self.method == "combined":
            weights = f"{chosen.weight:g} and {1 - chosen.weight:g}"
            return f"{' and '.join(parts)}, each by its largest, weighted {weights}"
        return parts[0]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values; None for a number that is not finite.

        So None is also the score of a token after a query's position.
        """
        return {
            "schema": SCHEMA,
            "text": self.text,
            "ids": list(self.ids),
            "tokens": list(self.tokens),
            "method": self.method,
            "quantity": self.quantity,
            "target": self.target,
            "signed": self.signed,
            "queries": [_finite(asdict(query)) for query in self.queries],
            "scores": _plain_numbers(self.scores),
            "parts": {name: _plain_numbers(part) for name, part in self.parts.items()},
            "predictions": [_finite(asdict(prediction)) for prediction in self.predictions],
            "choices": asdict(self.choices),
            "replacement": self.replacement,
            "model": self.model,
            "command": self.command,
            "forwards": self.forwards,
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, stored: dict[str, Any], **more: Any) -> Self:
        """Read what ``to_dict`` gives; a score that was not finite is NaN.

        Args:
            stored: the dict.
            more: further fields of the class.

        Raises:
            InputError: it is something else.
        """
        try:
            if stored["schema"] != SCHEMA:
                raise ValueError(f"it has schema {stored['schema']!r}, and {SCHEMA} is read")
            given: dict[str, Any] = {f.name: stored[f.name] for f in fields(Scores)}
            given.update(
                ids=tuple(given["ids"]),
                tokens=tuple(given["tokens"]),
                queries=tuple(Query(**query) for query in given["queries"]),
                scores=_tensor(given["scores"]),
                parts={name: _tensor(part) for name, part in given["parts"].items()},
                predictions=tuple(Prediction(**one) for one in given["predictions"]),
                choices=Choices(**given["choices"]),
                notes=tuple(given["notes"]),
            )
            return cls(**given, **more)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"This is no result of an attribution: {error}.") from error

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as JSON; with indent None, one line."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False, indent=indent)

    def to_records(self) -> list[dict[str, Any]]:
        """One flat record for each token of each query: for a data frame."""
        return [
            {
                "schema": SCHEMA,
                "position": token,
                "id": self.ids[token],
                "token": self.tokens[token],
                "target_position": query.position + 1,
                "target": query.text,
                "score": float(self.scores[row, token]),
                **{name: float(part[row, token]) for name, part in self.parts.items()},
            }
            for row, query in enumerate(self.queries)
            for token in range(query.position + 1)
        ]


def _plain_numbers(scores: Tensor) -> list[list[float | None]]:
    rows: list[list[float]] = scores.double().tolist()
    return [[x if math.isfinite(x) else None for x in row] for row in rows]


def _tensor(rows: list[list[float | None]]) -> Tensor:
    return torch.tensor([[math.nan if x is None else x for x in row] for row in rows])


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    wrong = {
        key: None for key, x in record.items() if isinstance(x, float) and not math.isfinite(x)
    }
    return {**record, **wrong}
