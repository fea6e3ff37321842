"""Results -> figures, as PNG and SVG, in colours that the colour-blind can distinguish."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib import rc_context
from matplotlib.ticker import MaxNLocator

from lightning_inversion.report.canvas import (
    MAX_LINES,
    FigureStyle,
    RenderedFigure,
    plain_ticks,
    rendered,
)
from lightning_inversion.report.labels import labels_of
from lightning_inversion.report.layers import draw_layers
from lightning_inversion.report.load import CURVES, Loaded, load_curves
from lightning_inversion.report.tables import interval, means_of_prompts
from lightning_inversion.results import RECOVERED, critical_width

MAX_MARKERS = 12
"""Points of a line that are marked; more would hide the line."""
_PANELS = {
    "token_accuracy": "tokens right",
    "exact": "prompts exact",
    "verified_share": "tokens verified",
}
_COLOURS = sns.color_palette("colorblind", MAX_LINES)
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 2)))
_MARGIN = 0.05
"""Beyond 0 and 1 on the axis of a share, so that the frame does not hide a line there."""


def draw(loaded: Loaded, style: FigureStyle | None = None) -> list[RenderedFigure]:
    """Every figure that the results have the data for."""
    style = style or FigureStyle()
    with rc_context(style.settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands for it
        return list(_figures(loaded, style))


def _figures(loaded: Loaded, style: FigureStyle) -> Iterator[RenderedFigure]:
    yield from _along(loaded, style, "depth", "depth", "How much is recovered, by depth", "depth")
    title = "How much is recovered from the first k features; dotted, the critical width"
    yield from _along(loaded, style, "features", "bandwidth", title, "features k")
    for setting in numeric_settings(loaded.settings):
        words = setting.replace("_", " ")
        name = re.sub(r"\W", "_", f"by_{setting}")
        yield from _along(loaded, style, setting, name, f"How much is recovered, by {words}", words)
    yield from draw_layers(loaded, style)
    yield from _candidates(loaded, style)
    yield from _iterations(loaded, style)


def numeric_settings(settings: pd.DataFrame) -> list[str]:
    """Settings with two or more numbers among their values, the depth and the width aside."""
    others = settings.drop(columns=["depth", "features"], errors="ignore")
    return [name for name in others if others[name].map(_as_number).nunique() > 1]


def _as_number(value: Any) -> float:
    """A number as itself, k of the features '0:k'; NaN for what has no position on an axis."""
    if isinstance(value, str) and value.startswith("0:") and value[2:].isdigit():
        return float(value[2:])
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else float("nan")


def points_along(loaded: Loaded, setting: str) -> tuple[pd.DataFrame, pd.Series]:
    """The measures of each prompt along a setting, and the label of each line.

    Returns:
        Points with the columns line, x, key and the measures, one for each prompt at each x, and
        what sets each line apart. Rows without an x are left out.
    """
    if setting not in loaded.settings:
        return pd.DataFrame({"line": [], "x": []}), pd.Series()
    x = loaded.settings[setting].map(_as_number).astype(float).dropna()
    others = loaded.settings.loc[x.index].drop(columns=setting)
    line = others.groupby([*others], dropna=False, sort=False).ngroup()
    labels = labels_of(others.groupby(line, sort=False).head(1).set_axis(line.unique()))
    results = loaded.results[loaded.results["experiment"].isin(x.index)]
    results = results.assign(x=results["experiment"].map(x), line=results["experiment"].map(line))
    return means_of_prompts(results, ["line", "x"]).reset_index(), labels


def of_shared_prompts(panel: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The points of a panel, each line over the prompts that all its points have.

    Returns:
        The points, and how many prompts they are of. A line whose points share no prompt keeps
        them all, and the text says so.
    """
    kept, counts, differ = [], set(), False
    for _, line in panel.groupby("line", sort=False):
        points = line["x"].nunique()
        shared = line.groupby("key")["x"].transform("nunique") == points
        if not shared.any():
            differ = True
        kept.append(line[shared] if shared.any() else line)
        counts |= {int(n) for n in kept[-1].groupby("x")["key"].nunique()}
    n = f"n = {min(counts)}" + (f" to {max(counts)}" if len(counts) > 1 else "")
    text = f"{n} prompt{'' if counts == {1} else 's'}"
    return pd.concat(kept), f"{text}, others at each point" if differ else text


