"""Kept rows -> the tables and figures of ``configs/LADDER.md``, whose text is written by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from lightning_inversion.ladder.figures import READERS, draw
from lightning_inversion.ladder.frames import SHAPES, frame_of, of_every_width
from lightning_inversion.ladder.intervals import between, t_interval
from lightning_inversion.ladder.intervention_tables import (
    by_width_table,
    effects,
    gain_table,
    intervention_table,
    room_bins_table,
    room_ranks_table,
    size_table,
)
from lightning_inversion.replication.tables import fill
from lightning_inversion.report.tables import as_markdown

SUSPECTS = {
    "embedding_condition": "conditioning of the embedding",
    "anisotropy": "anisotropy of the embedding",
    "row_norm_variation": "variation of the embedding's norms",
    "block_gain": "what the block adds / embedding",
    "massive_first": "largest / median activation, position 0",
    "massive_later": "largest / median activation, later",
    "jacobian_largest_later": "largest singular value of the Jacobian",
    "jacobian_median_later": "median singular value of the Jacobian",
    "jacobian_condition_later": "conditioning of the Jacobian",
    "steps_to_nearest": "distance to the nearest token / last step",
    "probe_bits": "bits of the linear probe's channel",
    "tuned_room": "room beside the token",
}
SLOPES = {
    "printed": "printed",
    "tuned": "tuned",
    "tuned_nearest": "tuned, nearest",
    "tuned_by_direction": "tuned, nearest direction",
    "tuned_far_apart": "the same, tokens far apart only",
    "tuned_in_64": "the same, in 64 dimensions",
}


def training_table(cells: pd.DataFrame) -> str:
    """Before and after training, a line for each model and reader; whether intervals touch."""
    ends = cells[cells["share"].isin([0.0, 1.0])]
    lines = []
    for family, own in ends.groupby("family", sort=False):
        before, after = own[own["share"] == 0], own[own["share"] == 1]
        if not len(before) or not len(after):
            continue
        for column, name in (("printed", "printed"), ("tuned", "tuned"),
                             ("tuned_nearest", "tuned, nearest")):  # fmt: skip
            (low, high), (least, most) = (t_interval([*o[column]]) for o in (before, after))
            apart = "apart" if most < low or high < least else "touch"
            seeds = str(after["seed"].nunique())
            change = after.set_index("seed")[column] - before.set_index("seed")[column]
            lines.append([family, seeds, name, between(before[column]), between(after[column]),
                          apart, between(change, -1.0)])  # fmt: skip
    columns = ["model", "seeds", "recipe", "0%", "100%", "intervals", "change of a seed"]
    return as_markdown(columns, lines)


def readers_table(cells: pd.DataFrame) -> str:
    """What each reader reads along the training; means over the models with rows at every share."""
    counts = cells.groupby("model")["share"].transform("nunique")
    cells = cells[counts == cells["share"].nunique()]
    lines = [
        [f"{100 * share:g}%", str(len(rows)), f"{rows['loss'].mean():.2f}",
         *(f"{rows[name].mean():.3f}" for name in
           ("printed", "tuned", "tuned_nearest", "probe_top1")),
         f"{rows['probe_read_bits'].mean():.2f}", f"{rows['recovery_right'].mean():.3f}",
         f"{rows['recovery_verified'].mean():.3f}", f"{rows['recovery_false'].sum():.0f}"]
        for share, rows in cells.groupby("share")
    ]  # fmt: skip
    columns = ["training", "models", "loss", "printed", "tuned", "tuned, nearest", "probe",
               "bits", "recovery", "verified", "false"]  # fmt: skip
    return as_markdown(columns, lines)


def width_table(cells: pd.DataFrame) -> str:
    """By width, shape and vocabulary, models of two blocks before and after training."""
    own = cells[(cells["blocks"] == 2) & cells["share"].isin([0.0, 1.0])]
    lines = [
        [f"{SHAPES[shape]}, V {vocabulary}, {100 * share:g}%", str(width),
         str(rows["seed"].nunique()),
         *(between(rows[one]) for one in ("printed", "tuned", "tuned_nearest")),
         f"{rows['jacobian_condition_later'].median():.0f}",
         f"{rows['embedding_condition'].median():.0f}"]
        for (shape, vocabulary, share, width), rows in own.groupby(
            ["shape", "vocabulary", "share", "width"])
    ]  # fmt: skip
    columns = ["models", "width", "seeds", "printed", "tuned", "tuned, nearest",
               "Jacobian's conditioning", "embedding's"]  # fmt: skip
    return as_markdown(columns, lines)


def slope_table(cells: pd.DataFrame) -> str:
    """Tokens right for each doubling of three widths or more, by least squares."""
    own = of_every_width(cells)
    lines = []
    for (shape, share), rows in own[own["share"].isin([0.0, 1.0])].groupby(["shape", "share"]):
        if rows["width"].nunique() < 3:
            continue
        for column, name in SLOPES.items():
            fit = stats.linregress(np.log2(rows["width"]), rows[column])
            half = stats.t.ppf(0.975, len(rows) - 2) * fit.stderr
            low, high = fit.slope - half, fit.slope + half
            lines.append([SHAPES[shape], f"{100 * share:g}%", name, str(len(rows)),
                          f"{fit.slope:+.2f} [{low:+.2f}, {high:+.2f}]"])  # fmt: skip
    return as_markdown(["shape", "training", "recipe", "models", "for each doubling"], lines)


def suspects_table(cells: pd.DataFrame) -> str:
    """Rank correlation of each suspect with the tuned recipe: of all, untrained, trained models.

    The last column is the standardised coefficient of the suspect alone, in logarithms, in a
    regression that also has the share of the training and the width.
    """
    untrained, trained = cells[cells["share"] == 0], cells[cells["share"] == 1]
    lines = []
    for column, name in SUSPECTS.items():
        middle = cells.groupby(cells["share"].isin([1.0]))[column].median()
        lines.append([
            name, f"{middle.get(False, math.nan):.3g}", f"{middle.get(True, math.nan):.3g}",
            *(f"{_ranks(own, column):+.2f}" for own in (cells, untrained, trained)),
            f"{_beside(cells, column):+.2f}",
        ])  # fmt: skip
    columns = [
        "suspect", "median, before the end", "median, trained", f"all ({len(cells)})",
        f"untrained ({len(untrained)})", f"trained ({len(trained)})", "beside training and width",
    ]  # fmt: skip
    return as_markdown(columns, lines)


def _ranks(frame: pd.DataFrame, column: str) -> float:
    return float(stats.spearmanr(frame[column], frame["tuned"]).statistic)


def _beside(frame: pd.DataFrame, column: str) -> float:
    parts = [np.log(frame[column]), frame["share"] > 0, np.sqrt(frame["share"]),
             np.log(frame["width"]), frame["tuned"]]  # fmt: skip
    table = np.stack([np.asarray(part, dtype=float) for part in parts], axis=1)
    table = (table - table.mean(0)) / (table.std(0) + 1e-12)
    found, *_ = np.linalg.lstsq(table[:, :-1], table[:, -1], rcond=None)
    return float(found[0])


def room_table(cells: pd.DataFrame) -> str:
    """The room beside a token, what it is made of, and what is read without a part of it."""
    own = cells[(cells["blocks"] == 2) & cells["share"].isin([0.0, 1.0])]
    names = ("in_64", "far_apart", "as_few", "random_error")
    lines = [
        [f"{SHAPES[shape]}, V {vocabulary}, {100 * share:g}%", str(width),
         f"{rows['tuned_direction'].mean():.2f}", f"{rows['tuned_nearest_direction'].mean():.2f}",
         between(rows["tuned_room"], -math.inf, math.inf), between(rows["tuned_by_direction"]),
         *(f"{rows[f'tuned_{name}'].mean():.2f}" for name in names)]
        for (shape, vocabulary, share, width), rows in own.groupby(
            ["shape", "vocabulary", "share", "width"])
    ]  # fmt: skip
    columns = ["models", "width", "input to true token", "true to nearest wrong", "room",
               "tokens right", "in 64 dimensions", "tokens far apart", "as few at random",
               "random error"]  # fmt: skip
    return as_markdown(columns, lines)


def rate_table(cells: pd.DataFrame) -> str:
    """Models of two blocks trained at several learning rates, and what was read before."""
    own = of_every_width(cells)
    before = own[own["share"] == 0].groupby(["shape", "width"])["tuned"].agg(list)
    lines = [
        [SHAPES[shape], str(width), f"{learning_rate:g}" + ("" if rate != 1 else " (the plan's)"),
         str(rows["seed"].nunique()), between(rows["loss"], 0.0, math.inf),
         f"{rows['block_gain'].mean():.1f}", f"{rows['tuned_nearest_direction'].mean():.2f}",
         f"{rows['tuned_room'].mean():.1f}", between(pd.Series(before[shape, width])),
         *(between(rows[name]) for name in ("tuned", "tuned_nearest"))]
        for (shape, width, learning_rate, rate), rows in _by_rate(cells).groupby(
            ["shape", "width", "learning_rate", "rate"])
    ]  # fmt: skip
    columns = ["shape", "width", "learning rate", "seeds", "loss", "gain", "true to nearest wrong",
               "room", "before the training: tuned", "tuned", "tuned, nearest"]  # fmt: skip
    return as_markdown(columns, lines)


def rate_ranks_table(cells: pd.DataFrame) -> str:
    """What goes with the tokens right over the models of ``rate_table``: rank correlations."""
    own = _by_rate(cells)
    groups = (own, own[own["rate"] == 1])
    suspects = {"width": "width", "learning_rate": "learning rate", "loss": "loss"} | {
        column: SUSPECTS[column] for column in ("block_gain", "tuned_room")
    }
    lines = [
        [name, *(f"{_ranks(rows, column):+.2f}" if rows[column].nunique() > 1 else ""
                 for rows in groups)]
        for column, name in suspects.items()
    ]  # fmt: skip
    plan = (own["rate"] == 1).sum()
    return as_markdown(["suspect", f"all rates ({len(own)})", f"the plan's ({plan})"], lines)


def _by_rate(cells: pd.DataFrame) -> pd.DataFrame:
    """The trained models of those widths and shapes whose learning rate was varied."""
    own = of_every_width(cells[cells["share"] == 1])
    return own[own.groupby(["shape", "width"])["rate"].transform("nunique") > 1]


def channel_table(rows: pd.DataFrame) -> str:
    """Features at which each reader crosses a tenth, a half and nine tenths of what all give."""
    lines = []
    for (model, share), own in rows.groupby(["model", "share"], sort=False):
        own = own.sort_values("kept")
        for column, name in READERS.items():
            whole = float(own[column].iloc[-1])
            crossings = [_crossing(own, column, part * whole) for part in (0.1, 0.5, 0.9)]
            lines.append([f"{model}, {100 * share:g}%", name, f"{whole:.2f}",
                          *("-" if whole < 0.1 else str(one) for one in crossings)])  # fmt: skip
    columns = ["model", "reader", "all features", "10% of that from", "50% from", "90% from"]
    return as_markdown(columns, lines)


def _crossing(rows: pd.DataFrame, column: str, level: float) -> int:
    """The fewest features from which on a reader stays at a level."""
    below = rows[rows[column] < level]["kept"]
    least = 0 if below.empty else below.max()
    return int(rows[rows["kept"] > least]["kept"].min())


def survival_table(rows: pd.DataFrame) -> str:
    """Bits of the probe, tokens that recovery reads and tokens verified, by what is left."""
    settings = [*rows["channel"].unique()]
    lines = []
    for (model, share, depth), own in rows.groupby(["model", "share", "depth"], sort=False):
        cells = {
            row.channel: f"{row.probe_read_bits:.1f} / {row.recovery_right:.2f} / "
            f"{row.recovery_verified:.2f}"
            for row in own.itertuples()
        }
        top = math.log2(own["vocabulary"].iloc[0])
        lines.append([f"{model}, {100 * share:g}%", str(depth), f"{top:.1f}",
                      *(cells.get(name, "") for name in settings),
                      str(own["recovery_false"].sum())])  # fmt: skip
    return as_markdown(["model", "depth", "log2 V", *settings, "false"], lines)


def tables_of(folder: Path) -> dict[str, str]:
    """The tables of the page, by name, from the folder of kept rows."""
    every, rows, channel, survival = _frames(folder)
    cells = every[every["rate"] == 1]
    return {
        "training": training_table(cells),
        "readers": readers_table(cells),
        "width": width_table(cells),
        "slopes": slope_table(cells),
        "suspects": suspects_table(cells),
        "room": room_table(cells),
        "room bins": room_bins_table(every, rows),
        "room ranks": room_ranks_table(every, rows),
        "rates": rate_table(every),
        "rate ranks": rate_ranks_table(every),
        "interventions": intervention_table(rows, effects(rows)),
        "interventions by width": by_width_table(rows),
        "sizes": size_table(cells, rows),
        "gain": gain_table(every, rows),
        "channel": channel_table(channel),
        "survival": survival_table(survival),
    }


def _frames(folder: Path) -> list[pd.DataFrame]:
    names = ("cells", "interventions", "channel", "survival")
    return [frame_of(folder / f"{name}.jsonl") for name in names]


def write(folder: Path, page: Path) -> list[Path]:
    """Write the tables into the page, and the figures; returns what was written.

    Args:
        folder: of the kept rows.
        page: whose tables are filled; figures go to ``images`` beside it.

    Raises:
        InputError: the page has other marks than there are tables.
    """
    page.write_text(fill(page.read_text("utf-8"), tables_of(folder)), encoding="utf-8")
    written, (cells, rows, channel, _) = [page], _frames(folder)
    for figure in draw(cells, rows, effects(rows)["model"], channel):
        path = page.parent / "images" / f"{figure.name}.png"
        path.write_bytes(figure.png)
        written.append(path)
    return written
