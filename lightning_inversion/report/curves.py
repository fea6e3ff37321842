"""Results -> curves: a measure along one setting, a line for each choice of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_inversion.report.load import Result
from lightning_inversion.report.statistics import Mean, grouped, mean_of, varying

Measure = Callable[[Result], float | None]


@dataclass(frozen=True)
class Curve:
    """A line of a figure.

    Attributes:
        label: the settings that set it apart, '' where there is one line alone.
        x: ascending.
        means: of the measure at each x.
    """

    label: str
    x: tuple[float, ...]
    means: tuple[Mean, ...]


def curves_along(
    results: Sequence[Result], setting: str, measure: Measure, number: Callable[[Any], float | None]
) -> list[Curve]:
    """The curves of a measure along a setting; [] where no line has two points.

    Args:
        results: of any number of runs.
        setting: whose values are x.
        measure: what is averaged over prompts and seeds.
        number: x of a value, None for a value that has no place on the axis.
    """
    placed = [r for r in results if number(r.settings.get(setting)) is not None]
    lines = grouped(placed, setting)
    drawn = []
    for line in lines:
        points = []
        for group in grouped(line.results):
            mean, x = mean_of(group.results, measure), number(group.settings.get(setting))
            if mean is not None and x is not None:
                points.append((x, mean))
        points.sort(key=lambda point: point[0])
        if points:
            drawn.append((line, points))
    apart = varying([line for line, _ in drawn])
    curves = [
        Curve(
            label_of(line.settings, apart),
            tuple(x for x, _ in points),
            tuple(mean for _, mean in points),
        )
        for line, points in drawn
    ]
    return curves if any(len(curve.x) > 1 for curve in curves) else []


def numeric_settings(results: Sequence[Result]) -> list[str]:
    """Settings with two or more numbers among their values, the depth and the width aside."""
    every = list({id(result.settings): result.settings for result in results}.values())
    keys = dict.fromkeys(key for settings in every for key in settings)
    return [
        key
        for key in keys
        if key not in ("depth", "features")
        and len({v for settings in every if (v := as_number(settings.get(key))) is not None}) > 1
    ]


def as_number(value: Any) -> float | None:
    """A number as itself, anything else as None."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def width_of(value: Any) -> float | None:
    """k of the features '0:k'; None for another range, or for all of them."""
    text = str(value)
    return float(text[2:]) if text.startswith("0:") and text[2:].isdigit() else None


def label_of(settings: dict[str, Any], apart: Sequence[str]) -> str:
    """The settings that set something apart, in a line."""
    words = []
    for key in apart:
        value = settings.get(key)
        if value is None:
            continue
        text = str(value).rpartition("/")[2] if "." in key else str(value)
        named = isinstance(value, int | float) or key not in (
            "command",
            "model",
            "objective",
            "channel",
        )
        words.append(f"{key.rpartition('.')[2]} {text}" if named else text)
    return ", ".join(words)