def _along(
    loaded: Loaded, style: FigureStyle, setting: str, name: str, title: str, axis: str
) -> Iterator[RenderedFigure]:
    """Each measure along a setting; nothing where no line has two points."""
    points, labels = points_along(loaded, setting)
    panels = [
        (measure, panel)
        for measure in _PANELS
        if measure in points
        and (panel := points.dropna(subset=measure)).groupby("line")["x"].nunique().max() > 1
    ]
    if not panels:
        return
    canvas = style.canvas(len(panels))
    for number, (measure, every) in enumerate(panels, start=1):
        axes = canvas.add_subplot(1, len(panels), number)
        panel, count = of_shared_prompts(every)
        _draw_lines(axes, panel, labels, y=measure, x="x", errorbar=interval)
        axes.set(title=_PANELS[measure], ylabel="", ylim=(-_MARGIN, 1 + _MARGIN))
        axes.set_xlabel(f"{axis} ({count})")
        if setting in ("depth", "features"):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if setting == "features" and measure == "token_accuracy":
            _critical_widths(axes, panel)
    yield rendered(name, title, canvas, style, labels)


def _draw_lines(axes: Any, points: pd.DataFrame, labels: pd.Series, **how: Any) -> None:
    """A line with a band for each of the first labels, in one style in every panel."""
    shown = [*labels.index[:MAX_LINES]]
    sns.lineplot(
        points[points["line"].isin(shown)],
        hue="line",
        style="line",
        hue_order=shown,
        style_order=shown,
        palette=_COLOURS[: len(shown)],
        markers=points[how["x"]].nunique() <= MAX_MARKERS,
        ax=axes,
        **how,
    )


def _critical_widths(axes: Any, points: pd.DataFrame) -> None:
    means = points.groupby(["line", "x"])["token_accuracy"].mean().unstack("line")
    for line in means.columns[means.columns < MAX_LINES]:
        width = critical_width(means[line].dropna().to_dict())
        if width is not None:
            axes.axvline(width, color=_COLOURS[line], linestyle=":", linewidth=1.2)
            axes.annotate(
                f"{width:.0f}",
                (width, RECOVERED),
                xytext=(3, -12 - 11 * line),
                textcoords="offset points",
                color=_COLOURS[line],
            )


def _candidates(loaded: Loaded, style: FigureStyle) -> Iterator[RenderedFigure]:
    """The share of tokens that took at most so many candidates, where any was run."""
    counts = loaded.results.explode("candidates").dropna(subset="candidates")
    counts = counts[counts.groupby("experiment")["candidates"].transform("max") > 0]
    if counts.empty:
        return
    settings = loaded.settings.loc[loaded.settings.index.isin(counts["experiment"])]
    labels = labels_of(settings)
    canvas = style.canvas(1.4)  # its legend has a line for each depth
    axes = canvas.add_subplot()
    for number, experiment in enumerate(settings.index[:MAX_LINES]):
        own = counts.loc[counts["experiment"] == experiment, "candidates"].astype(float)
        axes.ecdf(
            own.clip(lower=1),
            label=experiment,
            color=_COLOURS[number],
            linestyle=_DASHES[number],
        )
    axes.set(
        xscale="log",
        ylim=(-_MARGIN, 1 + _MARGIN),
        xlabel=f"candidates run (n = {len(counts)} tokens)",
    )
    axes.set_title("share of tokens found by then")
    plain_ticks(axes.xaxis)
    yield rendered("candidates", "How many candidates a token takes", canvas, style, labels)


def _iterations(loaded: Loaded, style: FigureStyle) -> Iterator[RenderedFigure]:
    """The distance and its ratio by iteration: the median run, and the middle half of the runs."""
    logged = load_curves(loaded.results)
    logged = logged[logged["value"] > 0].rename(columns={"experiment": "line"})
    if logged.empty:
        return
    labels = labels_of(loaded.settings.loc[loaded.settings.index.isin(logged["line"])])
    names = [name for name in CURVES.values() if (logged["curve"] == name).any()]
    canvas = style.canvas(len(names))
    for number, name in enumerate(names, start=1):
        axes = canvas.add_subplot(1, len(names), number)
        points = logged[logged["curve"] == name]
        how = {"estimator": "median", "errorbar": ("pi", 50)}
        _draw_lines(axes, points, labels, x="step", y="value", **how)
        axes.set(yscale="log", title=name, xlabel="iteration", ylabel="")
        plain_ticks(axes.yaxis)
        if name == "distance ratio":
            axes.axhline(1, color="#5a6070", linewidth=0.8, linestyle=":")
    title = "How the features come closer, by iteration"
    yield rendered("iterations", title, canvas, style, labels)
