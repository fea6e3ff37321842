"""Kept rows -> the tables and figures of ``configs/LADDER.md``, whose text is written by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd

from lightning_inversion.files import read_records
from lightning_inversion.ladder.figures import draw, t_interval
from lightning_inversion.replication.tables import fill
from lightning_inversion.report.tables import as_markdown

SUSPECTS = {
    "embedding_condition": "conditioning of the embedding",
    "anisotropy": "anisotropy of the embedding",
    "row_norm_variation": "variation of the embedding's norms",
    "massive_first": "largest / median activation, position 0",
    "massive_later": "largest / median activation, later",
    "jacobian_largest_later": "largest singular value of the Jacobian",
    "jacobian_condition_later": "conditioning of the Jacobian",
    "steps_to_nearest": "distance to the nearest token / last step",
    "probe_bits": "bits of the linear probe's channel",
}


def frame_of(path: Path) -> pd.DataFrame:
    """Kept rows as a table; with ``family``, the model but for its seed."""
    frame = pd.DataFrame(read_records(path))
    if len(frame):
        names = {"gpt2": "GPT-2", "llama": "Llama"}
        frame["family"] = [
            f"{names[row.shape]} {row.width}, {row.blocks} blocks, V {row.vocabulary}"
            for row in frame.itertuples()
        ]
    if "printed_step" in frame and "nearest_wrong" in frame:
        frame["steps_to_nearest"] = frame["nearest_wrong"] / frame["tuned_step"]
    return frame


def between(values: pd.Series) -> str:
    """A mean with its interval over seeds."""
    low, high = t_interval([*values])
    mean = f"{values.mean():.2f}"
    return mean if math.isnan(low) else f"{mean} [{low:.2f}, {high:.2f}]"


def training_table(cells: pd.DataFrame) -> str:
    """Before and after training, a line for each model and reader; whether intervals touch."""
    ends = cells[(cells["depth"] == 1) & cells["share"].isin([0.0, 1.0])]
    lines = []
    for family, own in ends.groupby("family", sort=False):
        before, after = own[own["share"] == 0], own[own["share"] == 1]
        if not len(before) or not len(after):
            continue
        for column, name in (("printed", "printed"), ("tuned", "tuned"),
                             ("tuned_nearest", "tuned, nearest")):  # fmt: skip
            low, _ = t_interval([*before[column]])
            _, high = t_interval([*after[column]])
            apart = "apart" if high < low else "touch"
            seeds = str(after["seed"].nunique())
            lines.append([family, seeds, name, between(before[column]), between(after[column]),
                          apart])  # fmt: skip
    columns = ["model", "seeds", "recipe", "0%", "100%", "intervals"]
    return as_markdown(columns, lines)


def readers_table(cells: pd.DataFrame) -> str:
    """What probe and recovery read along the training; means over all models."""
    own = cells[cells["depth"] == 1]
    lines = [
        [f"{100 * share:g}%", str(len(rows)), f"{rows['loss'].mean():.2f}",
         *(f"{rows[name].mean():.3f}" for name in
           ("printed", "tuned", "tuned_nearest", "probe_top1")),
         f"{rows['probe_read_bits'].mean():.2f}", f"{rows['recovery_right'].mean():.3f}",
         f"{rows['recovery_verified'].mean():.3f}", f"{rows['recovery_false'].sum():.0f}"]
        for share, rows in own.groupby("share")
    ]  # fmt: skip
    columns = ["training", "models", "loss", "printed", "tuned", "tuned, nearest", "probe",
               "bits", "recovery", "verified", "false"]  # fmt: skip
    return as_markdown(columns, lines)


def width_table(cells: pd.DataFrame) -> str:
    """By width, GPT-2's shape with 1,024 tokens and two blocks, before and after training."""
    own = cells[(cells["depth"] == 1) & (cells["blocks"] == 2) & cells["share"].isin([0.0, 1.0])]
    lines = [
        [f"{shape}, V {vocabulary}, {100 * share:g}%", str(width), str(rows["seed"].nunique()),
         between(rows["printed"]), between(rows["tuned"]), between(rows["tuned_nearest"]),
         f"{rows['jacobian_condition_later'].median():.0f}",
         f"{rows['embedding_condition'].median():.0f}"]
        for (shape, vocabulary, share, width), rows in own.groupby(
            ["shape", "vocabulary", "share", "width"])
    ]  # fmt: skip
    columns = ["models", "width", "seeds", "printed", "tuned", "tuned, nearest",
               "Jacobian's conditioning", "embedding's"]  # fmt: skip
    return as_markdown(columns, lines)


def effects(rows: pd.DataFrame) -> pd.DataFrame:
    """The share of training's effect on the tuned recipe that an intervention moves.

    ``restored``: on the trained model, (with - without) / (untrained - trained). ``removed``: on
    the untrained model, (without - with) / (untrained - trained). Rungs whose effect is less than
    0.1 are left out, and so are exchanges between equals.
    """
    found = []
    for _, own in rows.groupby("model", sort=False):
        means = own.pivot_table("tuned", "intervention", "share")
        if not {0.0, 1.0} <= {*means.columns} or "none" not in means.index:
            continue
        effect = means.loc["none", 0.0] - means.loc["none", 1.0]
        if not effect >= 0.1:
            continue
        table = pd.DataFrame({
            "restored": (means[1.0] - means.loc["none", 1.0]) / effect,
            "removed": (means.loc["none", 0.0] - means[0.0]) / effect,
        }).drop("none").reset_index()  # fmt: skip
        first = own.iloc[0]
        found.append(table.assign(model=first["model"], family=first["family"], seed=first["seed"]))
    return pd.concat(found) if found else pd.DataFrame()


