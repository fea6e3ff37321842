"""Means over seeds with their 95% t intervals, as numbers and as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats


def t_interval(
    values: Sequence[float], least: float = 0.0, most: float = 1.0
) -> tuple[float, float]:
    """The 95% interval of a mean by Student's t, one value for each seed.

    Args:
        values: shares, differences of shares, or other numbers.
        least: what they can be at least.
        most: what they can be at most.

    >>> t_interval([0.5, 0.5, 0.5])
    (0.5, 0.5)
    """
    found = np.asarray(values, dtype=float)
    if len(found) < 2:
        return float("nan"), float("nan")
    half = stats.t.ppf(0.975, len(found) - 1) * stats.sem(found)
    return max(least, float(found.mean() - half)), min(most, float(found.mean() + half))


def between(values: pd.Series, least: float = 0.0, most: float = 1.0) -> str:
    """A mean with its interval over seeds."""
    low, high = t_interval([*values], least, most)
    mean = f"{values.mean():.2f}"
    return mean if math.isnan(low) else f"{mean} [{low:.2f}, {high:.2f}]"


def changed(right: pd.Series, change: pd.Series) -> str:
    """A mean, and in brackets the interval of a change over seeds."""
    mean = f"{right.mean():.2f}"
    low, high = t_interval([*change], -1.0)
    return mean if not change.any() else f"{mean} [{low:+.2f}, {high:+.2f}]"
