"""The table is what its files say, and its runs resume."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_inversion.errors import InputError
from lightning_inversion.replication import bandwidth
from lightning_inversion.replication import run as experiments
from lightning_inversion.replication.channel import critical_widths, curve
from lightning_inversion.replication.claims import Experiment, outcome_of, read_claims
from lightning_inversion.replication.stand_ins import make_stand_in
from lightning_inversion.replication.tables import _verdict, write_table
from lightning_inversion.transformer.loading import TransformerSpec
from tests.tiny import tiny_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"
FINDINGS = CONFIGS / "FINDINGS.md"
CLAIMS = read_claims(CONFIGS)


def test_the_committed_table_is_rebuilt_from_the_files() -> None:
    assert (CONFIGS / "README.md").read_text(encoding="utf-8") == write_table(CONFIGS)


def test_kept_rows_were_made_with_the_settings_of_today() -> None:
    names = {experiment.name for experiment in CLAIMS}
    for path in (CONFIGS / "results").glob("*.jsonl"):
        assert path.stem in names
    for experiment in CLAIMS:
        path = CONFIGS / "results" / f"{experiment.name}.jsonl"
        if path.exists():
            kept = path.read_text(encoding="utf-8").splitlines()
            assert len(experiment.results(CONFIGS)) == len(kept), experiment.name


def test_every_config_has_a_row() -> None:
    rows = {experiment.config for experiment in CLAIMS}
    files = {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob("*/*.yaml")}
    others = ("document_models/", "recovery/")  # overlays, and a table of its own
    assert {name for name in files if not name.startswith(others)} == rows


def test_what_is_said_to_be_run_was_run() -> None:
    for experiment in CLAIMS:
        rows = experiment.results(CONFIGS)
        if experiment.run:
            assert {row["seed"] for row in rows} == {*experiment.seeds}, experiment.name
            assert len({row["prompt"] for row in rows}) >= 5, experiment.name
        else:
            assert experiment.needs, f"{experiment.name} is not run and does not say why"


def test_findings_name_rows_that_exist() -> None:
    names = [experiment.name for experiment in CLAIMS]
    for word in re.findall(
        r"`([a-z0-9-]+(?:-|\b)(?:\.\.\.)?)`", FINDINGS.read_text(encoding="utf-8")
    ):
        stem = word.removesuffix("...")
        assert any(name == stem or name.startswith(stem) for name in names), word


def test_no_row_names_a_place_of_the_machine_that_made_it() -> None:
    for path in (CONFIGS / "results").glob("*.jsonl"):
        assert not any(
            str(value).startswith(("/", "~"))
            for line in path.read_text(encoding="utf-8").splitlines()
            for key, value in json.loads(line).items()
            if key not in {"prompt", "recovered"}
        )


def test_the_report_needs_neither_torch_nor_lightning() -> None:
    code = (
        "import sys, lightning_inversion.replication.tables;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'lightning', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_verdicts() -> None:
    def verdict(accuracy: float | None, **more) -> str:
        rows = [] if accuracy is None else [{"token_accuracy": accuracy}]
        return _verdict(Experiment("a", "b", "c", "d", **more), rows)

    assert verdict(0.95, document="recovered") == "**agrees**: recovered / recovered"
    assert verdict(0.6, document="recovered") == "**differs**: recovered / partly"
    assert verdict(0.2) == "not recovered"
    assert verdict(None) == "not run yet"
    assert verdict(0.2, needs="big") == "not run: needs big; the stand-in: not recovered"
    assert [outcome_of(value) for value in (0.9, 0.5, 0.49)] == [
        "recovered",
        "partly",
        "not recovered",
    ]


def test_critical_widths_of_a_curve_that_is_not_monotone() -> None:
    rows = [
        {"range": name, "token_accuracy": value}
        for name, value in [("0:1", 0.0), ("0:2", 1.0), ("0:3", 0.8), ("0:4", 1.0), ("2:4", 0.0)]
    ]
    points = curve(rows)
    assert critical_widths(points) == (2, 4)
    assert critical_widths({"0:1": 0.2}) == (None, None)


@pytest.mark.parametrize("critical", [1, 5, 64])
def test_bisection(critical: int) -> None:
    asked = []
    found = bandwidth.critical_width(lambda k: asked.append(k) or k >= critical, 64)
    assert found == critical
    assert len(asked) <= 7
    assert bandwidth.critical_width(lambda k: False, 64) is None


def small(tmp_path: Path, tiny_folder: Path) -> Path:
    """A folder of configs with one experiment on the tiny model."""
    configs = tmp_path / "configs"
    configs.mkdir()
    settings = {
        "model": {
            "transformer": {"model": str(tiny_folder), "features": "0:8"},
            "iterations": 8,
        },
        "data": {"prompts": ["The sky is blue."], "tokens_per_batch": 100},
    }
    (configs / "a.yaml").write_text(yaml.safe_dump(settings))
    claims = {"A section": [{"name": "one", "config": "a.yaml", "claim": "a claim"}]}
    (configs / "claims.yaml").write_text(yaml.safe_dump(claims))
    return configs


def test_the_runner_skips_what_is_there(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = small(tmp_path, tiny_folder)
    arguments = [f"--configs={configs}", f"--runs={tmp_path / 'runs'}"]
    assert experiments.main(arguments) == 0
    assert capsys.readouterr().out.count("one seed") == 2
    path = configs / "results" / "one.jsonl"
    first, second = map(json.loads, path.read_text().splitlines())
    assert (first["seed"], second["seed"]) == (0, 1)
    assert first["range"] == "0:8"
    assert 0 <= first["token_accuracy"] <= first["present"] <= 1
    assert experiments.main(arguments) == 0
    assert "one seed" not in capsys.readouterr().out
    # Half of it lost: only that half is made again.
    path.write_text(json.dumps(first) + "\n")
    assert experiments.main(arguments) == 0
    assert capsys.readouterr().out.startswith("one seed 1")
    # Other settings: nothing of it counts.
    text = (configs / "a.yaml").read_text()
    (configs / "a.yaml").write_text(text.replace("iterations: 8", "iterations: 7"))
    (experiment,) = read_claims(configs)
    assert experiment.results(configs) == []


def test_the_bisection_command(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = small(tmp_path, tiny_folder)
    options = [f"--config={configs / 'a.yaml'}", "--prompt=A", "--model.iterations=30"]
    assert bandwidth.main(options) == 0
    output = capsys.readouterr().out
    assert "[0:32] token accuracy" in output
    assert "critical width" in output


def test_stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TransformerSpec, "load_tokenizer", lambda self: tiny_tokenizer())
    made = make_stand_in("gpt2", CONFIGS, tmp_path)
    config = TransformerSpec(model=str(made), weights="untrained").config()
    assert (config.vocab_size, config.n_embd, config.n_layer, config.n_head) == (50257, 768, 12, 12)
    with pytest.raises(InputError, match="choose one of gpt2"):
        make_stand_in("gpt3", CONFIGS, tmp_path)


def test_claims_are_checked(tmp_path: Path) -> None:
    (tmp_path / "claims.yaml").write_text("s: [{name: a, config: b, clam: c}]")
    with pytest.raises(InputError, match="clam"):
        read_claims(tmp_path)
    two = "s: [{name: a, config: b, claim: c}, {name: a, config: b, claim: c}]"
    (tmp_path / "claims.yaml").write_text(two)
    with pytest.raises(InputError, match="a twice"):
        read_claims(tmp_path)
