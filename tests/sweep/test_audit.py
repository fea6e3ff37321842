"""An audit by the real entry point: what it captures, runs, says, and how it goes on."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_inversion.__main__ import main
from lightning_inversion.data.storage import Storage
from lightning_inversion.data.targets import Captured
from lightning_inversion.errors import InputError
from lightning_inversion.module import InputInversion
from lightning_inversion.report.tables import in_percent
from lightning_inversion.sweep.audit import CONFIG, AuditPlan, audit_cells

pytestmark = pytest.mark.usefixtures("shared_parsers")

PLAN: dict[str, Any] = {
    "channels": {
        "untouched": {},
        "loud": {"noise": 100.0},
        "16 in bfloat16": {"store": "bfloat16", "features": "0:16"},
    },
    "fit": {"channels": ["untouched"], "options": {"model.iterations": 12}},
    "predict": {"options": {"model.recovery.budget": 60}},
}
SMALL: dict[str, Any] = {**PLAN, "channels": {"untouched": {}}}


def run(options: list[str]) -> int:
    return main(["audit", *options])


def write_plan(root: Path, plan: dict[str, Any]) -> None:
    (root / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))


@pytest.fixture
def options(tiny_folder: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "prompts.txt").write_text("The sky is blue.\nA <b>fox\n")
    write_plan(tmp_path, PLAN)
    return [
        f"--prompts={tmp_path / 'prompts.txt'}",
        f"--model={tiny_folder}",
        f"--config={tmp_path / 'plan.yaml'}",
        "--data.tokens_per_batch=100",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.accelerator=cpu",
    ]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.integration  # eight runs
def test_the_page_of_an_audit_is_made_from_its_rows(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    recover = InputInversion.predict_step

    def failing(module: InputInversion, *batch: Any) -> Any:
        if module.frozen.description["features"]:
            raise RuntimeError("lost <i>power</i>")
        return recover(module, *batch)

    audit = [*options, "--depth", "2"]
    with monkeypatch.context() as patched:
        patched.setattr(InputInversion, "predict_step", failing)
        assert run(audit) == 1
    (folder,) = (tmp_path / "lightning_logs").iterdir()
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == str(folder / "audit.html")
    assert "16-in-bfloat16 failed: RuntimeError" in said.err
    page = (folder / "audit.html").read_text()
    assert "This is a part of the audit: 3 of 4 runs are done." in page
    assert "at depth 2, 16 in bfloat16 (RuntimeError: lost &lt;i&gt;power" in page
    assert 'class="note">failed</td>' in page

    kept = Captured.read(folder / "targets" / "depth=2,16-in-bfloat16.safetensors")
    assert kept.storage == Storage("bfloat16")
    assert kept.transformer["layers"] == [2]
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}
    assert run(audit) == 0
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")} == before
    page = (folder / "audit.html").read_text()
    assert "part of the audit" not in page
    untouched = rows_of(folder / "predict,depth=2,untouched")
    assert all(row["verified"] and row["exact"] for row in untouched)
    assert (
        "At depth 2, exact recovery finds 100% of the tokens, all verified, and 2 of 2 prompts "
        "exactly (untouched). The same with: " in page
    )
    loud = rows_of(folder / "predict,depth=2,loud")
    right = sum(row["token_accuracy"] for row in loud) / len(loud)
    assert right < 1
    assert not any(any(row["token_verified"]) for row in loud)
    assert f"Loud: {in_percent(right)} of the tokens, none verified." in page
    (fit,) = folder.glob("fit,*")
    accuracy = [row["token_accuracy"] for row in rows_of(fit)]
    assert f"gradient inversion finds {in_percent(sum(accuracy) / len(accuracy))} of" in page
    assert "&lt;b&gt;fox" in page
    assert "<b>" not in page


def test_an_audit_that_is_asked_to_end_can_be_resumed(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    write_plan(tmp_path, SMALL)
    monkeypatch.setattr(InputInversion, "begin", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert run([*options, "--depth", "2"]) == 1
    assert "stopped; the same command resumes" in capsys.readouterr().err


def test_a_dry_run_leaves_nothing(options: list[str], tmp_path: Path, capsys) -> None:
    write_plan(tmp_path, SMALL)
    assert run([*options, "--depth", "2", "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "  predict,depth=2,untouched\n    predict " in plan
    assert plan.endswith("2 of 2 cells to run\n")
    assert not (tmp_path / "lightning_logs").exists()


def test_the_plan_in_the_package_can_be_run() -> None:
    plan = AuditPlan.read(CONFIG)
    first, *others = plan.channels.values()
    assert (first.store, first.noise, first.features) == ("float32", 0, None)
    assert {channel.store for channel in others} == {"float32", "bfloat16", "float16"}
    assert any(channel.noise for channel in others)
    assert any(channel.features for channel in others)
    assert {cell.command for cell in audit_cells(plan, [1], [], Path())} == {"fit", "predict"}


@pytest.mark.parametrize(
    ("change", "arguments", "sentence"),
    [
        ({}, ["--depth", "1", "1"], "--depth has a depth twice"),
        ({}, ["--depth", "9"], "9 blocks were asked for and the model has 4"),
        ({}, ["--depth", "x"], "--depth: x is not a whole number"),
        ({}, ["--processes=0"], "--processes must be at least 1"),
        (
            {},
            ["--trainer.default_root_dir=/proc/x"],
            "--trainer.default_root_dir '/proc/x' cannot be written",
        ),
        (
            {},
            ["--model.recovery.budgte=3"],
            "unknown option --model.recovery.budgte; see lightning-inversion fit --model",
        ),
        ({}, ["--prompts=nowhere.txt"], "--prompts 'nowhere.txt' does not exist"),
        ({}, ["--config=nowhere.yaml"], "--config 'nowhere.yaml' does not exist"),
        (
            {"channels": {"a": {"noise": -1.0}}},
            ["--depth=1"],
            "channel 'a': noise must be between 0 and 1e+15, and is -1",
        ),
        (
            {"channels": {"a": {"largest": 3.0}}},
            ["--depth=1"],
            "channel 'a': largest is a share of the features",
        ),
        ({"predict": {"options": {"model.recovery.budget": "x"}}}, [], "--model.recovery.budget"),
        ({"channels": {"a": {"store": "int8"}}}, [], "is no plan of an audit"),
        *(
            pytest.param(change, [], sentence, marks=pytest.mark.integration)
            for change, sentence in (
                ({"channels": {"a": {"loud": 1}}}, "is no plan of an audit"),
                ({"channels": {}}, "names no channel"),
                ({"channels": {"a b": {}, "a-b": {}}}, "names are too much alike"),
                ({"fit": {"channels": ["touched"]}}, "'touched' is no channel of it"),
                ({"fit": {"channels": []}, "predict": {"channels": []}}, "leaves nothing to run"),
            )
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_wrong_use_ends_before_a_run(
    change: dict[str, Any], arguments: list[str], sentence: str, options: list[str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys,
) -> None:  # fmt: skip
    plan = {**SMALL, **({"fit": {"channels": []}, "predict": {}} if "channels" in change else {})}
    write_plan(tmp_path, {**plan, **change})
    monkeypatch.setattr(InputInversion, "begin", lambda *_: pytest.fail("a batch was begun"))
    assert run([*options, *arguments]) == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert message.count("\n") == 1, message
    assert not [*tmp_path.rglob("results.jsonl"), *tmp_path.rglob("*.safetensors")]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"channels: {\xe9t\xe9: {}}", "is no plan of an audit"),
        (b"channels: {1: {}, 2: {}}", "a channel whose name is not a string"),
        (b"a: &a [1]\nchannels: *a", "is no plan of an audit"),
        (b"channels: &c {x: *c}", "it has an alias"),
        pytest.param(b"[" * 5000 + b"]" * 5000, "nested too deep", marks=pytest.mark.integration),
        (b"[", "is no plan of an audit"),
        (b"3", "is no plan of an audit"),
    ],
)
def test_a_file_that_is_no_plan_is_one_sentence(
    content: bytes, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "plan.yaml").write_bytes(content)
    with pytest.raises(InputError) as refusal:
        AuditPlan.read(tmp_path / "plan.yaml")
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_prompts_are_needed(options: list[str], capsys) -> None:
    assert run(options[1:]) == 2
    assert "--prompts must be given" in capsys.readouterr().err
