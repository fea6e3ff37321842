"""Results -> a table, one line per experiment: markdown to read, CSV and JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lightning_inversion.report.labels import LABEL, in_few_words, varying
from lightning_inversion.report.load import FALSE, Loaded

MEASURES = {
    "tokens right": "token_accuracy",
    "exact": "exact",
    "in top k": "top_k_accuracy",
    "verified": "verified_share",
}
"""A column of the table, and the column of the results whose mean it is."""
_FIRST = (LABEL, "command", "model", "depth", "features", "channel")
"""Settings that a reader looks for first; the others come after what was measured."""
_BOUNDS = [f"{name} {bound}" for name in MEASURES for bound in ("low", "high")]
_DRAWS, _TOGETHER = 500, 50


def interval(values: Any) -> tuple[float, float]:
    """The 95% interval of the mean by a bootstrap.

    Args:
        values: one for each prompt, NaN where it has none. The seeds of a prompt are not
            independent: their mean is one value.
    """
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return math.nan, math.nan
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    random = np.random.default_rng(0)
    means = [
        values[random.integers(len(values), size=(_TOGETHER, len(values)))].mean(axis=1)
        for _ in range(_DRAWS // _TOGETHER)
    ]
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    return float(low), float(high)


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


def means_of_prompts(results: pd.DataFrame, by: Iterable[str]) -> pd.DataFrame:
    """The mean of each measure over the seeds of a prompt, one row for each prompt of a group."""
    return results.groupby([*by, "key"], sort=False)[[*MEASURES.values()]].mean()


def summarize(loaded: Loaded) -> pd.DataFrame:
    """A line for each experiment: means over prompts with their 95% interval, medians, settings.

    Results whose prompt is not known have a count of their own; they are in no mean but that of
    verified tokens.
    """
    settings, results = loaded.settings, loaded.results
    apart = varying(settings) or ["model", "depth"]
    groups = results.groupby("experiment")
    prompts = means_of_prompts(results, ["experiment"]).groupby("experiment")
    medians = groups[["iterations", "seconds"]].median()
    is_fit = settings["command"] == "fit"
    table = settings[[name for name in apart if name in _FIRST]].copy()
    table["prompts"] = groups["key"].nunique()
    unknown = results["token_accuracy"].isna().groupby(results["experiment"]).sum()
    if unknown.any():
        table["truth unknown"] = unknown
    for name, measure in MEASURES.items():
        table[name] = prompts[measure].mean()
        bounds = prompts[measure].apply(interval)
        table[f"{name} low"], table[f"{name} high"] = bounds.str[0], bounds.str[1]
    wrong = results["marks"].str.count(FALSE)
    table["verified and wrong"] = wrong.groupby(results["experiment"]).sum()
    table = table.join(settings[[name for name in apart if name not in _FIRST]])
    table["seeds"] = groups["seed"].nunique(dropna=False)
    table["iterations (median)"] = medians["iterations"]
    counts = results.explode("candidates").groupby("experiment")["candidates"]
    table["candidates (median)"] = counts.apply(lambda values: values.astype(float).median())
    table["seconds (median)"] = medians["seconds"].where(~is_fit)
    # A fit's prompts run together, and each of its rows holds the time of them all.
    table["seconds (batch, median)"] = medians["seconds"].where(is_fit)
    return table


def as_text(table: pd.DataFrame) -> pd.DataFrame:
    """The table as it is shown: means with their interval in one cell, no empty columns."""
    text = pd.DataFrame(index=table.index)
    table = table.assign(
        **{name: in_few_words(table[name]) for name in table if table[name].dtype == object}
    )
    for name in table.columns.difference(_BOUNDS, sort=False):
        if table[name].isna().all():
            continue
        if name in MEASURES:
            columns = table[[name, f"{name} low", f"{name} high"]]
            text[name] = [_mean(*values) for values in columns.to_numpy()]
        else:
            text[name] = [_number_text(value) for value in table[name]]
    return text


def markdown(table: pd.DataFrame) -> str:
    """The table as markdown."""
    text = as_text(table)
    return as_markdown([*text], text.to_numpy()) + "\n"


def as_markdown(columns: Sequence[str], lines: Iterable[Iterable[str]]) -> str:
    """Lines of cells under the names of their columns, without a line break at the end."""
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join(f"| {' | '.join(map(_in_cell, row))} |" for row in rows)


def as_json(table: pd.DataFrame) -> str:
    """The table as a list of flat JSON objects; a mean has three keys."""
    records = table.astype(object).where(table.notna(), None).to_dict("records")
    return json.dumps(records, ensure_ascii=False, indent=1)


def _mean(value: float, low: float, high: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.3f}" if low == high else f"{value:.3f} [{low:.2f}, {high:.2f}]"


def _number_text(value: Any) -> str:
    if value is None or value != value:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def _in_cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
