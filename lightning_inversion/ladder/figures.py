"""Figures of the ladder, from kept rows; a band is the 95% t interval over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib import rc_context

from lightning_inversion.ladder.frames import SHAPES, made_here, of_every_width
from lightning_inversion.ladder.intervals import t_interval
from lightning_inversion.report.canvas import FigureStyle, RenderedFigure, plain_ticks, rendered

READERS = {
    "tuned": "recipe",
    "tuned_nearest": "recipe, nearest",
    "from_mean": "recipe from the mean, nearest",
    "probe_top1": "linear probe",
    "recovery_right": "exact recovery",
    "theory_right": "Fano bound",
}
"""Columns of rows, and the names of their readers; the recipe has its tuned rate."""
GAIN_CHANGES = {
    "none": "as it is", "blocks times 0.35": "blocks times 0.35",
    "blocks of the other size": "blocks or embedding of the other size",
    "embedding of the other size": "blocks or embedding of the other size",
    "blocks exchanged": "blocks exchanged",
}  # fmt: skip
_OTHER_RATE = "another learning rate"
_STYLE = FigureStyle(width=3.6, height=3.3)
_MARGIN = 0.04


def _grid(panels: int, columns: int) -> tuple[Any, list[Any]]:
    """A canvas, and its panels in rows."""
    rows = -(-panels // columns)
    canvas = replace(_STYLE, height=_STYLE.height * rows).canvas(columns)
    return canvas, [canvas.add_subplot(rows, columns, number + 1) for number in range(panels)]


def _tokens_right(axes: Any) -> None:
    """The y axis of all these figures; it is named in the first column."""
    name = "tokens right" if axes.get_subplotspec().is_first_col() else ""
    axes.set(ylim=(-_MARGIN, 1 + _MARGIN), ylabel=name)


def _lines(axes: Any, points: pd.DataFrame, x: str, y: str, hue: str) -> None:
    sns.lineplot(
        points, x=x, y=y, hue=hue, style=hue, markers=True, dashes=False, ax=axes,
        palette="colorblind", errorbar=t_interval, err_kws={"alpha": 0.15},
    )  # fmt: skip
    _tokens_right(axes)


def _legend_below(canvas: Any, columns: int) -> None:
    """The legend of the first panel, for all of them."""
    handles, names = canvas.axes[0].get_legend_handles_labels()
    shown = [(handle, name) for handle, name in zip(handles, names, strict=True)
             if name not in ("training", "shape", "change", "model")]  # fmt: skip
    for axes in canvas.axes:
        if axes.legend_ is not None:
            axes.legend_.remove()
    canvas.legend(*zip(*shown, strict=True), loc="outside lower center", ncols=columns)


def training_figure(cells: pd.DataFrame) -> RenderedFigure:
    """Tokens right along the training, for each shape and width; what probe and recovery read."""
    cells = of_every_width(cells)
    shares_of = cells.groupby("model")["share"].transform("nunique")
    cells = cells[shares_of == cells["share"].nunique()]  # no line over what lies between the ends
    shares = sorted(cells["share"].unique())
    cells = cells.assign(training=cells["share"].map(shares.index))
    panels = [
        (f"{name}: recipe, tuned rate", cells[cells["shape"] == shape], "tuned", "width")
        for shape, name in SHAPES.items()
        if (cells["shape"] == shape).any()
    ]
    read = cells.melt(["training"], ["tuned_nearest", "probe_top1", "recovery_right"])
    read["reader"] = read["variable"].map(READERS)
    panels += [("these models, by reader", read, "value", "reader")]
    canvas, grid = _grid(len(panels), len(panels))
    for axes, (title, points, y, hue) in zip(grid, panels, strict=True):
        _lines(axes, points, "training", y, hue)
        axes.set_xticks(range(len(shares)), [f"{100 * share:g}" for share in shares])
        if hue == "reader":
            axes.legend(loc="lower left")
        else:
            axes.legend(title=hue, loc="upper right", bbox_to_anchor=(0.85, 1.0))
        axes.set(title=title, xlabel=f"% of the training ({_n(points)})")
    return rendered("ladder-training", "Tokens right along the training", canvas)


def _n(points: pd.DataFrame) -> str:
    seeds = points["seed"].nunique() if "seed" in points else 0
    return f"n = {seeds} seeds x 10 prompts" if seeds else "all models and seeds"


def width_figure(cells: pd.DataFrame) -> RenderedFigure:
    """Tokens right against width, and against vocabulary / width, before and after training."""
    ends = cells[cells["share"].isin([0.0, 1.0]) & (cells["blocks"] == 2)]
    ends = ends.assign(
        ratio=ends["vocabulary"] / ends["width"],
        line=ends["shape"].map(SHAPES)
        + ends["vocabulary"].map({1024: ", 1k tokens", 8192: ", 8k tokens"}),
    )
    panels = [("before training", 0.0, "width", "tuned"), ("trained", 1.0, "width", "tuned"),
              ("trained, by vocabulary / width", 1.0, "ratio", "tuned"),
              ("trained, nearest embedding", 1.0, "width", "tuned_nearest")]  # fmt: skip
    names = {"width": "width", "ratio": "vocabulary / width"}
    canvas, grid = _grid(len(panels), 2)
    for axes, (title, share, x, y) in zip(grid, panels, strict=True):
        points = ends[ends["share"] == share]
        _lines(axes, points, x, y, "line")
        axes.set_xscale("log", base=2)
        plain_ticks(axes.xaxis)
        axes.set_xticks(sorted(points[x].unique()))
        axes.set(title=title, xlabel=f"{names[x]} ({_n(points)})")
    _legend_below(canvas, 3)
    return rendered("ladder-width", "Tokens right by width", canvas)


def intervention_figure(rows: pd.DataFrame) -> RenderedFigure:
    """Tokens right after each intervention; dotted, without any, before and after training."""
    means = rows.pivot_table("tuned", "intervention", "share")
    order = [*means[1.0].sort_values(ascending=False).drop("none").index]
    canvas = FigureStyle(width=5.0, height=5.4).canvas(2)
    models = f"up to {rows['model'].nunique()} models"
    for number, (share, title) in enumerate(
        ((1.0, "on the trained model"), (0.0, "on the untrained model")), start=1
    ):
        axes = canvas.add_subplot(1, 2, number)
        own = rows[(rows["share"] == share) & (rows["intervention"] != "none")]
        sns.pointplot(
            own.reset_index(drop=True), y="intervention", x="tuned", order=order, ax=axes,
            linestyle="none", errorbar=t_interval, color="#0173b2",
        )  # fmt: skip
        for end, colour in ((0.0, "#029e73"), (1.0, "#d55e00")):
            axes.axvline(means.loc["none", end], color=colour, linestyle=":")
        axes.set(title=title, ylabel="", xlim=(-_MARGIN, 1 + _MARGIN))
        axes.set_xlabel(f"tokens right, tuned rate ({models})")
        if number == 2:
            axes.set_yticklabels([])
    return rendered("ladder-interventions", "What restores the recipe", canvas)


def mechanism_figure(cells: pd.DataFrame) -> RenderedFigure:
    """The tuned recipe against what might explain it, a point for each model."""
    cells = cells.assign(training=[f"{100 * share:g}%" for share in cells["share"]])
    cells["shape"] = cells["shape"].map(SHAPES)
    order = [f"{100 * share:g}%" for share in sorted(cells["share"].unique())]
    columns = {
        "block_gain": "what the block adds / embedding",
        "jacobian_condition_later": "conditioning of the Jacobian",
        "embedding_condition": "conditioning of the embedding",
        "steps_to_nearest": "distance to the nearest token / last step",
    }
    canvas, grid = _grid(len(columns), 2)
    for axes, (column, name) in zip(grid, columns.items(), strict=True):
        sns.scatterplot(
            cells, x=column, y="tuned", hue="training", hue_order=order, style="shape",
            palette="viridis", ax=axes, s=24,
        )  # fmt: skip
        axes.set(xscale="log")
        _tokens_right(axes)
        axes.set_xlabel(f"{name} (n = {len(cells)})")
        plain_ticks(axes.xaxis)
    _legend_below(canvas, len(order) + 2)
    return rendered("ladder-mechanism", "What goes with tokens right", canvas)


def channel_figure(rows: pd.DataFrame) -> RenderedFigure:
    """Tokens right against the features kept, beside Fano's bound and the rank of the Jacobian."""
    panels = [*rows.groupby(["model", "share"], sort=False)]
    canvas, grid = _grid(len(panels), 3)
    for axes, ((model, share), own) in zip(grid, panels, strict=True):
        long = own.melt(["kept"], [*READERS])
        long["reader"] = long["variable"].map(READERS)
        sns.lineplot(
            long, x="kept", y="value", hue="reader", style="reader", markers=True, dashes=False,
            ax=axes, palette="colorblind",
        )  # fmt: skip
        axes.axvline(own["width"].iloc[0], color="#5a6070", linewidth=0.8, linestyle=":")
        name = model if model.startswith("Smol") else f"{model[:-3]}, {100 * share:g}%"
        axes.set(title=name, xscale="log")
        _tokens_right(axes)
        plain_ticks(axes.xaxis)
        axes.set_xlabel(f"features kept of {own['width'].iloc[0]} ({len(own)} widths, 1 seed)")
    _legend_below(canvas, 3)
    return rendered("ladder-channel", "Tokens right by features kept", canvas)


