"""Recovery policies side by side on a tiny model."""

import json
import re
import runpy
import warnings
from pathlib import Path

import pytest

from lightning_inversion.recovery.policy import RecoveredPrompt
from lightning_inversion.replication.policies import (
    NamedPolicy,
    main,
    protocol_prompts,
    scores,
)
from lightning_inversion.replication.tables import policy_tables
from lightning_inversion.verification.certificate import State, TokenCertificate
from tests.tiny import tiny_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs" / "recovery"
POLICIES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_can_be_built(name: str) -> None:
    built = NamedPolicy.read(name, CONFIGS).build()
    assert type(built).__name__ in {"TokenRecovery", "SIPIT"}
    assert NamedPolicy.read(str(CONFIGS / f"{name}.yaml"), Path()).fingerprint


def test_prompts_are_of_one_length_and_two_are_random() -> None:
    tokenizer = tiny_tokenizer()
    texts = protocol_prompts(tokenizer, 300, CONFIGS / "prompts.jsonl", 20)
    assert len(texts) == 20
    assert {len(ids) for ids in texts} == {20}
    prompts = [
        json.loads(line)["prompt"] for line in (CONFIGS / "prompts.jsonl").read_text().splitlines()
    ]
    natural = [prompt.startswith(tokenizer.decode(ids)[:8]) for ids, prompt in zip(
        texts[:9] + texts[10:19], prompts, strict=True
    )]  # fmt: skip
    assert all(natural)
    assert texts == protocol_prompts(tokenizer, 300, CONFIGS / "prompts.jsonl", 20)


@pytest.mark.integration  # whole recoveries
def test_two_policies_side_by_side_and_their_table(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"

    def run(*policies: str) -> list[dict[str, object]]:
        arguments = [f"--model={tiny_folder}", "--depths=1", "--prompts=2", "--length=5"]
        assert (
            main([*arguments, f"--out={results}", f"--configs={CONFIGS}", "--policies", *policies])
            == 0
        )
        lines = (results / "protocol.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    rows = run("recommended", "sipit")
    assert [row["policy"] for row in rows] == ["recommended", "sipit"]
    for row in rows:
        assert row["right"] == row["verified"] == row["tokens"] == 10
        assert row["exact"] == 2
        assert row["falsely_verified"] == 0
        assert not row["capped"]
        assert (
            1 <= row["candidates_median"] <= row["candidates_p95"] <= row["candidates_max"] <= 300
        )

    assert run("recommended", "sipit") == rows  # nothing is run again
    more = run("recommended", "sipit", "brute_force")
    # Times are compared within one process, so the baseline runs beside what is new.
    assert [row["policy"] for row in more[2:]] == ["recommended", "brute_force"]
    assert more[2]["run"] == more[3]["run"]

    lines = {line.split(" | ")[0].strip("| "): line for line in policy_tables(more).splitlines()}
    assert {"recommended", "sipit", "brute_force"} <= lines.keys()
    assert "10/10 | 10 | 0 | 2/2" in lines["sipit"]
    assert lines["recommended"].rstrip(" |").endswith("| 1.0")
    assert "-" not in lines["sipit"].split(" | ")[10]


def token(id: int, verified: bool, compared: int) -> TokenCertificate:
    state: State = "verified" if verified else "unresolved"
    return TokenCertificate(id, state, 0.0, 1.0, None, None, compared, "any", 0.0)


def test_scores_by_hand() -> None:
    texts = [
        RecoveredPrompt([token(1, True, 900), token(2, True, 3), token(9, False, 50)], forwards=4),
        RecoveredPrompt([token(4, True, 800), token(7, True, 1), token(8, True, 2)], forwards=5),
        RecoveredPrompt([token(1, True, 700)], forwards=1),  # stopped here
    ]
    found = scores(texts, [[1, 2, 3], [4, 5, 6], [1, 1, 1]])
    assert found["tokens"] == 9
    assert found["done"] == 7
    assert found["right"] == 4
    assert found["verified"] == 6
    assert found["falsely_verified"] == 2
    assert found["exact"] == 0
    assert found["forwards"] == 10
    assert (found["candidates_median"], found["candidates_p95"], found["candidates_max"]) == (
        2,
        50,
        50,
    )


@pytest.mark.integration  # whole recoveries
def test_a_cap_stops_between_rounds(tiny_folder: Path, tmp_path: Path) -> None:
    arguments = [f"--model={tiny_folder}", "--depths=1", "--prompts=2", "--length=5", "--cap=0"]
    arguments += [f"--out={tmp_path}", f"--configs={CONFIGS}", "--policies=sipit"]
    assert main(arguments) == 0
    (only,) = (json.loads(line) for line in (tmp_path / "protocol.jsonl").read_text().splitlines())
    assert only["capped"]
    assert only["done"] < only["tokens"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--policies=nowhere"], "--policies: .*nowhere.yaml' cannot be read"),
        (["--prompts=21"], "--prompts must be from 1 to 20, and is 21"),
        (["--length=1"], "--length must be at least 2"),
        (["--depths=9"], "depth"),
        (["--file=nowhere.jsonl"], "--file 'nowhere.jsonl' cannot be read"),
        (["--length=100"], "fewer than 100; write more"),
    ],
)
def test_a_wrong_option_is_one_sentence(
    arguments: list[str],
    sentence: str,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = [f"--model={tiny_folder}", f"--out={tmp_path}", f"--configs={CONFIGS}", "--depths=1"]
    assert main([*where, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("protocol: ")
    assert re.search(sentence, error), error
    assert not list(tmp_path.iterdir())


def test_a_config_that_describes_no_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong.yaml"
    for text in ("data: 1", "model: {recovery: {class_path: torch.nn.Linear}}", "model: ["):
        wrong.write_text(text)
        assert main([f"--configs={CONFIGS}", f"--policies={wrong}", f"--out={tmp_path}"]) == 2
        assert capsys.readouterr().err.startswith("protocol: --policies: ")


@pytest.mark.parametrize("name", ["policies", "run"])
def test_messages_of_a_module_that_is_run_are_the_packages(name: str) -> None:
    module = f"lightning_inversion.replication.{name}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it is imported already
        run = runpy.run_module(module, run_name="a_command", alter_sys=True)
    assert run["_log"].name == module
