"""The runs of an audit -> one page that sums up how much an observer recovers.

Reads only result files; each sentence is computed from their rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lightning_inversion.errors import InputError
from lightning_inversion.report.labels import model_name
from lightning_inversion.report.load import Loaded, load_results
from lightning_inversion.report.page import render_page
from lightning_inversion.report.tables import in_percent, summarize

ATTACKS = {"predict": "exact recovery", "fit": "gradient inversion"}
"""What each command is called on the page, the stronger first."""
_STATES = {"waiting": "not run yet", "done": "no results"}


@dataclass(frozen=True)
class AuditRun:
    """One run of an audit.

    Attributes:
        command: fit or predict.
        depth: after how many blocks the observer looks.
        channel: what happened to the activations.
        rows: its result file; None where it has no row.
        state: waiting, done or failed.
        message: why it failed.
    """

    command: str
    depth: int
    channel: str
    rows: Path | None
    state: str
    message: str | None = None

    @property
    def key(self) -> tuple[str, int, str]:
        """Identifies the run within its audit."""
        return self.command, self.depth, self.channel

    def __str__(self) -> str:
        return f"{ATTACKS[self.command]} at depth {self.depth}, {self.channel}"


@dataclass(frozen=True)
class Share:
    """What one run recovered.

    Attributes:
        right: mean over the prompts of the share of tokens that are right; a long prompt counts as
            much as a short one, as everywhere on the page.
        verified: the same of tokens that are verified.
        exact: how many prompts are recovered exactly.
        prompts: how many prompts the run has.
        false: how many tokens are verified, and yet wrong.
    """

    right: float
    verified: float
    exact: int
    prompts: int
    false: int

    @property
    def cell(self) -> str:
        """The shares as the page's table shows them."""
        return f"{in_percent(self.right)}, {in_percent(self.verified)} verified"

    def __str__(self) -> str:
        words = {0.0: "none", 1.0: "all"}
        verified = words.get(self.verified, in_percent(self.verified))
        return f"{in_percent(self.right)} of the tokens, {verified} verified"


Shares = dict[tuple[str, int, str], Share]


def write_audit(runs: Sequence[AuditRun], out: Path, max_prompts: int = 20) -> Path:
    """Write the page of an audit; returns its path.

    Args:
        runs: all its runs, done or not, in order.
        out: the file.
        max_prompts: recovered prompts shown for each run.

    Raises:
        InputError: no run has a result.
    """
    loaded = _load(runs)
    table = summarize(loaded)
    shares = _shares(loaded, table)
    model = str(loaded.settings["model"].iloc[0])
    columns = sorted({(run.depth, [*ATTACKS].index(run.command)) for run in runs})
    heads = [([*ATTACKS][attack], depth) for depth, attack in columns]
    content = render_page(
        loaded,
        table,
        [],
        f"What an observer recovers from {model_name(model)}",
        max_prompts,
        "audit.html",
        "audit.csv",
        sentences=summary(runs, shares),
        heads=[f"depth {depth}, {ATTACKS[command]}" for command, depth in heads],
        matrix=_matrix(runs, shares, heads),
    )
    out.write_text(content, encoding="utf-8")
    table.to_csv(out.with_name("audit.csv"), index=False)
    return out


def _load(runs: Sequence[AuditRun]) -> Loaded:
    """All results, each with its run as its experiment."""
    results, settings, files, skipped = {}, {}, [], []
    for number, run in enumerate(runs):
        if run.rows is None:
            continue
        try:
            found = load_results([run.rows])
        except InputError as error:  # no prompt of it could be run
            skipped.append((run.rows, str(error)))
            continue
        results[number] = found.results.assign(experiment=number)
        settings[number] = (run.command, found.settings["model"].iloc[0], run.depth, run.channel)
        files += found.files
        skipped += found.skipped
    if not results:
        raise InputError("The audit has no result yet; run it again.")
    columns = ["command", "model", "depth", "channel"]
    table = pd.DataFrame.from_dict(settings, "index", dtype=object, columns=columns)
    table = table.sort_values("depth", kind="stable")
    return Loaded(pd.concat(results.values(), ignore_index=True), table, files, skipped)


def _shares(loaded: Loaded, table: pd.DataFrame) -> Shares:
    table = table.fillna({"tokens right": 0.0, "verified": 0.0})
    exact = loaded.results.groupby("experiment")["exact"].sum()
    prompts = loaded.results.groupby("experiment").size()
    return {
        (run.command, run.depth, run.channel): Share(
            right=float(table["tokens right"][run.Index]),
            verified=float(table["verified"][run.Index]),
            exact=int(exact[run.Index]),
            prompts=int(prompts[run.Index]),
            false=int(table["verified and wrong"][run.Index]),
        )
        for run in loaded.settings.itertuples()
    }


def summary(runs: Sequence[AuditRun], shares: Shares) -> list[str]:
    """The results in plain sentences; first, whether all runs are done."""
    sentences = []
    undone = [run for run in runs if run.state != "done"]
    if undone:
        sentences.append(
            f"This is a part of the audit: {len(runs) - len(undone)} of {len(runs)} runs are "
            "done. Run the same command again to resume it."
        )
        sentences += [f"Failed: {run} ({run.message})." for run in undone if run.state == "failed"]
    for depth in dict.fromkeys(run.depth for run in runs):
        channels = dict.fromkeys(run.channel for run in runs if run.depth == depth)
        for command, attack in ATTACKS.items():
            own = {c: share for c in channels if (share := shares.get((command, depth, c)))}
            if own:
                sentences.append(_sentence(depth, attack, own))
    false = sum(share.false for share in shares.values())
    if false:
        sentences.append(f"{false} verified tokens are wrong: a fault of the method.")
    elif any(share.verified for share in shares.values()):
        sentences.append("No verified token is wrong.")
    return sentences


def _sentence(depth: int, attack: str, shares: dict[str, Share]) -> str:
    """What one attack recovers at one depth; the other channels are compared with the first."""
    (first, base), *others = shares.items()
    exact = f"{base.exact} of {base.prompts} prompts exactly"
    sentence = f"At depth {depth}, {attack} finds {base}, and {exact} ({first})."
    same = [channel for channel, share in others if share == base]
    if same:
        sentence += f" The same with: {', '.join(same)}."
    for channel, share in others:
        if share != base:
            sentence += f" {channel[:1].upper()}{channel[1:]}: {share}."
    return sentence


def _matrix(
    runs: Sequence[AuditRun], shares: Shares, heads: Sequence[tuple[str, int]]
) -> list[tuple[str, list[Any]]]:
    """For each channel the share of each column, or a word where there is none."""
    states = {run.key: _STATES.get(run.state, run.state) for run in runs}
    return [
        (channel, [shares.get(key := (*head, channel)) or states.get(key, "") for head in heads])
        for channel in dict.fromkeys(run.channel for run in runs)
    ]
