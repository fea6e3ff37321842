"""Experiments run as cells of a sweep, and are kept and resumed."""

import json
from pathlib import Path

import pytest
import yaml
from torch import Tensor

from lightning_inversion.objectives import Objective
from lightning_inversion.replication.claims import read_results
from lightning_inversion.replication.run import KEPT, main, make_untrained_gpt2
from lightning_inversion.results import names
from lightning_inversion.transformer.loading import TransformerSpec
from tests.tiny import tiny_tokenizer

ORIGINAL = Path(__file__).parents[2] / "configs" / "original"


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: Path) -> Path:
    """A folder of two experiments on the tiny model, each with one seed."""
    base = {
        "model": {
            "transformer": {"model": str(tiny_folder), "features": "0:8"},
            "schedule": "AllPositions",
            "iterations": 8,
        },
        "data": {"prompts": ["The sky is blue."], "tokens_per_batch": 100},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    entries = [
        {"name": name, "base": "base", "claim": "a claim", "seeds": 1, "overrides": overrides}
        for name, overrides in (("one", {}), ("two", {"model.iterations": 7}))
    ]
    (tmp_path / "experiments.yaml").write_text(yaml.safe_dump({"sections": {"s": entries}}))
    return tmp_path


def run(folder: Path, *names: str) -> int:
    return main([*names, f"--configs={folder}", f"--runs={folder / 'runs'}"])


def test_kept_keys_are_those_of_rows() -> None:
    assert {*KEPT} <= {*names("setting"), *names("outcome"), *names("version")}


@pytest.mark.integration  # several runs
def test_what_has_results_is_not_run_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "two") == 0
    assert run(folder) == 0
    file = folder / "results.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    cells = [(row["experiment"], row["seed"]) for row in rows]
    assert cells == [("one", 0), ("two", 0)]
    for row in rows:
        assert row["features"] == "0:8"
        assert 0 <= row["token_accuracy"] <= row["anywhere"] <= 1
    runs = len([*(folder / "runs").rglob("results.jsonl")])
    assert runs == 2
    assert run(folder) == 0
    assert "every experiment has its results" in capsys.readouterr().err
    # One more seed of one experiment: it alone is run.
    listed = folder / "experiments.yaml"
    entries = yaml.safe_load(listed.read_text())
    entries["sections"]["s"][1]["seeds"] = 2
    listed.write_text(yaml.safe_dump(entries))
    assert run(folder) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    cells = [(row["experiment"], row["seed"]) for row in rows]
    assert cells == [("one", 0), ("two", 0), ("two", 1)]
    assert len([*(folder / "runs").rglob("results.jsonl")]) == runs + 1
    # Other settings: the rows do not count.
    base = folder / "base.yaml"
    base.write_text(base.read_text().replace("iterations: 8", "iterations: 6"))
    assert read_results(folder) == {"one": [], "two": []}


class Failing(Objective):
    """An objective that fails when it is used."""

    def forward(self, generated: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        raise RuntimeError("fails")


@pytest.mark.integration  # whole runs
def test_a_failed_experiment_does_not_keep_the_others_from_running(folder: Path) -> None:
    experiments = yaml.safe_load((folder / "experiments.yaml").read_text())
    failing = {"model.objective": f"{__name__}.Failing"}
    experiments["sections"]["s"][0]["overrides"] = failing
    (folder / "experiments.yaml").write_text(yaml.safe_dump(experiments))
    assert run(folder) == 1
    assert [len(rows) for rows in read_results(folder).values()] == [0, 1]


def test_commands_are_shown_and_not_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["two", "--show", f"--configs={folder}"]) == 0
    (command,) = capsys.readouterr().out.splitlines()
    assert command.startswith("lightning-inversion fit --config=")
    assert command.endswith("--model.iterations=7 --seed_everything=0")


def test_a_wrong_option_is_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (folder / "experiments.yaml").read_text()
    (folder / "experiments.yaml").write_text(text.replace("model.iterations", "model.iteration"))
    assert run(folder) == 2
    assert "--model.iteration" in capsys.readouterr().err


def test_untrained_gpt2_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TransformerSpec, "load_tokenizer", lambda self: tiny_tokenizer())
    make_untrained_gpt2(ORIGINAL, tmp_path / "gpt2")
    config = TransformerSpec(model=str(tmp_path / "gpt2"), weights="untrained").config()
    assert (config.vocab_size, config.n_embd, config.n_layer, config.n_head) == (50257, 768, 12, 12)
