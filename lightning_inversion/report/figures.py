"""Results -> figures, as PNG and SVG, in colours that the colour-blind can distinguish.

Figures are made without pyplot: no window system is asked for, and no state is shared.
"""

from __future__ import annotations

import base64
import io
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from lightning_inversion.report.load import CURVES, Loaded, load_curves
from lightning_inversion.report.tables import interval, labels_of, means_of_prompts
from lightning_inversion.results import RECOVERED, critical_width

MAX_LINES = 7
"""Lines of a figure; the others are in the table."""
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
_LETTERS = 12
"""Letters of a legend in an inch."""
_HANDLE = 7
"""Letters that fit into a line's sample and the gap to the next one."""
_LINE = 0.17
"""Height in inches of a line of a legend."""
_STYLE: Any = {
    **sns.axes_style("whitegrid"),
    **sns.plotting_context("paper"),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e3e5ea",
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "figure.dpi": 160,
    "text.parse_math": False,  # a $ in a name is a $
    "svg.hashsalt": "lightning-inversion",  # the same figure is the same file
}


@dataclass(frozen=True)
class RenderedFigure:
    """A figure as files.

    Attributes:
        name: of its files.
        title: what it shows, in a sentence.
    """

    name: str
    title: str
    png: bytes
    svg: bytes

    @property
    def source(self) -> str:
        """The figure as a ``data:`` address, for a page that fetches nothing."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg).decode()}"

    def save(self, folder: Path) -> list[Path]:
        """Write both files; returns them."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{self.name}.png", folder / f"{self.name}.svg"]
        for path, content in zip(paths, (self.png, self.svg), strict=True):
            path.write_bytes(content)
        return paths


def draw(loaded: Loaded) -> list[RenderedFigure]:
    """Every figure that the results have the data for."""
    with rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands for it
        return list(_figures(loaded))


def _figures(loaded: Loaded) -> Iterator[RenderedFigure]:
    yield from _along(loaded, "depth", "depth", "How much is recovered, by depth", "blocks kept")
    title = "How much is recovered from the first k features; dotted, the critical width"
    yield from _along(loaded, "features", "bandwidth", title, "features k")
    for setting in numeric_settings(loaded.settings):
        words = setting.replace("_", " ")
        name = re.sub(r"\W", "_", f"by_{setting}")
        yield from _along(loaded, setting, name, f"How much is recovered, by {words}", words)
    yield from _candidates(loaded)
    yield from _iterations(loaded)


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


def _along(
    loaded: Loaded, setting: str, name: str, title: str, axis: str
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
    canvas = Figure(figsize=(3.4 * len(panels) + 0.4, 3.2), layout="constrained")
    for number, (measure, panel) in enumerate(panels, start=1):
        axes = canvas.add_subplot(1, len(panels), number)
        _draw_lines(axes, panel, labels, y=measure, x="x", errorbar=interval)
        axes.set(title=_PANELS[measure], xlabel=axis, ylabel="", ylim=(-_MARGIN, 1 + _MARGIN))
        if setting in ("depth", "features"):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if setting == "features" and measure == "token_accuracy":
            _critical_widths(axes, panel)
    _draw_legend(canvas, labels)
    yield _rendered(name, title, canvas)


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


def _candidates(loaded: Loaded) -> Iterator[RenderedFigure]:
    """The share of tokens that took at most so many candidates."""
    counts = loaded.results.explode("candidates").dropna(subset="candidates")
    if counts.empty:
        return
    settings = loaded.settings.loc[loaded.settings.index.isin(counts["experiment"])]
    labels = labels_of(settings)
    canvas = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = canvas.add_subplot()
    for number, experiment in enumerate(settings.index[:MAX_LINES]):
        own = counts.loc[counts["experiment"] == experiment, "candidates"].astype(float)
        axes.ecdf(
            own.clip(lower=1),
            label=experiment,
            color=_COLOURS[number],
            linestyle=_DASHES[number],
        )
    axes.set(xscale="log", ylim=(-_MARGIN, 1 + _MARGIN), xlabel="candidates run")
    axes.set_title("share of tokens found by then")
    _plain_ticks(axes.xaxis)
    _draw_legend(canvas, labels)
    yield _rendered("candidates", "How many candidates a token takes", canvas)


def _iterations(loaded: Loaded) -> Iterator[RenderedFigure]:
    """The distance and its ratio by iteration: the median run, and the middle half of the runs."""
    logged = load_curves(loaded.results)
    logged = logged[logged["value"] > 0].rename(columns={"experiment": "line"})
    if logged.empty:
        return
    labels = labels_of(loaded.settings.loc[loaded.settings.index.isin(logged["line"])])
    names = [name for name in CURVES.values() if (logged["curve"] == name).any()]
    canvas = Figure(figsize=(3.6 * len(names) + 0.4, 3.2), layout="constrained")
    for number, name in enumerate(names, start=1):
        axes = canvas.add_subplot(1, len(names), number)
        points = logged[logged["curve"] == name]
        how = {"estimator": "median", "errorbar": ("pi", 50)}
        _draw_lines(axes, points, labels, x="step", y="value", **how)
        axes.set(yscale="log", title=name, xlabel="iteration", ylabel="")
        _plain_ticks(axes.yaxis)
        if name == "distance ratio":
            axes.axhline(1, color="#5a6070", linewidth=0.8, linestyle=":")
    _draw_legend(canvas, labels)
    yield _rendered("iterations", "How the features come closer, by iteration", canvas)


def _plain_ticks(axis: Any) -> None:
    """Write the numbers of a logarithmic axis out: 20, not 2 times 10 to the 1."""
    low, high = axis.get_view_interval()
    # Over many powers of ten there is no room for more than the powers.
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _draw_legend(canvas: Any, labels: pd.Series) -> None:
    """One legend for all panels, below them, in the height that its labels take."""
    for axes in canvas.axes:
        if axes.get_legend() is not None:
            axes.get_legend().remove()
    if len(labels) < 2:
        return
    handles, lines = canvas.axes[0].get_legend_handles_labels()
    texts = [labels[int(line)] for line in lines]
    if len(labels) > MAX_LINES:
        texts[-1] += f" (and {len(labels) - MAX_LINES} more in the table)"
    room = int(_LETTERS * canvas.get_figwidth())
    columns = max(1, min(4, len(texts), room // (max(map(len, texts)) + _HANDLE)))
    texts = [textwrap.fill(text, room // columns - _HANDLE) for text in texts]
    canvas.legend(handles, texts, loc="outside lower center", ncols=columns)
    each = -(-len(texts) // columns)
    columnwise = [texts[start : start + each] for start in range(0, len(texts), each)]
    height = max(sum(text.count("\n") + 1 for text in column) for column in columnwise)
    # The legend takes its height from the axes; beyond two lines it is given its own.
    canvas.set_figheight(canvas.get_figheight() + max(0, height - 2) * _LINE)


def _rendered(name: str, title: str, canvas: Any) -> RenderedFigure:
    files = {}
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        content = io.BytesIO()
        canvas.savefig(content, format=kind, metadata=metadata, facecolor="white")
        files[kind] = content.getvalue()
    return RenderedFigure(name, title, files["png"], files["svg"])
