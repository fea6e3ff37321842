"""One prompt at each depth: which of its tokens can be read where."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from lightning_inversion.files import visible
from lightning_inversion.report.canvas import FigureStyle, RenderedFigure, rendered
from lightning_inversion.report.load import (
    CONDITIONAL,
    DUPLICATE,
    FALSE,
    GIVEN,
    GROUP,
    IN_TOP_K,
    RIGHT,
    UNKNOWN,
    VERIFIED,
    WRONG,
    Loaded,
)

MAX_POSITIONS = 48
"""Positions of the picture; of a longer prompt the first."""
_WIDTH = 4.7
"""Inches of the picture at most; a narrow screen has no more."""
_KINDS = (
    ("verified", "#8fd3bd", VERIFIED + DUPLICATE),
    ("right, not verified", "#a9d0ef", RIGHT),
    ("wrong, right among the best", "#f7d080", IN_TOP_K),
    ("wrong", "#eda583", WRONG),
    ("reproduces the target, not verified", "#d9c8ea", CONDITIONAL + GROUP),
    ("not verified, truth unknown", "#e3e5ea", UNKNOWN),
    ("given", "#ffffff", GIVEN),
    ("verified and wrong", "#000000", FALSE),
)
"""What a colour means, and the marks that have it."""


def draw_layers(loaded: Loaded, style: FigureStyle) -> Iterator[RenderedFigure]:
    """Positions downwards, depths across, for the first prompt that most depths have.

    Nothing where no prompt ran at two depths with settings that are otherwise the same.
    """
    rows = rows_by_depth(loaded)
    if len(rows) < 2:
        return
    length = min(MAX_POSITIONS, max(len(row.marks) for row in rows.values()))
    kind_of = {mark: number for number, (_, _, marks) in enumerate(_KINDS) for mark in marks}
    width = max(style.width, min(_WIDTH, 0.9 + 0.1 * style.font * len(rows)))
    letters = max(1, int((width - 0.9) / len(rows) / (0.0065 * style.font)))
    height = 0.9 + 0.025 * style.font * length
    canvas = FigureStyle(width, height, style.font).canvas(1)
    axes = canvas.add_subplot()
    cells = [
        [kind_of[row.marks[position]] if position < len(row.marks) else float("nan")
         for row in rows.values()]
        for position in range(length)
    ]  # fmt: skip
    colours = ListedColormap([colour for _, colour, _ in _KINDS])
    edges: Any = {"edgecolors": "white", "linewidth": 0.8}
    axes.pcolormesh(pd.DataFrame(cells).to_numpy(), cmap=colours, vmin=-0.5, vmax=7.5, **edges)
    for column, row in enumerate(rows.values()):
        for position, token in enumerate(_tokens(row, letters)[:length]):
            ink = "white" if row.marks[position] == FALSE else "#1a1c21"
            axes.text(column + 0.5, position + 0.5, token, ha="center", va="center", color=ink,
                      fontsize=0.8 * style.font)  # fmt: skip
    axes.set_xticks([column + 0.5 for column in range(len(rows))], [f"{d:g}" for d in rows])
    axes.set_yticks([position + 0.5 for position in range(length)], [*map(str, range(length))])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.set_ylim(length, 0)
    axes.set(xlabel="depth", ylabel="position")
    used = {mark for row in rows.values() for mark in row.marks}
    patches = [
        Patch(facecolor=colour, edgecolor="#5a6070", label=name)
        for name, colour, marks in _KINDS
        if used & set(marks)
    ]
    canvas.legend(handles=patches, loc="outside lower center", ncols=min(2, len(patches)))
    number = next(iter(rows.values())).index + 1
    title = f"What is recovered of prompt {number}, by depth and position"
    yield rendered("layers", title, canvas)


def rows_by_depth(loaded: Loaded) -> dict[Any, Any]:
    """For the prompt and the settings that have most depths, the first row at each depth.

    Ties go to the settings that verify most.
    """
    others = loaded.settings.drop(columns="depth")
    line = others.groupby([*others], dropna=False, sort=False).ngroup()
    results = loaded.results[loaded.results["marks"] != ""]
    experiment = results["experiment"]
    results = results.assign(
        line=experiment.map(line), depth=experiment.map(loaded.settings["depth"])
    ).dropna(subset="depth")
    if results.empty:
        return {}
    results = results.sort_values(["index", "seed", "depth"], kind="stable")
    count = results.groupby(["line", "key"], sort=False)["depth"].nunique()
    most = results.groupby("line")["verified_share"].mean().fillna(0)
    chosen, key = (
        count + most.reindex(count.index.get_level_values("line")).to_numpy() / 2
    ).idxmax()
    own = results[(results["line"] == chosen) & (results["key"] == key)]
    return {
        row.depth: row for row in own.drop_duplicates("depth").sort_values("depth").itertuples()
    }


def _tokens(row: Any, letters: int) -> list[str]:
    """The tokens of a row, cut to so many letters; nothing where the row does not hold them."""
    if len(row.tokens) != len(row.marks):
        return []
    return [(visible(token).strip() or "␣")[:letters] for token in row.tokens]
