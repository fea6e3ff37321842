"""Curves -> figures, as PNG and SVG. Colours of Okabe and Ito, with a marker and a dash each.

Matplotlib is wanted here alone, and its backends for screens are never touched.
"""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_inversion.replication.channel import critical_widths
from lightning_inversion.replication.claims import RECOVERED
from lightning_inversion.report.curves import (
    Curve,
    as_number,
    curves_along,
    label_of,
    numeric_settings,
    width_of,
)
from lightning_inversion.report.events import TAGS, Points, scalars_of
from lightning_inversion.report.load import Reading, Result
from lightning_inversion.report.statistics import grouped, varying

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS, _DASHES = "osD^vPX", ("-", "--", "-.", ":", "-", "--", "-.")
MOST_LINES = len(_COLOURS)
_MARGIN = 0.05
"""Of a share's axis, beyond 0 and 1: a line there is not to be hidden by the frame."""
_LETTERS = 12
"""Of a legend, in an inch."""
_HANDLE = 7
"""Letters that a line's sample, and the gap to the next, take the room of."""
_LINE = 0.17
"""Inches that a line of a legend is high."""
_STYLE: Any = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e5ea",
    "grid.linewidth": 0.7,
    "axes.edgecolor": "#5a6070",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "xtick.color": "#3a3f4b",
    "ytick.color": "#3a3f4b",
    "legend.frameon": False,
    "lines.markersize": 4.5,
    "lines.linewidth": 1.6,
    "svg.hashsalt": "lightning-inversion",  # the same figure is the same file
    "figure.dpi": 160,
}


@dataclass(frozen=True)
class Figure:
    """A figure, drawn.

    Attributes:
        name: of its files.
        title: what it shows, in a sentence.
        png: the bytes of the one, and
        svg: of the other.
    """

    name: str
    title: str
    png: bytes
    svg: bytes

    @property
    def source(self) -> str:
        """The figure as an address of data, for a page that fetches nothing."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg).decode()}"

    def save(self, folder: Path) -> list[Path]:
        """Write both files; returns them."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{self.name}.png", folder / f"{self.name}.svg"]
        for path, content in zip(paths, (self.png, self.svg), strict=True):
            path.write_bytes(content)
        return paths


@dataclass(frozen=True)
class _Panel:
    """One pair of axes: lines with bands."""

    title: str
    curves: Sequence[Curve]
    ends: tuple[float, float] | None = (0, 1)
    widths: tuple[float, ...] = ()


def draw(reading: Reading) -> list[Figure]:
    """Every figure that the results have the data for."""
    return list(_figures(reading))


def _figures(reading: Reading) -> Iterator[Figure]:
    results = reading.results
    right: Callable[[Result], float | None] = lambda r: r.token_accuracy  # noqa: E731
    exact: Callable[[Result], float | None] = lambda r: r.exact  # noqa: E731
    verified: Callable[[Result], float | None] = lambda r: r.verified_share  # noqa: E731
    measures = (("tokens right", right), ("texts exact", exact), ("tokens verified", verified))

    def along(setting: str, number: Callable[[Any], float | None]) -> list[_Panel]:
        drawn = [(name, curves_along(results, setting, m, number)) for name, m in measures]
        return [_Panel(name, curves) for name, curves in drawn if curves]

    if panels := along("depth", as_number):
        title = "How much of the text is read, by depth"
        yield _lines("depth", title, "blocks kept", panels, whole=True)
    if panels := along("features", width_of):
        title = "How much is read from the first k features; dotted, the critical width"
        first = _Panel(panels[0].title, panels[0].curves, widths=_critical(panels[0].curves))
        yield _lines("bandwidth", title, "features k", [first, *panels[1:]], whole=True)
    for setting in numeric_settings(results):
        if panels := along(setting, as_number):
            words = setting.replace("_", " ")
            name = f"by_{setting.replace('.', '_')}"
            yield _lines(name, f"How much is read, by {words}", words, panels)
    yield from _candidates(results)
    yield from _iterations(reading)


def _critical(curves: Sequence[Curve]) -> tuple[float, ...]:
    """The width from which on each line is recovered, where there is one."""
    found = []
    for curve in curves:
        points = {f"0:{x:.0f}": mean.value for x, mean in zip(curve.x, curve.means, strict=True)}
        first, always = critical_widths(points)
        width = always if always is not None else first
        found.append(float("nan") if width is None else float(width))
    return tuple(found)


