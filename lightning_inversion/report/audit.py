"""The runs of an audit -> one page that says in plain words how much an observer reads.

Reads result files alone; each sentence is computed from their rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightning_inversion.errors import InputError
from lightning_inversion.report.load import Reading, Result, read
from lightning_inversion.report.page import page
from lightning_inversion.report.statistics import Group, grouped, in_percent
from lightning_inversion.report.tables import lines_of

ATTACKS = {"predict": "exact recovery", "fit": "gradient inversion"}
"""What each command is called, the stronger first."""


@dataclass(frozen=True)
class Part:
    """One run of an audit.

    Attributes:
        command: fit or predict.
        depth: after how many blocks the observer looks.
        channel: what happened to the activations.
        rows: its result file; None where it has not one row.
        state: waiting, running, done or failed.
        message: why it failed.
    """

    command: str
    depth: int
    channel: str
    rows: Path | None
    state: str
    message: str | None = None

    @property
    def name(self) -> str:
        """In words."""
        return f"{ATTACKS[self.command]} at depth {self.depth}, {self.channel}"


@dataclass(frozen=True)
class Outcome:
    """What an observer has read of the texts.

    Shares are means over the texts, as everywhere else on the page: a long text counts no more
    than a short one.

    Attributes:
        right: the share of tokens that are read right.
        verified: the share of tokens that are verified by running them.
        false: how many tokens are verified, and yet wrong.
        texts: how many.
        exact: texts that are read whole.
    """

    right: float
    verified: float
    false: int
    texts: int
    exact: int

    @classmethod
    def of(cls, results: Sequence[Result]) -> Outcome:
        """What the results come to."""
        group = Group({}, tuple(results))
        right, verified = group.mean("token_accuracy"), group.mean("verified_share")
        return cls(
            right=right.value if right else 0,
            verified=verified.value if verified else 0,
            false=group.false_proofs,
            texts=len(results),
            exact=sum(bool(result.exact) for result in results),
        )

    @property
    def read(self) -> str:
        """The share of tokens that is right."""
        return in_percent(self.right)

    @property
    def proof(self) -> str:
        """The share of tokens that is verified."""
        return in_percent(self.verified)

    def __str__(self) -> str:
        verified = "all verified" if self.verified == 1 else f"{self.proof} verified"
        if not self.verified:
            verified = "none verified"
        return f"{self.read} of the tokens, {verified}"


def write_audit(parts: Sequence[Part], out: Path, texts: int = 20) -> Path:
    """Write the page of an audit; returns its path.

    Args:
        parts: all its runs, done or not, in order.
        out: the file.
        texts: recovered texts shown for each run.

    Raises:
        InputError: not one run has a result.
    """
    reading, outcomes = _gather(parts)
    model = str(reading.results[0].settings["model"])
    content = page(
        reading,
        lines_of(grouped(reading.results)),
        [],
        f"What an observer reads from {model.rpartition('/')[2]}",
        texts,
        "audit.html",
        sentences=summary(parts, outcomes),
        columns=_columns(parts),
        matrix=_matrix(parts, outcomes),
    )
    out.write_text(content, encoding="utf-8")
    return out


Key = tuple[str, int, str]


def _gather(parts: Sequence[Part]) -> tuple[Reading, dict[Key, Outcome]]:
    """All results, each with the run that it is of as its settings."""
    together, outcomes = Reading(), {}
    for part in parts:
        if part.rows is None:
            continue
        try:
            found = read([part.rows])
        except InputError as error:  # no prompt of it could be run
            together.skipped.append((part.rows, str(error)))
            continue
        settings = {
            "command": part.command,
            "model": found.results[0].settings["model"],
            "depth": part.depth,
            "channel": part.channel,
        }
        results = [replace(result, settings=settings) for result in found.results]
        together.results += results
        together.files += found.files
        together.skipped += found.skipped
        outcomes[part.command, part.depth, part.channel] = Outcome.of(results)
    if not outcomes:
        raise InputError("The audit has no result yet; run it again.")
    return together, outcomes


def summary(parts: Sequence[Part], outcomes: dict[Key, Outcome]) -> list[str]:
    """What the runs come to, in plain sentences; first, whether all of them have ended."""
    said = []
    undone = [part for part in parts if part.state != "done"]
    if undone:
        said.append(
            f"This is a part of the audit: {len(parts) - len(undone)} of {len(parts)} runs are "
            "done. The same command goes on."
        )
        said += [f"Failed: {p.name} ({p.message})." for p in undone if p.state == "failed"]
    for depth in dict.fromkeys(part.depth for part in parts):
        channels = list(dict.fromkeys(part.channel for part in parts if part.depth == depth))
        for command, name in ATTACKS.items():
            here = {c: o for c in channels if (o := outcomes.get((command, depth, c)))}
            said += _of_attack(depth, name, here)
    false = sum(outcome.false for outcome in outcomes.values())
    if false:
        said.append(f"{false} verified tokens are wrong: a fault of the method.")
    elif any(outcome.verified for outcome in outcomes.values()):
        said.append("No verified token is wrong.")
    return said


def _of_attack(depth: int, name: str, here: dict[str, Outcome]) -> list[str]:
    """What one way of reading comes to at one depth; the first channel is the measure."""
    if not here:
        return []
    (first, base), *others = here.items()
    whole = f"{base.exact} of {base.texts} texts whole"
    said = f"At depth {depth}, {name} reads {base}, and {whole} ({first})."
    same = [channel for channel, outcome in others if outcome == base]
    if same:
        said += f" Nothing changes with: {', '.join(same)}."
    for channel, outcome in others:
        if outcome != base:
            said += f" {channel[:1].upper()}{channel[1:]}: {outcome}."
    return [said]


def _columns(parts: Sequence[Part]) -> list[tuple[str, int]]:
    """Command and depth of each column."""
    pairs = {(part.command, part.depth) for part in parts}
    return sorted(pairs, key=lambda pair: (pair[1], list(ATTACKS).index(pair[0])))


def _matrix(
    parts: Sequence[Part], outcomes: dict[Key, Outcome]
) -> list[tuple[str, list[Outcome | str]]]:
    """For each channel, what came of each column; a word where nothing did."""
    states = {(part.command, part.depth, part.channel): part.state for part in parts}
    words = {"waiting": "not run yet", "running": "not done yet", "done": "no results"}
    lines: list[tuple[str, list[Outcome | str]]] = []
    for channel in dict.fromkeys(part.channel for part in parts):
        keys = [(command, depth, channel) for command, depth in _columns(parts)]
        cells = [
            outcomes.get(key) or (words.get(states[key], states[key]) if key in states else "")
            for key in keys
        ]
        lines.append((channel, cells))
    return lines
