"""``configs/claims.yaml``: each experiment, its config, what the document says of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from lightning_inversion.errors import InputError

Outcome = Literal["recovered", "partly", "not recovered"]
RECOVERED, PARTLY = 0.9, 0.5
"""Mean token accuracies from which a text counts as recovered, and as partly recovered."""


def outcome_of(token_accuracy: float) -> Outcome:
    """The word for a mean token accuracy."""
    if token_accuracy >= RECOVERED:
        return "recovered"
    return "partly" if token_accuracy >= PARTLY else "not recovered"


@dataclass(frozen=True)
class Experiment:
    """One row of the table.

    Attributes:
        name: names the result file.
        section: of the document, or of the defects in its code.
        config: the YAML file, relative to ``configs/``.
        claim: what the document says, in its words or close to them.
        document: the claim as an outcome; None where the document makes none.
        document_model: the overlay under ``document_models/`` that makes the config the document's
            own experiment; None where SmolLM2 is all that is asked for.
        needs: the model without which the claim cannot be judged, or why it is not run.
        options: what is set beside the config.
        seeds: each is one run.
        run: False for what is too large to run here.
    """

    name: str
    section: str
    config: str
    claim: str
    document: Outcome | None = None
    document_model: str | None = None
    needs: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1)
    run: bool = True

    def arguments(self, configs: Path) -> list[str]:
        """What follows ``fit`` on the command line, but for the seed."""
        options = [f"--{key}={_written(value)}" for key, value in self.options.items()]
        return [f"--config={(configs / self.config).as_posix()}", *options]

    def fingerprint(self, configs: Path) -> str:
        """Names the settings, comments aside: results made with others are not this row's."""
        settings = yaml.safe_load((configs / self.config).read_text(encoding="utf-8"))
        text = json.dumps([settings, self.options], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def results(self, configs: Path) -> list[dict[str, Any]]:
        """The kept rows that were made with these settings, by seed and prompt."""
        path = results_path(self, configs)
        if not path.exists():
            return []
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        settings = self.fingerprint(configs)
        ours = [row for row in rows if row["settings"] == settings]
        return sorted(ours, key=lambda row: (row["seed"], row["index"]))


def results_path(experiment: Experiment, configs: Path) -> Path:
    """Where an experiment's small result file is kept."""
    return configs / "results" / f"{experiment.name}.jsonl"


def read_claims(configs: Path) -> list[Experiment]:
    """The experiments of ``claims.yaml`` in its order.

    Raises:
        InputError: a key is unknown or missing, or a name stands twice.
    """
    path = configs / "claims.yaml"
    experiments = []
    for section, entries in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        for entry in entries:
            try:
                entry = {**entry, "seeds": tuple(entry.get("seeds", (0, 1)))}
                experiments.append(Experiment(section=section, **entry))
            except TypeError as error:
                raise InputError(f"{path}, {entry.get('name')}: {error}.") from error
    names = [experiment.name for experiment in experiments]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{path} has {twice[0]} twice; rename one of them.")
    return experiments


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
