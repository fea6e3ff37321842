"""``predict`` by the real entry point: rows, certificates, going on, budgets, wrong use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lightning_inversion import read_certificates, verify
from lightning_inversion.__main__ import main as run
from lightning_inversion.cache import ENVIRONMENT
from lightning_inversion.callbacks import result_writer
from lightning_inversion.errors import InputError
from lightning_inversion.results import append_rows

pytestmark = pytest.mark.usefixtures("shared_parsers")


def predict(folder: Path, root: Path, *more: str) -> list[str]:
    return [
        "predict",
        f"--model.transformer.model={folder}",
        "--model.transformer.depth=2",
        '--data.prompts=["The sky is blue.", "A quick brown fox", "The wipers"]',
        "--data.tokens_per_batch=100",
        f"--trainer.default_root_dir={root}",
        "--trainer.accelerator=cpu",
        *more,
    ]


def rows_of(root: Path) -> list[dict[str, Any]]:
    lines = (root / "lightning_logs" / "version_0" / "results.jsonl").read_text()
    return [json.loads(line) for line in lines.splitlines()]


@pytest.fixture(scope="module")
def predicted(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a run that has ended, a prompt a batch; a test that changes it copies it."""
    root = tmp_path_factory.mktemp("predicted")
    assert run(predict(tiny_folder, root, "--data.batch_size=1")) == 0
    return root


def test_every_token_is_recovered_with_its_certificate(predicted: Path) -> None:
    rows = rows_of(predicted)
    assert [row["recovered"] for row in rows] == [row["prompt"] for row in rows]
    for row in rows:
        count = len(row["ids"])
        assert row["command"] == "predict"
        assert row["exact"]
        assert row["verified"]
        assert row["token_verified"] == [True] * count
        for key in (
            "token_residuals",
            "thresholds",
            "margins",
            "candidates",
            "proposers",
            "token_seconds",
        ):
            assert len(row[key]) == count
        assert all(r <= t for r, t in zip(row["token_residuals"], row["thresholds"], strict=True))
        assert row["policy"].startswith("TokenRecovery(ProbeProposer+GradientProxy")


def test_certificates_of_a_run_are_checked_again(predicted: Path, tiny_folder: Path) -> None:
    certificates = read_certificates(predicted / "lightning_logs" / "version_0")
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    assert list(certificates) == [0, 1, 2]
    for row, certificate in zip(rows_of(predicted), certificates.values(), strict=True):
        assert certificate.ids == row["recovered_ids"]
        assert [token.state for token in certificate.tokens] == row["token_states"]
        states = model(torch.tensor([row["ids"]]), output_hidden_states=True).hidden_states[2]
        assert verify(certificate, model, states).holds
        assert not verify(certificate, model, states + 0.1).holds
    with pytest.raises(InputError, match=r"has no certificate\.json; give the folder of a run"):
        read_certificates(predicted)


def test_certificates_of_a_slice_are_checked_again(tiny_folder: Path, tmp_path: Path) -> None:
    assert run(predict(tiny_folder, tmp_path, "--model.transformer.features=4:20")) == 0
    certificates = read_certificates(tmp_path / "lightning_logs" / "version_0")
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    for certificate in certificates.values():
        ids = torch.tensor([certificate.ids])
        states = model(ids, output_hidden_states=True).hidden_states[2][..., 4:20]
        assert verify(certificate, model, states).holds
        assert not verify(certificate, model, states + 0.1).holds


def test_certificates_of_a_changed_model_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    assert run(predict(tiny_folder, tmp_path, "--model.transformer.mlp=false")) == 0
    certificate = read_certificates(tmp_path / "lightning_logs" / "version_0")[0]
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with pytest.raises(InputError, match="was written for mlp False, and the model has True"):
        verify(certificate, model, torch.ones(len(certificate.ids), 32))


def test_a_stopped_run_is_resumed(predicted: Path, tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(predicted, tmp_path, dirs_exist_ok=True)
    arguments = predict(tiny_folder, tmp_path, "--data.batch_size=1")
    path = tmp_path / "lightning_logs" / "version_0" / "results.jsonl"
    whole = rows_of(tmp_path)
    path.write_text("".join(json.dumps(row) + "\n" for row in whole if row["index"] != 1))
    assert run([*arguments, "--ckpt_path=last"]) == 0
    again = rows_of(tmp_path)
    assert [row["recovered_ids"] for row in again] == [row["recovered_ids"] for row in whole]
    assert again[0]["token_seconds"] == whole[0]["token_seconds"]  # not run again
    assert not (tmp_path / "lightning_logs" / "version_1").exists()


def test_certificates_of_an_interrupted_run_are_those_of_its_rows(
    predicted: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rows: list[Any] = []

    def append(path: Path, more: list[Any]) -> None:
        if rows:
            raise KeyboardInterrupt
        rows.extend(more)
        append_rows(path, more)
        assert list(read_certificates(path.parent)) == [more[0].index]  # as if it were killed now

    monkeypatch.setattr(result_writer, "append_rows", append)
    arguments = predict(tiny_folder, tmp_path, "--data.batch_size=1")
    assert run(arguments) == 1
    messages = capsys.readouterr().err
    assert "1 of 3 prompts, about " in messages
    assert "1 of 3 prompts are finished" in messages
    folder = tmp_path / "lightning_logs" / "version_0"
    assert list(read_certificates(folder)) == [rows[0].index]
    monkeypatch.undo()
    assert run([*arguments, "--ckpt_path=last"]) == 0
    assert "3 of 3 prompts, about" not in capsys.readouterr().err  # nothing is left
    whole = read_certificates(predicted / "lightning_logs" / "version_0")
    assert [one.ids for one in read_certificates(folder).values()] == [
        one.ids for one in whole.values()
    ]


@pytest.mark.integration  # calibrates for itself
def test_slow_phases_are_reported_once_and_no_line_is_empty(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "cache"))
    assert run(predict(tiny_folder, tmp_path, "--data.batch_size=1")) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.endswith(" ...")] == [
        f"loading {tiny_folder} ...",
        "fitting the linear probe from hidden states to embeddings ...",
        "calibrating verification thresholds ...",
    ]
    assert all(lines)