def intervention_table(rows: pd.DataFrame, shares: pd.DataFrame) -> str:
    """Tokens right with each intervention at both ends, and the share of the effect it moves."""
    means = rows.pivot_table("tuned", "intervention", "share")
    lines = []
    for name, own in shares.groupby("intervention"):
        lines.append([
            str(name), str(len(own)), f"{means.loc[name, 1.0]:.2f}", _share(own["restored"]),
            f"{means.loc[name, 0.0]:.2f}", _share(own["removed"]),
        ])  # fmt: skip
    lines.sort(key=lambda line: -float(line[3].split()[0]))
    base = means.loc["none"]
    lines.insert(0, ["none", "", f"{base[1.0]:.2f}", "", f"{base[0.0]:.2f}", ""])
    columns = ["intervention", "models x seeds", "trained", "restored", "untrained", "removed"]
    return as_markdown(columns, lines)


def _share(values: pd.Series) -> str:
    return f"{values.mean():.2f} ({values.min():.2f} to {values.max():.2f})"


def suspects_table(cells: pd.DataFrame) -> str:
    """Rank correlation of each suspect with the tuned recipe: over all, and among the trained.

    The last column is the standardised coefficient of the suspect alone, in logarithms, in a
    regression that also has the share of the training and the width.
    """
    own = cells[cells["depth"] == 1]
    trained = own[own["share"] == 1]
    lines = []
    for column, name in SUSPECTS.items():
        middle = own.groupby(own["share"].isin([1.0]))[column].median()
        lines.append([
            name, f"{middle.get(False, math.nan):.3g}", f"{middle.get(True, math.nan):.3g}",
            f"{_ranks(own, column):+.2f}", f"{_ranks(trained, column):+.2f}",
            f"{_beside(own, column):+.2f}",
        ])  # fmt: skip
    columns = ["suspect", "median, before the end", "median, trained", f"all ({len(own)})",
               f"trained ({len(trained)})", "beside training and width"]  # fmt: skip
    return as_markdown(columns, lines)


def _ranks(frame: pd.DataFrame, column: str) -> float:
    return float(np.corrcoef(frame[column].rank(), frame["tuned"].rank())[0, 1])


def _beside(frame: pd.DataFrame, column: str) -> float:
    parts = [np.log(frame[column].clip(lower=1e-9)), frame["share"] > 0, np.log(frame["width"]),
             np.sqrt(frame["share"])]  # fmt: skip
    design = np.stack([(p - np.mean(p)) / (np.std(p) + 1e-12) for p in map(np.asarray, [
        np.asarray(part, dtype=float) for part in parts])], axis=1)  # fmt: skip
    right = frame["tuned"].to_numpy(dtype=float)
    found, *_ = np.linalg.lstsq(design, (right - right.mean()) / right.std(), rcond=None)
    return float(found[0])


def channel_table(rows: pd.DataFrame) -> str:
    """Features at which each reader crosses a tenth, a half and nine tenths of what all give."""
    names = {"tuned": "recipe", "tuned_nearest": "recipe, nearest", "probe_top1": "probe",
             "recovery_right": "recovery", "theory_right": "Fano bound"}  # fmt: skip
    lines = []
    for (model, share), own in rows.groupby(["model", "share"], sort=False):
        own = own.sort_values("kept")
        for column, name in names.items():
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
    """What the probe and recovery read of what is left of the features."""
    lines = [
        [row.model, f"{100 * row.share:g}%", str(row.depth), row.channel,
         f"{row.probe_read_bits:.1f} of {math.log2(row.vocabulary):.1f}", f"{row.probe_top1:.2f}",
         f"{row.recovery_right:.2f}", f"{row.recovery_verified:.2f}", str(row.recovery_false)]
        for row in rows.itertuples()
    ]  # fmt: skip
    columns = ["model", "training", "depth", "what is left", "probe, bits a token", "probe, top 1",
               "recovery", "verified", "false"]  # fmt: skip
    return as_markdown(columns, lines)


def write(folder: Path, page: Path) -> list[Path]:
    """Write the figures, and the tables into the page; returns what was written.

    Args:
        folder: of the kept rows.
        page: whose tables are filled; figures go to ``images`` beside it.

    Raises:
        InputError: the page has other marks than there are tables.
    """
    cells, rows, channel, survival = (
        frame_of(folder / f"{name}.jsonl")
        for name in ("cells", "interventions", "channel", "survival")
    )
    shares = effects(rows) if len(rows) else rows
    tables = {
        "training": training_table(cells), "readers": readers_table(cells),
        "width": width_table(cells), "suspects": suspects_table(cells),
        "interventions": intervention_table(rows, shares), "channel": channel_table(channel),
        "survival": survival_table(survival),
    }  # fmt: skip
    page.write_text(fill(page.read_text("utf-8"), tables), encoding="utf-8")
    written = [page]
    for figure in draw(cells, shares, channel):
        path = page.parent / "images" / f"{figure.name}.png"
        path.write_bytes(figure.png)
        written.append(path)
    return written
