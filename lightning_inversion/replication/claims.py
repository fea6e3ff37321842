"""``configs/original/experiments.yaml``: the source's experiments, their settings and claims."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from lightning_inversion.errors import InputError
from lightning_inversion.files import Record
from lightning_inversion.results import RECOVERED

Outcome = Literal["recovered", "partly", "not recovered"]
PARTLY = 0.5
"""The mean token accuracy from which a prompt counts as partly recovered."""
SEEDS = 2
"""An experiment runs once with each of so many seeds, from 0 on, unless it names a number."""
EXPERIMENTS, RESULTS = "experiments.yaml", "results.jsonl"


def outcome_of(token_accuracy: float) -> Outcome:
    """The outcome that a mean token accuracy counts as."""
    if token_accuracy >= RECOVERED:
        return "recovered"
    return "partly" if token_accuracy >= PARTLY else "not recovered"


def fingerprint_of(settings: Any) -> str:
    """A short hash of settings, the order of their keys aside."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class SourceExperiment:
    """One experiment of the source, or a control beside it.

    Attributes:
        name: of its rows in ``results.jsonl``.
        section: of the source, or of the defects in its code.
        base: stem of the YAML file beside ``experiments.yaml`` that it starts from.
        claim: what the source says, in its words or close to them.
        outcome: the claim as an outcome; None where the source makes none.
        source_model: stem of the overlay in ``models/`` that makes it the source's own experiment;
            None where SmolLM2 is all that is asked for.
        needs_source_model: whether the claim cannot be judged without that model.
        seeds: how many seeds it runs with, from 0 on.
        run: False for what is too large to run on a CPU.
        overrides: options of ``fit`` beside the base.
    """

    name: str
    section: str
    base: str
    claim: str
    outcome: Outcome | None = None
    source_model: str | None = None
    needs_source_model: bool = False
    run: bool = True
    seeds: int = SEEDS
    overrides: dict[str, Any] = field(default_factory=dict)

    def arguments(self, folder: Path) -> list[str]:
        """The options of ``fit``, but for the seed."""
        options = [
            f"--{key}={value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
            for key, value in self.overrides.items()
        ]
        return [f"--config={(folder / f'{self.base}.yaml').as_posix()}", *options]

    def fingerprint(self, folder: Path) -> str:
        """Of the settings; rows with another fingerprint were made with other settings."""
        base = yaml.safe_load((folder / f"{self.base}.yaml").read_text(encoding="utf-8"))
        return fingerprint_of([base, self.overrides])

    @property
    def ranges(self) -> list[str]:
        """The ranges of features that the rows of one batch are matched on; [] for all features."""
        return _ranges(self.overrides)


def read_experiments(folder: Path) -> list[SourceExperiment]:
    """The experiments of ``folder``, in order.

    Raises:
        InputError: a key is unknown or missing, or two experiments have one name.
    """
    path = folder / EXPERIMENTS
    experiments: list[SourceExperiment] = []
    for section, entries in yaml.safe_load(path.read_text(encoding="utf-8"))["sections"].items():
        for entry in entries:
            try:
                experiments.append(SourceExperiment(section=section, **entry))
            except TypeError as error:
                raise InputError(f"{path}, {entry.get('name')}: {error}.") from error
    names = [experiment.name for experiment in experiments]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise InputError(f"{path} has {duplicates[0]} twice; rename one of them.")
    return experiments


def read_results(folder: Path) -> dict[str, list[Record]]:
    """The kept rows of each experiment that were made with its present settings.

    The rows of an experiment are in the order of their seeds and prompts.
    """
    experiments = read_experiments(folder)
    path = folder / RESULTS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = sorted(map(json.loads, lines), key=lambda row: (row["seed"], row["index"]))
    current = {experiment.name: experiment.fingerprint(folder) for experiment in experiments}
    results: dict[str, list[Record]] = {name: [] for name in current}
    for row in rows:
        if row["fingerprint"] == current.get(row["experiment"]):
            results[row["experiment"]].append(row)
    return results


def _ranges(settings: Any) -> list[str]:
    """The ``ranges`` of a ``Narrowed`` objective, wherever it is nested."""
    if not isinstance(settings, dict):
        return []
    if "ranges" in settings:
        return list(settings["ranges"])
    return next((found for value in settings.values() if (found := _ranges(value))), [])
