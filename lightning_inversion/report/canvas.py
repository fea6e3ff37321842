"""A figure as matplotlib draws it, and as the files that a report has of it.

Figures are made without pyplot: no window system is asked for, and no state is shared.
"""

from __future__ import annotations

import base64
import io
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import LogLocator, NullFormatter

MAX_LINES = 7
"""Lines of a figure; the others are in the table."""
_LETTERS = 12
"""Letters of a legend in an inch."""
_HANDLE = 7
"""Letters that fit into a line's sample and the gap to the next one."""
_LINE = 0.17
"""Height in inches of a line of a legend."""
_STYLE: Any = {
    **sns.axes_style("whitegrid"),
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
        narrow: the SVG with its panels one below the other; empty where it has a single panel.
    """

    name: str
    title: str
    png: bytes
    svg: bytes
    narrow: bytes = b""

    @property
    def source(self) -> str:
        """The figure as a ``data:`` address, for a page that fetches nothing."""
        return _address(self.svg)

    @property
    def narrow_source(self) -> str:
        """As ``source``, for a narrow screen; '' where the figure is narrow itself."""
        return _address(self.narrow) if self.narrow else ""

    def save(self, folder: Path) -> list[Path]:
        """Write both files; returns them."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{self.name}.png", folder / f"{self.name}.svg"]
        for path, content in zip(paths, (self.png, self.svg), strict=True):
            path.write_bytes(content)
        return paths


def _address(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


@dataclass(frozen=True)
class FigureStyle:
    """The size of figures.

    Attributes:
        width: of a panel, in inches.
        height: of a panel, in inches.
        font: size of the letters, in points.
    """

    width: float = 3.4
    height: float = 3.2
    font: float = 9.0

    def canvas(self, panels: float) -> Figure:
        """An empty figure as wide as so many panels."""
        size = (self.width * panels + 0.4, self.height)
        return Figure(figsize=size, layout="constrained")

    @property
    def settings(self) -> Any:
        """The settings of matplotlib."""
        context = sns.plotting_context("paper", font_scale=self.font / 9)
        return {**_STYLE, **context}


def plain_ticks(axis: Any) -> None:
    """Write the numbers of a logarithmic axis out: 20, not 2 times 10 to the 1."""
    low, high = axis.get_view_interval()
    # Over many powers of ten there is no room for more than the powers.
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def draw_legend(canvas: Any, labels: pd.Series) -> None:
    """One legend for all panels, below them, in the height that its labels take."""
    for old in canvas.legends:
        old.remove()
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


def rendered(
    name: str,
    title: str,
    canvas: Any,
    style: FigureStyle | None = None,
    labels: pd.Series | None = None,
) -> RenderedFigure:
    """A figure as files: with its panels side by side, and one below the other.

    Args:
        name: of its files.
        title: what it shows.
        canvas: the figure.
        style: the size of its panels.
        labels: of its lines, for a legend; None where it has its own, and a single panel.
    """
    if labels is not None:
        draw_legend(canvas, labels)
    png, svg = _file(canvas, "png"), _file(canvas, "svg")
    panels = canvas.axes
    if len(panels) == 1 or style is None or labels is None:
        return RenderedFigure(name, title, png, svg)
    canvas.set_size_inches(style.width + 0.4, style.height * len(panels))
    grid = GridSpec(len(panels), 1, figure=canvas)
    for number, panel in enumerate(panels):
        panel.set_subplotspec(grid[number])
    draw_legend(canvas, labels)
    return RenderedFigure(name, title, png, svg, _file(canvas, "svg"))


def _file(canvas: Any, kind: str) -> bytes:
    content = io.BytesIO()
    metadata: dict[str, Any] = {"png": {"Software": None}, "svg": {"Date": None}}[kind]
    canvas.savefig(content, format=kind, metadata=metadata, facecolor="white")
    return content.getvalue()
