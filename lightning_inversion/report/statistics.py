"""Means over prompts and seeds, with the interval that other prompts would have given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from lightning_inversion.report.load import FALSE, Result

_DRAWS, _TOGETHER = 500, 50
_LEVEL = 95


@dataclass(frozen=True)
class Mean:
    """A mean and the 95% interval of a bootstrap over prompts.

    Each draw takes whole prompts, with all their seeds: the rows of a prompt are not independent.

    Example:
        >>> print(Mean(0.5, 0.25, 0.75))
        0.500 [0.250, 0.750]
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Group:
    """Results with the same settings.

    Attributes:
        settings: what sets them apart.
        results: one for each prompt and seed.
    """

    settings: dict[str, Any]
    results: tuple[Result, ...]

    @property
    def prompts(self) -> int:
        """How many texts."""
        return len({_prompt(result) for result in self.results})

    @property
    def seeds(self) -> int:
        """How many seeds."""
        return len({result.seed for result in self.results})

    @property
    def false_proofs(self) -> int:
        """Tokens that are verified and wrong."""
        return sum(result.marks.count(FALSE) for result in self.results)

    def mean(self, measure: str) -> Mean | None:
        """The mean of an attribute of results over those that have it; None if none has."""
        return mean_of(self.results, lambda result: getattr(result, measure))

    def median(self, measure: str) -> float | None:
        """The median of an attribute over the results that have it."""
        values = [v for r in self.results if (v := getattr(r, measure)) is not None]
        return float(median(values)) if values else None

    @property
    def candidates(self) -> list[int]:
        """Tokens run before each token was named."""
        return [count for result in self.results for count in result.candidates]


def in_percent(share: float) -> str:
    """A share in percent; 100% means all, and 0% none.

    Example:
        >>> in_percent(0.75), in_percent(0.999), in_percent(0.001)
        ('75%', 'over 99%', 'under 1%')
    """
    percent = round(100 * share)
    if percent == 100 and share < 1:
        return "over 99%"
    return "under 1%" if percent == 0 and share else f"{percent}%"


def grouped(results: Sequence[Result], *without: str) -> list[Group]:
    """Results by their settings, those of ``without`` aside, in the order of depth and appearance.

    Args:
        results: of any number of runs.
        without: settings that do not part a group.
    """
    together: dict[str, list[Result]] = {}
    for result in results:
        key = repr({k: v for k, v in result.settings.items() if k not in without})
        together.setdefault(key, []).append(result)
    groups = []
    for members in together.values():
        settings = {k: v for k, v in members[0].settings.items() if k not in without}
        groups.append(Group(settings, tuple(members)))
    return sorted(groups, key=lambda group: group.settings.get("depth") or 0)


def varying(groups: Sequence[Group]) -> list[str]:
    """The settings in which groups differ."""
    keys = dict.fromkeys(key for group in groups for key in group.settings)
    return [key for key in keys if len({repr(g.settings.get(key)) for g in groups}) > 1]


def mean_of(results: Sequence[Result], measure: Callable[[Result], float | None]) -> Mean | None:
    """The mean of a measure over the results that have it, by prompts drawn anew."""
    sums: dict[str, list[float]] = {}
    for result in results:
        value = measure(result)
        if value is not None:
            entry = sums.setdefault(_prompt(result), [0.0, 0.0])
            entry[0] += float(value)
            entry[1] += 1
    if not sums:
        return None
    totals = np.array(list(sums.values()))
    value = float(totals[:, 0].sum() / totals[:, 1].sum())
    if len(totals) == 1 or np.ptp(totals[:, 0] / totals[:, 1]) == 0:
        return Mean(value, value, value)
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(_DRAWS // _TOGETHER):
        chosen = totals[random.integers(len(totals), size=(_TOGETHER, len(totals)))].sum(1)
        drawn.extend(chosen[:, 0] / chosen[:, 1])
    low, high = np.percentile(drawn, [(100 - _LEVEL) / 2, (100 + _LEVEL) / 2])
    return Mean(value, float(low), float(high))


def _prompt(result: Result) -> str:
    return f"#{result.index}" if result.prompt is None else result.prompt