def gain_figure(cells: pd.DataFrame, rows: pd.DataFrame) -> RenderedFigure:
    """Tokens right against the block's gain, of every model and with its blocks changed."""
    ends = cells[cells["share"].isin([0.0, 1.0])].assign(intervention="none")
    rows = made_here(ends, rows)
    changed = rows[rows["intervention"].isin(GAIN_CHANGES)]
    points = pd.concat([ends, changed], ignore_index=True)
    points["change"] = points["intervention"].map(GAIN_CHANGES)
    points.loc[points["rate"] != 1, "change"] = _OTHER_RATE
    points["model"] = points["share"].map({0.0: "untrained", 1.0: "trained"})
    canvas, grid = _grid(2, 2)
    for axes, column, name in zip(
        grid, ("tuned", "tuned_nearest"), ("the recipe", "read by the nearest embedding"),
        strict=True,
    ):  # fmt: skip
        sns.scatterplot(
            points, x="block_gain", y=column, hue="change", style="model", ax=axes, s=28,
            palette=["#0173b2", "#cc78bc", "#029e73", "#de8f05", "#d55e00"], alpha=0.8,
            hue_order=dict.fromkeys([*GAIN_CHANGES.values(), _OTHER_RATE]),
        )  # fmt: skip
        axes.set(xscale="log", title=name)
        axes.set_xlabel(f"what the block adds / embedding (n = {len(points)})")
        _tokens_right(axes)
        plain_ticks(axes.xaxis)
    _legend_below(canvas, 3)
    return rendered("ladder-gain", "Tokens right by what a block adds", canvas)


