"""The page's tables of interventions: models or the recipe changed in one thing, and run again."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import pairwise

import pandas as pd
from scipy import stats

from lightning_inversion.ladder.frames import made_here, of_every_width
from lightning_inversion.ladder.intervals import between, changed
from lightning_inversion.ladder.interventions import INTERVENTIONS
from lightning_inversion.report.tables import as_markdown


def effects(rows: pd.DataFrame) -> pd.DataFrame:
    """What an intervention does to the tuned recipe, beside what training does, for each model.

    ``effect`` is untrained - trained without it, ``restored`` with - without it on the trained
    model, ``removed`` without - with it on the untrained one. Models whose effect is less than 0.1
    are left out, and those on which more than one intervention was not run.
    """
    found = []
    run = rows.groupby("model")["intervention"].transform("nunique")
    for _, own in rows[run >= run.max() - 1].groupby("model", sort=False):
        means = own.pivot_table("tuned", "intervention", "share")
        if not {0.0, 1.0} <= {*means.columns}:
            continue
        none = means.loc["none"]
        effect = none[0.0] - none[1.0]
        if effect >= 0.1:
            table = pd.DataFrame({"restored": means[1.0] - none[1.0],
                                  "removed": none[0.0] - means[0.0]})  # fmt: skip
            names = own.iloc[0][["model", "shape", "family", "seed"]].to_dict()
            found.append(table.drop("none").reset_index().assign(effect=effect, **names))
    return pd.concat(found) if found else pd.DataFrame()


def intervention_table(rows: pd.DataFrame, shares: pd.DataFrame) -> str:
    """Tokens right with each intervention at both ends, and the share of the effect it moves."""
    rows = rows[rows["model"].isin(shares["model"])]
    means = rows.pivot_table("tuned", "intervention", "share")
    lines = []
    for name, own in shares.groupby("intervention"):
        shapes = [own, own[own["shape"] == "gpt2"], own[own["shape"] == "llama"]]
        lines.append([
            str(name), str(len(own)), f"{means.loc[name, 1.0]:.2f}",
            *(_share(one, "restored") for one in shapes), f"{means.loc[name, 0.0]:.2f}",
            _share(own, "removed"),
        ])  # fmt: skip
    lines.sort(key=lambda line: -float(line[3]))
    base = means.loc["none"]
    lines.insert(0, ["none", str(len(rows["model"].unique())), f"{base[1.0]:.2f}", "", "", "",
                     f"{base[0.0]:.2f}", ""])  # fmt: skip
    columns = ["intervention", "n", "trained: tokens right", "share restored", "GPT-2", "Llama",
               "untrained: tokens right", "share removed"]  # fmt: skip
    return as_markdown(columns, lines)


def by_width_table(rows: pd.DataFrame) -> str:
    """GPT-2's shape by width: tokens right with each intervention, and the change of a seed."""
    rows = of_every_width(rows[rows["shape"] == "gpt2"])
    seeds = rows.groupby("intervention")["model"].nunique()
    names = [one.name for one in INTERVENTIONS if seeds.get(one.name) == seeds.max()]
    lines = []
    for share, end in ((1.0, "trained"), (0.0, "untrained")):
        right = rows[rows["share"] == share].pivot_table("tuned", "intervention", ["width", "seed"])
        change, widths = right - right.loc["none"], right.columns.unique("width")
        lines += [
            [end, name, *(changed(right.loc[name, one], change.loc[name, one]) for one in widths)]
            for name in names
        ]
    return as_markdown(["model", "intervention", *map(str, widths)], lines)