def _lines(
    name: str, title: str, axis: str, panels: Sequence[_Panel], whole: bool = False
) -> Figure:
    """Panels side by side, with one legend below."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import MaxNLocator

    with rc_context(_STYLE):
        canvas = Canvas(figsize=(3.4 * len(panels) + 0.4, 3.2), layout="constrained")
        for place, panel in enumerate(panels):
            axes = canvas.add_subplot(1, len(panels), place + 1)
            for number, curve in enumerate(panel.curves[:MOST_LINES]):
                _line(axes, curve, number)
                if number < len(panel.widths) and panel.widths[number] == panel.widths[number]:
                    width = panel.widths[number]
                    axes.axvline(width, color=_COLOURS[number], linestyle=":", linewidth=1.2)
                    axes.annotate(
                        f"{width:.0f}",
                        (width, RECOVERED),
                        xytext=(3, -12 - 11 * number),
                        textcoords="offset points",
                        color=_COLOURS[number],
                    )
            axes.set_title(panel.title)
            axes.set_xlabel(axis)
            if panel.ends is not None:
                axes.set_ylim(panel.ends[0] - _MARGIN, panel.ends[1] + _MARGIN)
            if whole:
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(canvas, panels[0].curves)
        return _drawn(name, title, canvas)


def _line(axes: Any, curve: Curve, number: int) -> None:
    style = {
        "color": _COLOURS[number],
        "linestyle": _DASHES[number],
        "marker": _MARKERS[number],
        "label": curve.label,
    }
    axes.plot(curve.x, [mean.value for mean in curve.means], **style)
    low, high = [mean.low for mean in curve.means], [mean.high for mean in curve.means]
    axes.fill_between(curve.x, low, high, color=_COLOURS[number], alpha=0.15, linewidth=0)


def _legend(canvas: Any, curves: Sequence[Curve]) -> None:
    if len(curves) < 2:
        return
    handles, labels = canvas.axes[0].get_legend_handles_labels()
    if not labels:  # no fit needed an iteration
        return
    left_out = len(curves) - MOST_LINES
    if left_out > 0:
        labels[-1] += f" (and {left_out} more in the table)"
    room = int(_LETTERS * canvas.get_figwidth())
    columns = max(1, min(4, len(labels), room // (max(map(len, labels)) + _HANDLE)))
    labels = [textwrap.fill(label, room // columns - _HANDLE) for label in labels]
    canvas.legend(handles, labels, loc="outside lower center", ncols=columns)
    # The legend takes its height from the axes; beyond two lines it is given its own.
    each = -(-len(labels) // columns)
    columnwise = [labels[start : start + each] for start in range(0, len(labels), each)]
    lines = max(sum(label.count("\n") + 1 for label in column) for column in columnwise)
    canvas.set_figheight(canvas.get_figheight() + max(0, lines - 2) * _LINE)


def _plain_ticks(axis: Any) -> None:
    """Write the numbers of a drawn logarithmic axis out: 20, not 2 times 10 to the 1."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    # Over many powers of ten there is no room for more than the powers.
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _candidates(results: Sequence[Result]) -> Iterator[Figure]:
    """The share of tokens named after so many candidates."""
    counted = [result for result in results if result.candidates]
    if not counted:
        return
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    groups = grouped(counted)
    apart = varying(groups)
    with rc_context(_STYLE):
        canvas = Canvas(figsize=(5.2, 3.2), layout="constrained")
        axes = canvas.add_subplot()
        for number, group in enumerate(groups[:MOST_LINES]):
            counts = sorted(group.candidates)
            shares = [(place + 1) / len(counts) for place in range(len(counts))]
            axes.step(
                [max(count, 1) for count in counts],
                shares,
                where="post",
                color=_COLOURS[number],
                linestyle=_DASHES[number],
                label=label_of(group.settings, apart),
            )
        axes.set_xscale("log")
        axes.set_ylim(-_MARGIN, 1 + _MARGIN)
        _plain_ticks(axes.xaxis)
        axes.set_xlabel("candidates run")
        axes.set_title("share of tokens named by then")
        _legend(canvas, [Curve(label_of(g.settings, apart), (), ()) for g in groups])
        yield _drawn("candidates", "How many candidates a token takes", canvas)


def _iterations(reading: Reading) -> Iterator[Figure]:
    """The distance and its ratio by iteration: the median run, and the middle half of the runs."""
    of_run = {result.run: result for result in reading.results}
    runs = [(result, scalars_of(Path(run).parent)) for run, result in of_run.items()]
    logged = [(result, scalars) for result, scalars in runs if scalars]
    if not logged:
        return
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    groups = grouped([result for result, _ in logged])
    apart = varying(groups)
    by_run = {result.run: scalars for result, scalars in logged}
    names = [name for name in TAGS if any(name in scalars for scalars in by_run.values())]
    with rc_context(_STYLE):
        canvas = Canvas(figsize=(3.6 * len(names) + 0.4, 3.2), layout="constrained")
        for place, name in enumerate(names):
            axes = canvas.add_subplot(1, len(names), place + 1)
            for number, group in enumerate(groups[:MOST_LINES]):
                lines = [by_run[r.run][name] for r in group.results if name in by_run[r.run]]
                label = label_of(group.settings, apart)
                _median(axes, lines, number, label)
            axes.set_yscale("log")
            _plain_ticks(axes.yaxis)
            if name == "distance ratio":
                axes.axhline(1, color="#5a6070", linewidth=0.8, linestyle=":")
            axes.set_xlabel("iteration")
            axes.set_title(name)
        _legend(canvas, [Curve(label_of(g.settings, apart), (), ()) for g in groups])
        yield _drawn("iterations", "How the features come closer, by iteration", canvas)


def _median(axes: Any, lines: Sequence[Points], number: int, label: str) -> None:
    import numpy as np

    by_step: dict[int, list[float]] = {}
    for points in lines:
        for step, value in points:
            if value > 0:
                by_step.setdefault(step, []).append(value)
    if not by_step:
        return
    steps = sorted(by_step)
    low, middle, high = np.array([np.percentile(by_step[step], (25, 50, 75)) for step in steps]).T
    style = {"color": _COLOURS[number], "linestyle": _DASHES[number], "label": label}
    marker = _MARKERS[number] if len(steps) < 12 else None
    axes.plot(steps, middle, marker=marker, **style)
    axes.fill_between(steps, low, high, color=_COLOURS[number], alpha=0.15, linewidth=0)


def _drawn(name: str, title: str, canvas: Any) -> Figure:
    files = {}
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        content = io.BytesIO()
        canvas.savefig(content, format=kind, metadata=metadata, facecolor="white")
        files[kind] = content.getvalue()
    return Figure(name, title, files["png"], files["svg"])
