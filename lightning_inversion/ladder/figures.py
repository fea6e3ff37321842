"""Figures of the ladder, from kept rows; a band is the 95% t interval over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import rc_context

from lightning_inversion.report.canvas import FigureStyle, RenderedFigure, plain_ticks, rendered

_T = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5% points of Student's t with 1 to 9 degrees of freedom."""
READERS = {
    "printed": "recipe, printed rate",
    "tuned": "recipe, tuned rate",
    "tuned_nearest": "recipe, tuned, nearest embedding",
    "probe_top1": "linear probe",
    "recovery_right": "exact recovery",
}
_STYLE = FigureStyle(width=3.6, height=3.3)
_MARGIN = 0.04


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of a mean by Student's t, one value for each seed; within 0 and 1.

    >>> t_interval([0.5, 0.5, 0.5])
    (0.5, 0.5)
    """
    found = np.asarray(values, dtype=float)
    if len(found) < 2:
        return float("nan"), float("nan")
    t = _T[min(len(found) - 1, len(_T)) - 1]
    half = t * found.std(ddof=1) / np.sqrt(len(found))
    return max(0.0, float(found.mean() - half)), min(1.0, float(found.mean() + half))


def _lines(axes: Any, points: pd.DataFrame, x: str, y: str, hue: str, **how: Any) -> None:
    sns.lineplot(
        points, x=x, y=y, hue=hue, style=hue, markers=True, dashes=False, ax=axes,
        palette="colorblind", errorbar=t_interval, err_kws={"alpha": 0.15}, **how,
    )  # fmt: skip
    axes.set(ylim=(-_MARGIN, 1 + _MARGIN), ylabel="")


def training_figure(cells: pd.DataFrame) -> RenderedFigure:
    """Tokens right along the training, for each shape and width; what probe and recovery read."""
    cells = cells[(cells["depth"] == 1) & (cells["vocabulary"] == 1024) & (cells["blocks"] == 2)]
    cells = cells.assign(training=100 * cells["share"])
    panels = [
        (f"{name}: recipe, tuned rate", cells[cells["shape"] == shape], "tuned", "width")
        for shape, name in (("gpt2", "GPT-2"), ("llama", "Llama"))
    ]
    read = cells.melt(["training"], ["tuned_nearest", "probe_top1", "recovery_right"])
    read["reader"] = read["variable"].map(READERS)
    panels += [("all of them, by reader", read, "value", "reader")]
    canvas = _STYLE.canvas(len(panels))
    for number, (title, points, y, hue) in enumerate(panels, start=1):
        axes = canvas.add_subplot(1, len(panels), number)
        _lines(axes, points, "training", y, hue)
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xticks([0, 1, 3, 10, 30, 100], ["0", "1", "3", "10", "30", "100"])
        axes.set(title=title, xlabel=f"% of the training ({_n(points)})")
    return rendered("ladder-training", "Tokens right along the training", canvas)


def _n(points: pd.DataFrame) -> str:
    seeds = points["seed"].nunique() if "seed" in points else 0
    return f"n = {seeds} seeds x 10 prompts" if seeds else "n = all models, seeds and prompts"


def width_figure(cells: pd.DataFrame) -> RenderedFigure:
    """Tokens right against width, and against vocabulary / width, before and after training."""
    ends = cells[(cells["depth"] == 1) & cells["share"].isin([0.0, 1.0]) & (cells["blocks"] == 2)]
    ends = ends.assign(
        ratio=ends["vocabulary"] / ends["width"],
        line=ends["shape"].map({"gpt2": "GPT-2", "llama": "Llama"})
        + ends["vocabulary"].map({1024: ", 1k", 8192: ", 8k"}),
    )
    panels = [("before training", 0.0, "width", "tuned"), ("trained", 1.0, "width", "tuned"),
              ("trained", 1.0, "ratio", "tuned"),
              ("trained, nearest embedding", 1.0, "width", "tuned_nearest")]  # fmt: skip
    names = {"width": "width", "ratio": "vocabulary / width"}
    canvas = _STYLE.canvas(len(panels))
    for number, (title, share, x, y) in enumerate(panels, start=1):
        axes = canvas.add_subplot(1, len(panels), number)
        points = ends[ends["share"] == share]
        _lines(axes, points, x, y, "line")
        axes.set_xscale("log", base=2)
        plain_ticks(axes.xaxis)
        axes.set_xticks(sorted(points[x].unique()))
        axes.set(title=title, xlabel=f"{names[x]} ({_n(points)})")
    return rendered("ladder-width", "Tokens right by width", canvas)


def intervention_figure(shares: pd.DataFrame) -> RenderedFigure:
    """The share of the effect of training that each intervention restores, or removes.

    Args:
        shares: from ``effects``.
    """
    canvas = FigureStyle(width=4.6, height=5.2).canvas(2)
    order = [*shares.groupby("intervention")["restored"].mean().sort_values().index[::-1]]
    for number, (column, title) in enumerate(
        (("restored", "on the trained model: share restored"),
         ("removed", "on the untrained model: share removed")), start=1,
    ):  # fmt: skip
        axes = canvas.add_subplot(1, 2, number)
        sns.pointplot(
            shares, y="intervention", x=column, order=order, ax=axes, linestyle="none",
            errorbar=lambda values: _wide(values), color="#0173b2",
        )  # fmt: skip
        axes.axvline(0.5, color="#5a6070", linewidth=0.8, linestyle=":")
        axes.set(title=title, ylabel="", xlim=(-0.4, 1.2))
        axes.set_xlabel(f"of the effect on the tuned recipe (n = {_models(shares)})")
        if number == 2:
            axes.set_yticklabels([])
    return rendered("ladder-interventions", "What restores the recipe", canvas)


def _models(shares: pd.DataFrame) -> str:
    return f"{shares['family'].nunique()} models x {shares['seed'].nunique()} seeds"


def _wide(values: Any) -> tuple[float, float]:
    """As ``t_interval``, without bounds and for more values."""
    found = np.asarray(values, dtype=float)
    t = _T[len(found) - 2] if 2 <= len(found) <= 10 else 2.1
    half = t * found.std(ddof=1) / np.sqrt(len(found))
    return float(found.mean() - half), float(found.mean() + half)


def mechanism_figure(cells: pd.DataFrame) -> RenderedFigure:
    """The tuned recipe against what might explain it, a point for each model."""
    cells = cells[cells["depth"] == 1].assign(training=lambda frame: 100 * frame["share"])
    columns = {
        "jacobian_condition_later": "conditioning of the Jacobian",
        "embedding_condition": "conditioning of the embedding",
        "anisotropy": "anisotropy of the embedding",
        "steps_to_nearest": "distance to the nearest token / last step",
    }
    canvas = _STYLE.canvas(len(columns))
    for number, (column, name) in enumerate(columns.items(), start=1):
        axes = canvas.add_subplot(1, len(columns), number)
        sns.scatterplot(
            cells, x=column, y="tuned", hue="training", hue_norm=(0, 100), style="shape",
            palette="viridis", ax=axes, legend=number == 1, s=24,
        )  # fmt: skip
        axes.set(xscale="log", ylim=(-_MARGIN, 1 + _MARGIN), title=name, ylabel="", xlabel="")
    return rendered("ladder-mechanism", "What goes with tokens right", canvas)


def channel_figure(rows: pd.DataFrame) -> RenderedFigure:
    """Tokens right against the features kept, beside Fano's bound and the rank of the Jacobian."""
    shown = {**READERS, "theory_right": "Fano bound, linear reader"}
    del shown["printed"]
    panels = [*rows.groupby(["model", "share"], sort=False)]
    canvas = _STYLE.canvas(len(panels))
    for number, ((model, share), own) in enumerate(panels, start=1):
        axes = canvas.add_subplot(1, len(panels), number)
        long = own.melt(["kept"], [*shown])
        long["reader"] = long["variable"].map(shown)
        sns.lineplot(
            long, x="kept", y="value", hue="reader", style="reader", markers=True, ax=axes,
            palette="colorblind", legend=number == 1,
        )  # fmt: skip
        axes.axvline(own["width"].iloc[0], color="#5a6070", linewidth=0.8, linestyle=":")
        name = model if model.startswith("Smol") else f"{model[:-3]}, {100 * share:g}%"
        axes.set(ylim=(-_MARGIN, 1 + _MARGIN), title=name, ylabel="", xscale="log")
        plain_ticks(axes.xaxis)
        axes.set_xlabel(f"features kept of {own['width'].iloc[0]}")
    return rendered("ladder-channel", "Tokens right by features kept", canvas)


def draw(cells: pd.DataFrame, shares: pd.DataFrame, channel: pd.DataFrame) -> list[RenderedFigure]:
    """Every figure that there are rows for."""
    with rc_context(_STYLE.settings):
        figures = []
        if len(cells):
            figures += [training_figure(cells), width_figure(cells), mechanism_figure(cells)]
        if len(shares):
            figures.append(intervention_figure(shares))
        if len(channel):
            figures.append(channel_figure(channel))
        return figures