@pytest.mark.parametrize("command", [pytest.param("fit", marks=pytest.mark.integration), "predict"])
def test_a_prompt_that_cannot_be_run_has_a_row_with_the_keys_of_the_others(
    command: str, tiny_folder: Path, tmp_path: Path
) -> None:
    prompts = '--data.prompts=["", "The sky is blue."]'
    options = predict(tiny_folder, tmp_path, prompts, "--model.iterations=2")[1:]
    assert run([command, *options]) == 0
    bad, good = rows_of(tmp_path)
    assert bad["error"] == "is empty; give it a text."
    assert bad.keys() == good.keys()
    assert [bad.get("policy"), bad.get("objective")] == [
        good.get("policy"), good.get("objective"),
    ]  # fmt: skip


@pytest.mark.integration  # whole runs
@pytest.mark.parametrize("command", ["fit", "predict"])
def test_a_model_with_a_weight_that_is_nan_has_rows_with_their_error(
    command: str, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"][3] = torch.nan
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    assert run([command, *predict(folder, tmp_path, "--model.iterations=2")[1:]]) == 0
    for row in rows_of(tmp_path):
        assert row["error"].startswith("has features that are not finite numbers")
        assert not any(row["token_verified"] or [])


@pytest.mark.integration  # whole runs
def test_another_policy_by_name(tiny_folder: Path, tmp_path: Path) -> None:
    proposer = "--model.recovery.proposer=lightning_inversion.proposers.proposals.Exhaustive"
    assert run(predict(tiny_folder, tmp_path, "--model.recovery=TokenRecovery", proposer)) == 0
    rows = rows_of(tmp_path)
    assert all(row["exact"] for row in rows)
    assert rows[0]["policy"] == "TokenRecovery(Exhaustive)"


def test_a_wrong_policy_ends_in_a_sentence(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(predict(tiny_folder, tmp_path, "--model.recovery=Guess")) == 2
    assert (
        "unknown RecoveryPolicy 'Guess'; choose from LastPosition, Reading, SIPIT, TokenRecovery"
        in (capsys.readouterr().err)
    )


@pytest.mark.integration  # whole runs
def test_predict_starts_from_the_input_of_a_fit(tiny_folder: Path, tmp_path: Path, capsys) -> None:
    words = predict(tiny_folder, tmp_path / "fit", "--model.iterations=30")
    assert run(["fit", *words[1:]]) == 0
    checkpoint = tmp_path / "fit" / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"
    assert run(predict(tiny_folder, tmp_path, f"--ckpt_path={checkpoint}")) == 0
    rows = rows_of(tmp_path)
    assert all(row["exact"] and row["verified"] for row in rows)
    # The fit has found the texts: the first token that is tried at a place is the right one.
    for row in rows:
        assert {name.split("+")[0] for name in row["proposers"][1:]} == {"NearestToInput"}
        assert set(row["candidates"][1:]) <= {2, 4}

    capsys.readouterr()
    policy = "--model.recovery=lightning_inversion.recovery.sipit.SIPIT"
    assert run(predict(tiny_folder, tmp_path, f"--ckpt_path={checkpoint}", policy)) == 2
    assert "is not used by SIPIT" in capsys.readouterr().err


def test_hidden_states_of_another_depth_end_the_run_and_leave_no_row(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = torch.tensor([[11, 42, 7]])
    states = AutoModelForCausalLM.from_pretrained(tiny_folder)(ids, output_hidden_states=True)
    torch.save({"hidden_states": states.hidden_states[1], "input_ids": ids}, tmp_path / "x.pt")
    words = [
        "predict", f"--model.transformer.model={tiny_folder}", "--model.transformer.depth=2",
        f"--data.targets={tmp_path / 'x.pt'}", f"--trainer.default_root_dir={tmp_path}",
        "--trainer.accelerator=cpu", "--model.recovery.proposer=Exhaustive",
    ]  # fmt: skip
    assert run(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "x.pt: 1 prompt, 3 positions, depth 2, float32, depth as told." in lines
    assert any("holds token ids (input_ids) beside the hidden states" in line for line in lines)
    assert lines[-1].endswith("features fit depth 1, not 2; set --model.transformer.depth 1.")
    assert not list(tmp_path.rglob("results.jsonl"))