def rate_figure(cells: pd.DataFrame) -> RenderedFigure:
    """Tokens right of trained models against the learning rate of their training, by width."""
    own = of_every_width(cells[cells["share"] == 1])
    panels = [(f"{name}, trained", own[own["shape"] == shape])
              for shape, name in SHAPES.items() if (own["shape"] == shape).any()]  # fmt: skip
    canvas, grid = _grid(len(panels), len(panels))
    for axes, (title, points) in zip(grid, panels, strict=True):
        _lines(axes, points, "learning_rate", "tuned", "width")
        axes.set(xscale="log", title=title, xlabel=f"learning rate ({_n(points)})")
        axes.set_xticks(sorted(points["learning_rate"].unique()))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.legend(title="width", loc="lower left")
    return rendered("ladder-rates", "Tokens right by the learning rate of the training", canvas)


READINGS = {
    "tuned_by_direction": "nearest direction",
    "tuned_far_apart": "tokens far apart only",
    "tuned_in_64": "in 64 dimensions",
}
"""Columns of ``room_numbers``, and their names."""


def room_figure(cells: pd.DataFrame, rows: pd.DataFrame) -> RenderedFigure:
    """Tokens right against the room beside a token, of all rows; and GPT-2's by width."""
    points = pd.concat([cells, made_here(cells, rows)], ignore_index=True)
    points["model"] = points["share"].gt(0).map({False: "untrained", True: "trained"})
    points["width"] = points["width"].astype(str)
    points["room"] = points["tuned_room"].clip(0.1)
    own = of_every_width(cells[(cells["shape"] == "gpt2") & (cells["rate"] == 1)])
    long = own.melt(["share", "width", "seed"], [*READINGS])
    long["reading"] = long["variable"].map(READINGS)
    canvas, (scatter, *by_width) = _grid(3, 3)
    sns.scatterplot(
        points, x="room", y="tuned_by_direction", hue="width", style="model", ax=scatter, s=16,
        palette="viridis", alpha=0.7, hue_order=sorted(points["width"].unique(), key=int),
    )  # fmt: skip
    scatter.set(xscale="log", title="all models and interventions")
    scatter.set_xlabel(f"room (n = {len(points)})")
    scatter.legend(loc="upper left", fontsize="x-small")
    plain_ticks(scatter.xaxis)
    _tokens_right(scatter)
    for axes, (share, title) in zip(
        by_width, ((0.0, "GPT-2, before training"), (1.0, "GPT-2, trained")), strict=True
    ):
        shown = long[long["share"] == share]
        _lines(axes, shown, "width", "value", "reading")
        axes.set_xscale("log", base=2)
        plain_ticks(axes.xaxis)
        axes.set_xticks(sorted(shown["width"].unique()))
        axes.set(title=title, xlabel=f"width ({_n(shown)})")
        axes.legend(loc="lower left" if share == 0 else "upper left", fontsize="x-small")
    return rendered("ladder-room", "Tokens right by the room beside a token", canvas)


def draw(
    cells: pd.DataFrame, rows: pd.DataFrame, whole: Sequence[str], channel: pd.DataFrame
) -> list[RenderedFigure]:
    """Every figure of the page.

    Args:
        cells: rows of models; those trained at another rate than the plan's are in one figure.
        rows: of interventions.
        whole: models whose interventions have a figure of their own.
        channel: rows of channels.
    """
    own = cells[cells["rate"] == 1]
    with rc_context(_STYLE.settings):
        return [
            training_figure(own), width_figure(own), mechanism_figure(own),
            intervention_figure(rows[rows["model"].isin(whole)]), gain_figure(cells, rows),
            rate_figure(cells), room_figure(cells, rows), channel_figure(channel),
        ]  # fmt: skip
