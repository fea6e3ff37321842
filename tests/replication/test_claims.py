"""The experiments and their kept rows, as they are committed."""

import json
from pathlib import Path

import pytest
import yaml

from lightning_inversion.errors import InputError
from lightning_inversion.replication.claims import (
    SourceExperiment,
    outcome_of,
    read_experiments,
    read_results,
)

ORIGINAL = Path(__file__).parents[2] / "configs" / "original"
EXPERIMENTS = read_experiments(ORIGINAL)
LINES = (ORIGINAL / "results.jsonl").read_text(encoding="utf-8").splitlines()


def test_kept_rows_were_made_with_the_present_settings() -> None:
    results = read_results(ORIGINAL)
    assert sum(map(len, results.values())) == len(LINES) > 1000
    for experiment in EXPERIMENTS:
        rows = results[experiment.name]
        if experiment.run:
            assert {row["seed"] for row in rows} == {*range(experiment.seeds)}, experiment.name
            assert len({row["prompt"] for row in rows}) >= 5, experiment.name
        else:
            assert not rows
            assert experiment.needs_source_model, f"{experiment.name}: why is it not run?"


def test_kept_rows_name_no_folder_of_the_machine_that_made_them() -> None:
    for row in map(json.loads, LINES):
        assert not any(
            str(value).startswith(("/", "~"))
            for key, value in row.items()
            if key not in {"prompt", "recovered"}
        )


def test_no_class_is_configured_twice() -> None:
    """Experiments with an equal objective or initializer take it from one anchor."""
    text = (ORIGINAL / "experiments.yaml").read_text(encoding="utf-8")
    written = [
        line.partition("class_path: ")[2].split("#")[0].rstrip("} ")
        for line in text.splitlines()
        if "init_args:" in line and "class_path: " in line
    ]
    assert len(written) > 4
    assert len(written) == len(set(written))


def test_the_fingerprint_is_of_the_settings(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("model: {iterations: 8}  # few")
    one = SourceExperiment("one", "section", "base", "claim", overrides={"model.optimizer.lr": 0.1})
    before = one.fingerprint(tmp_path)
    base.write_text("model:\n  iterations: 8\n")
    assert one.fingerprint(tmp_path) == before
    base.write_text("model: {iterations: 9}")
    assert one.fingerprint(tmp_path) != before
    assert one.arguments(tmp_path)[1] == "--model.optimizer.lr=0.1"


def test_ranges_are_found_wherever_the_objective_is_nested() -> None:
    narrowed = {"class_path": "Narrowed", "init_args": {"ranges": ["0:1", "0:2"]}}
    nested = {"class_path": "Standardized", "init_args": {"objective": narrowed}}
    for objective in (narrowed, nested):
        one = SourceExperiment("a", "b", "c", "d", overrides={"model.objective": objective})
        assert one.ranges == ["0:1", "0:2"]
    assert SourceExperiment("a", "b", "c", "d", overrides={"model.objective": "L1"}).ranges == []


def test_outcomes() -> None:
    outcomes = [outcome_of(value) for value in (0.9, 0.5, 0.49)]
    assert outcomes == ["recovered", "partly", "not recovered"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"name": "a", "base": "b", "clam": "c"}], "clam"),
        ([{"name": "a", "base": "b", "claim": "c"}] * 2, "a twice"),
    ],
)
def test_experiments_are_checked(entries: list[object], message: str, tmp_path: Path) -> None:
    text = yaml.safe_dump({"sections": {"a section": entries}})
    (tmp_path / "experiments.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_experiments(tmp_path)
