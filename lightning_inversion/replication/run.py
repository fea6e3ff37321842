"""``python -m lightning_inversion.replication.run``: run the table of the document's experiments.

Each experiment of ``configs/claims.yaml`` is a ``fit`` for each of its seeds, whose trimmed rows go
to ``configs/results``. What is there already is not run again, so that a stopped run goes on where
it stopped. ``python -m lightning_inversion.replication.tables`` then writes the table.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from lightning_inversion.replication.claims import Experiment, read_claims, results_path
from lightning_inversion.replication.stand_ins import make_stand_in

KEPT = (
    "seed", "index", "prompt", "recovered", "token_accuracy", "exact", "top_k_accuracy",
    "distance_ratio", "criterion_met", "criterion_met_at", "verified", "iterations",
    "model", "weights", "depth", "decoder", "version", "version_torch", "version_transformers",
)  # fmt: skip
"""What the table needs of a row of results.jsonl, and what made it."""


def run_cell(experiment: Experiment, seed: int, configs: Path, runs: Path) -> None:
    """Run one seed of an experiment, unless its rows are there.

    Raises:
        RuntimeError: the fit ended with another exit code than 0.
    """
    if any(row["seed"] == seed for row in experiment.results(configs)):
        return
    began = time.monotonic()
    model = Path(str(experiment.options.get("model.transformer.model", "")))
    if model.parent.name == "stand_ins":
        make_stand_in(model.name, configs, model.parent)
    root = runs / f"{experiment.name}-{experiment.fingerprint(configs)}-{seed}"
    rows = fit([*experiment.arguments(configs), f"--seed_everything={seed}"], root)
    kept = [trimmed(row, experiment, configs) for row in rows]
    _keep(experiment, configs, kept)
    accuracy = sum(row["token_accuracy"] for row in kept) / len(kept)
    seconds = time.monotonic() - began
    print(f"{experiment.name} seed {seed}: {accuracy:.3f} in {seconds:.0f} s", flush=True)
    shutil.rmtree(root)


def fit(arguments: list[str], root: Path) -> list[dict[str, Any]]:
    """The rows of one quiet ``fit`` on the CPU; a run that was stopped in ``root`` is taken up.

    Raises:
        InputError: the options are wrong.
    """
    from lightning_inversion.cli.lightning import run_lightning
    from lightning_inversion.cli.resume import newest_run

    logs = root / "lightning_logs"
    # Decoded at the end alone.
    quiet = ["--decoding.show=false", "--decoding.every=1000000", "--decoding.early=false"]
    again = ["--ckpt_path=last"] if newest_run(logs) is not None else []
    where = [f"--trainer.default_root_dir={root}", "--trainer.accelerator=cpu"]
    with contextlib.redirect_stdout(io.StringIO()):
        run_lightning(["fit", *arguments, *where, *quiet, *again])
    folder = newest_run(logs)
    assert folder is not None
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def trimmed(row: dict[str, Any], experiment: Experiment, configs: Path) -> dict[str, Any]:
    """A result row without what the table does not need.

    Adds `present`, the share of the prompt's tokens that were decoded at any position (the
    document finds permutations), and the row's range of features where it has one.
    """
    kept = {key: _rounded(row[key]) for key in KEPT}
    found = sum(token in row["recovered_ids"] for token in row["ids"])
    kept["present"] = _rounded(found / len(row["ids"]))
    ranges = ranges_of(yaml.safe_load((configs / experiment.config).read_text()))
    if ranges:
        kept["range"] = ranges[row["index"] % len(ranges)]
    elif row["features"] is not None:
        kept["range"] = row["features"]
    kept["settings"] = experiment.fingerprint(configs)
    return kept


def ranges_of(settings: Any) -> list[str]:
    """The ranges of a ``Narrowed`` objective, wherever it stands in the settings."""
    if not isinstance(settings, dict):
        return []
    if "ranges" in settings:
        return list(settings["ranges"])
    return next((found for value in settings.values() if (found := ranges_of(value))), [])


def _keep(experiment: Experiment, configs: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows beside those of other seeds; rows of other settings go."""
    path = results_path(experiment, configs)
    path.parent.mkdir(exist_ok=True)
    together = [*experiment.results(configs), *rows]
    lines = [json.dumps(row, ensure_ascii=False) for row in together]
    whole = path.with_suffix(".writing")
    whole.write_text("\n".join(lines) + "\n", encoding="utf-8")
    whole.replace(path)


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for; returns the exit code, 1 if an experiment failed."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_inversion.replication.run",
        description="Run the experiments of configs/claims.yaml that have no results yet.",
    )
    parser.add_argument("names", nargs="*", help="experiments whose names begin so; default all")
    parser.add_argument("--configs", type=Path, default=Path("configs"))
    parser.add_argument("--runs", type=Path, default=Path("lightning_logs/experiments"))
    parser.add_argument("--seeds", type=int, nargs="+", help="these alone; default all")
    options = parser.parse_args(arguments)
    wanted = [
        experiment
        for experiment in read_claims(options.configs)
        if experiment.run and experiment.name.startswith(tuple(options.names) or "")
    ]
    # The shallow before the deep, the first seeds before the second: what is quick is there soon.
    cells = sorted(
        ((seed, experiment) for experiment in wanted for seed in options.seeds or experiment.seeds),
        key=lambda cell: (cell[1].options.get("model.transformer.depth", 1) > 4, cell[0]),
    )
    failed = 0
    for seed, experiment in cells:
        try:
            run_cell(experiment, seed, options.configs, options.runs)
        except RuntimeError as error:
            failed = 1
            print(error, file=sys.stderr, flush=True)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
