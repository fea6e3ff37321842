"""``python -m lightning_inversion.replication.run``: run the source's experiments.

Each experiment of ``configs/original/experiments.yaml`` is a ``fit`` for each seed, a cell of a
sweep. Its rows, without what the tables do not need, go to ``results.jsonl`` beside it. Experiments
whose rows are there are not run again, and the same command resumes a run that was stopped.
``python -m lightning_inversion.replication.tables`` then writes the tables.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_inversion.cli.ending import exit_code
from lightning_inversion.files import Record
from lightning_inversion.replication.claims import (
    RESULTS,
    SourceExperiment,
    fingerprint_of,
    read_experiments,
    read_results,
)
from lightning_inversion.results import ResultRow
from lightning_inversion.sweep.grid import Cell
from lightning_inversion.sweep.run import Sweep, check, run_cells
from lightning_inversion.transformer.loading import TransformerSpec

# Not __name__, which is __main__ where the module is run.
_log = logging.getLogger("lightning_inversion.replication.run")
KEPT = (
    "seed", "index", "prompt", "recovered", "token_accuracy", "exact", "top_k_accuracy",
    "distance_ratio", "criterion_met", "criterion_met_at", "verified", "iterations", "model",
    "weights", "depth", "features", "decoder", "version", "version_torch", "version_transformers",
)  # fmt: skip
"""What the tables need of a row, and what made it."""
QUIET = (
    "--trainer.accelerator=cpu", "--decoding.show=false", "--decoding.every=1000000",
    "--decoding.early=false",
)  # fmt: skip
"""Options of every run: tokens are decoded at the end only."""


def cell_of(experiment: SourceExperiment, folder: Path, seed: int) -> Cell:
    """One run of an experiment."""
    arguments = [*experiment.arguments(folder), f"--seed_everything={seed}", *QUIET]
    name = f"{experiment.name}-{seed}"
    return Cell(name, "fit", tuple(arguments), {"experiment": experiment.name, "seed": str(seed)})


def missing_seeds(experiment: SourceExperiment, results: Sequence[Record]) -> list[int]:
    """The seeds of an experiment that have no rows among its results."""
    there = {row["seed"] for row in results}
    return [seed for seed in range(experiment.seeds) if seed not in there]


def run_experiments(
    missing: Sequence[tuple[SourceExperiment, list[int]]], folder: Path, runs: Path, processes: int
) -> int:
    """Run seeds of experiments, and keep the rows of the experiments that succeed.

    Returns the exit code.

    Nothing is kept of a run that is stopped before its end: the same call resumes it.

    Args:
        missing: at least one experiment, each with its seeds to run.
        folder: of ``experiments.yaml``.
        runs: folder for the runs.
        processes: that share the runs out.
    """
    for experiment, _ in missing:
        model = str(experiment.overrides.get("model.transformer.model", ""))
        if model.endswith("stand_ins/gpt2"):
            make_untrained_gpt2(folder, Path(model))
    cells = {one.name: [cell_of(one, folder, seed) for seed in seeds] for one, seeds in missing}
    settings = [(one.fingerprint(folder), seeds) for one, seeds in missing]
    sweep = Sweep(
        runs / fingerprint_of(settings), tuple(cell for own in cells.values() for cell in own)
    )
    code = run_cells(sweep, check(sweep), processes)
    if all(sweep.status(cell).state != "waiting" for cell in sweep.cells):
        done = [
            one
            for one, _ in missing
            if all(sweep.status(cell).state == "done" for cell in cells[one.name])
        ]
        keep(folder, [
            trimmed(row, one, folder)
            for one in done for cell in cells[one.name] for row in sweep.rows(cell)
        ])  # fmt: skip
    return code


def trimmed(row: ResultRow, experiment: SourceExperiment, folder: Path) -> Record:
    """What is kept of a row: ``KEPT``, and

    - ``anywhere``: the share of the prompt's tokens that were decoded at any position;
    - ``features``: the range that the row was matched on, None for all features.
    """
    kept: Record = {"experiment": experiment.name, "fingerprint": experiment.fingerprint(folder)}
    kept |= {key: _rounded(getattr(row, key)) for key in KEPT}
    ids = row.ids or []
    kept["anywhere"] = _rounded(sum(token in row.recovered_ids for token in ids) / len(ids))
    if experiment.ranges:
        kept["features"] = experiment.ranges[row.index % len(experiment.ranges)]
    return kept


def keep(folder: Path, rows: Sequence[Record]) -> None:
    """Put rows into ``results.jsonl``, in place of those of the same seed or other settings."""
    path = folder / RESULTS
    order = {one.name: number for number, one in enumerate(read_experiments(folder))}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    settings = {row["experiment"]: row["fingerprint"] for row in rows}
    new = {(row["experiment"], row["seed"]) for row in rows}
    others = (
        row
        for row in map(json.loads, lines)
        if settings.get(row["experiment"], row["fingerprint"]) == row["fingerprint"]
        and (row["experiment"], row["seed"]) not in new
    )
    kept = [*others, *rows]
    kept.sort(key=lambda row: (order[row["experiment"]], row["seed"], row["index"]))
    part = path.with_suffix(".writing")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def make_untrained_gpt2(folder: Path, made: Path) -> None:
    """Make a model folder of GPT-2's shape with SmolLM2's tokenizer, whose 49,152 tokens fit.

    An untrained model is its configuration and a seed, so no hub is needed.

    Args:
        folder: that holds ``gpt2.json``, the configuration.
        made: the folder to be, which ``model.transformer.model`` takes.
    """
    if not (made / "config.json").exists():
        TransformerSpec().load_tokenizer().save_pretrained(made)
        (made / "config.json").write_bytes((folder / "gpt2.json").read_bytes())


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for; returns the exit code: 1 if a run failed, 2 for a wrong option."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_inversion.replication.run",
        description="Run the source's experiments that have no results yet.",
    )
    add = parser.add_argument
    add("names", nargs="*", help="experiments whose names begin so; default all")
    add("--show", action="store_true", help="print the commands, run nothing")
    add("--processes", type=int, default=1, help="share the runs out")
    add("--configs", type=Path, default=Path("configs/original"), help="of experiments.yaml")
    add("--runs", type=Path, default=Path("lightning_logs/original"), help="folder for the runs")
    options = parser.parse_args(arguments)
    return exit_code("replication", lambda: run_or_show(options))


def run_or_show(options: argparse.Namespace) -> int:
    """Run the experiments that have no results, or print their commands; returns the exit code.

    Raises:
        InputError: ``experiments.yaml`` or an option in it is wrong.
    """
    folder = options.configs
    chosen = tuple(options.names) or ""
    experiments = [one for one in read_experiments(folder) if one.name.startswith(chosen)]
    if options.show:
        for one in experiments:
            command = ["lightning-inversion", "fit", *one.arguments(folder)]
            for seed in range(one.seeds):
                print(shlex.join([*command, f"--seed_everything={seed}"]))
        return 0
    results = read_results(folder)
    missing = [
        (one, seeds)
        for one in experiments
        if one.run and (seeds := missing_seeds(one, results[one.name]))
    ]
    if not missing:
        _log.info("every experiment has its results")
        return 0
    return run_experiments(missing, folder, options.runs, options.processes)


if __name__ == "__main__":
    raise SystemExit(main())