def size_table(cells: pd.DataFrame, rows: pd.DataFrame) -> str:
    """Every model, with its blocks as they are, times 0.35, and as large as at the other end."""
    ends = cells[cells["share"].isin([0.0, 1.0])].assign(intervention="none")
    others = rows[~((rows["intervention"] == "none") & rows["model"].isin(cells["model"]))]
    lines = []
    for family, own in pd.concat([ends, others]).groupby("family", sort=False):
        line = [str(family)]
        for share in (0.0, 1.0):
            changes = dict([*own[own["share"] == share].groupby("intervention")])
            line.append(f"{changes['none']['block_gain'].mean():.1f}")
            line += [
                between(changes[name]["tuned"]) if name in changes else ""
                for name in ("none", "blocks times 0.35", "blocks of the other size")
            ]
        lines.append(line)
    columns = ["gain", "tokens right", "blocks times 0.35", "of the other size"]
    both = [f"{end}: {name}" for end in ("untrained", "trained") for name in columns]
    return as_markdown(["model", *both], lines)


def gain_table(cells: pd.DataFrame, rows: pd.DataFrame) -> str:
    """Tokens right by what the block adds: all models, and all whose parameters were changed."""
    models = [one.name for one in INTERVENTIONS if one.model is not None]
    readers = {"printed": "printed: mean [least, most]", "tuned": "tuned",
               "tuned_nearest": "tuned, nearest"}  # fmt: skip
    lines = _by_bins(
        pd.concat([cells, made_here(cells, rows[rows["intervention"].isin(models)])]),
        "block_gain", (0.0, 1.0, 3.0, 10.0, math.inf), readers,
    )  # fmt: skip
    return as_markdown(
        ["what the block adds / embedding", "models (trained)", *readers.values()], lines
    )


def room_bins_table(cells: pd.DataFrame, rows: pd.DataFrame) -> str:
    """Tokens right by the room beside the token: all models and all interventions."""
    readers = {"tuned_by_direction": "nearest direction: mean [least, most]",
               "tuned_random_error": "random error", "tuned": "tuned"}  # fmt: skip
    lines = _by_bins(
        pd.concat([cells, made_here(cells, rows)]),
        "tuned_room", (-math.inf, 1.0, 2.0, 3.0, 4.0, 6.0, math.inf), readers,
    )  # fmt: skip
    return as_markdown(["room", "models and interventions (trained)", *readers.values()], lines)


def room_ranks_table(cells: pd.DataFrame, rows: pd.DataFrame) -> str:
    """Rank correlations: of room and tokens right, and of what blocks add and the direction."""
    trained, untrained = cells[cells["share"] == 1], cells[cells["share"] == 0]
    groups = {
        "models and interventions": pd.concat([cells, made_here(cells, rows)]),
        "untrained models": untrained,
        "trained models, the plan's rates": trained[trained["rate"] == 1],
        "trained models, all rates": trained,
    }
    pairs = (("tuned_room", "tuned_by_direction"), ("tuned_room", "tuned"),
             ("block_gain", "tuned_direction"))  # fmt: skip
    lines = [
        [name, str(len(own)),
         *(f"{stats.spearmanr(own[one], own[other]).statistic:+.2f}" for one, other in pairs)]
        for name, own in groups.items()
    ]  # fmt: skip
    columns = ["models", "n", "room, nearest direction", "room, tuned",
               "gain, cosine of input and true token"]  # fmt: skip
    return as_markdown(columns, lines)


def _by_bins(
    points: pd.DataFrame, column: str, edges: Sequence[float], readers: Collection[str]
) -> list[list[str]]:
    """A line for each range of a column: how many points, and what is read there."""
    lines = []
    for least, most in pairwise(edges):
        own = points[(points[column] > least) & (points[column] <= most)]
        name = f"above {least:g}" if most == math.inf else f"{least:g} to {most:g}"
        lines.append([
            f"at most {most:g}" if least == -math.inf else name,
            f"{len(own)} ({(own['share'] == 1).sum()})",
            *(f"{own[one].mean():.2f} [{own[one].min():.2f}, {own[one].max():.2f}]"
              for one in readers),
        ])  # fmt: skip
    return lines


def _share(rows: pd.DataFrame, column: str) -> str:
    return f"{rows[column].sum() / rows['effect'].sum():.2f}" if len(rows) else ""
