"""Result files as they are found: whole, torn, foreign, old and new."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_inversion.errors import InputError
from lightning_inversion.report.load import marks_of, read
from tests.report.rows import predicted, row, write_run

CONFIGS = Path(__file__).parents[2] / "configs"


def test_rows_are_found_at_any_depth_and_once(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "b", [row(0), row(1)])
    write_run(tmp_path / "c", [row(0, depth=2)])
    file = tmp_path / "c" / "results.jsonl"
    reading = read([tmp_path, tmp_path / "a", file])
    assert len(reading.results) == 3
    assert len(reading.files) == 2
    assert reading.skipped == []
    assert {result.settings["depth"] for result in reading.results} == {1, 2}


@pytest.mark.parametrize(
    ("content", "reason", "kept"),
    [
        (b"", "is empty", 0),
        (b'{"index": 0, "text": "attribution"}\n', "line 1 is not a row of results", 0),
        (b"[1, 2]\n", "line 1 is not a row of results", 0),
        (b"no json\n", "line 1 is not JSON", 0),
        (b"\xff\xfe\x00\n", "line 1 is not JSON", 0),
        (b"%(row)s\n%(row)s\n{broken\n%(row)s\n", "line 3 is not JSON; the others are used", 3),
        (b'%(row)s\n{"index": 1, "reco', "the last line is not whole; the others are used", 1),
        (b"%(new)s\n", "line 1 has schema 99, newer than 3", 0),
        (b"%(bad)s\n%(row)s\n", "prompt 2 is empty", 1),
    ],
)
def test_what_is_partial_or_foreign_is_named(tmp_path: Path, content, reason, kept) -> None:
    write_run(tmp_path / "good", [row(0)])
    file = tmp_path / "bad" / "results.jsonl"
    file.parent.mkdir()
    for key, made in (
        (b"%(row)s", row(1)),
        (b"%(new)s", row(1, schema=99)),
        (b"%(bad)s", row(1, error="is empty")),
    ):
        content = content.replace(key, json.dumps(made).encode())
    file.write_bytes(content)
    reading = read([tmp_path])
    assert reading.skipped == [(file, reason)]
    assert len(reading.results) == 1 + kept


def test_nothing_to_report_is_said_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read([tmp_path / "none"])
    (tmp_path / "x.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"No results in .*line 1 is not a row of results"):
        read([tmp_path])


@pytest.mark.parametrize(
    ("more", "marks"),
    [
        ({}, "crkwu"[:3] + "w"),
        ({"ids": None}, "cuuu"),
        ({"duplicates": [0]}, "trkw"),
        ({"recovered_ids": [9, 2, 4, 7]}, "xrkw"),
        ({"recovered_ids": [9, 2, 4, 7], "duplicates": [0]}, "trkw"),
        ({"verified": [True, True, False, False], "unresolved": None}, "cckw"),
    ],
)
def test_a_letter_for_each_token(more, marks) -> None:
    made = {
        "recovered_ids": [1, 2, 4, 7], "ids": [1, 2, 3, 5], "unresolved": [1, 2, 3],
        "top_k_ids": [[1, 0], [2, 0], [4, 3], [7, 6]],
    }  # fmt: skip
    assert marks_of({**made, **more}) == marks


def test_settings_that_differ_are_kept_and_their_consequences_are_not(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [row(0, objective="L1")])
    write_run(tmp_path / "b", [row(0, objective="L2")])
    config = (
        "model: {objective: {class_path: x.L1, init_args: {relative: true}}, optimizer: {lr: %s}}"
    )
    for name, text in (("a", config % 0.1), ("b", config.replace("true", "false") % 0.2)):
        (tmp_path / name / "config.yaml").write_text(text)
    settings = [result.settings for result in read([tmp_path]).results]
    assert [s["objective"] for s in settings] == ["L1", "L2"]
    assert [s["optimizer.lr"] for s in settings] == [0.1, 0.2]
    assert set(settings[0]) == {"command", "model", "depth", "objective", "optimizer.lr"}


def test_a_run_has_the_settings_that_its_command_uses_and_no_others(tmp_path: Path) -> None:
    config = (
        "model: {objective: {class_path: x.L1}, iterations: 500, recovery: {class_path: "
        "x.y.TokenRecovery, init_args: {order: [{class_path: x.y.%s}]}}, optimizer: {lr: %s}}"
    )
    for order, rate in (("ProbeProposer", 0.1), ("NearestTokens", 0.2)):
        fitted = write_run(tmp_path / f"fit-{order}", [row(0, objective="L1")])
        (fitted / "config.yaml").write_text(config % (order, rate))
        read_back = write_run(tmp_path / f"predict-{order}", [predicted(0)])
        (read_back / "predict.yaml").write_text(config % (order, rate))
    by_command: dict[str, list[dict[str, Any]]] = {"fit": [], "predict": []}
    for result in read([tmp_path]).results:
        own = {key: value for key, value in result.settings.items() if value is not None}
        by_command[own.pop("command")].append(own)
    same = {"model": "a/model", "depth": 1}
    assert by_command == {
        "fit": [{**same, "optimizer.lr": 0.1}, {**same, "optimizer.lr": 0.2}],
        "predict": [
            {**same, "recovery.order": "[{'class_path': 'ProbeProposer'}]"},
            {**same, "recovery.order": "[{'class_path': 'NearestTokens'}]"},
        ],
    }


def test_the_kept_results_of_the_documents_experiments_are_read() -> None:
    reading = read([CONFIGS / "results"])
    assert reading.skipped == []
    assert len(reading.results) > 500
    assert {result.settings["features"] for result in reading.results} >= {"0:72", None}


def test_certificates_of_recovery_are_read(tmp_path: Path) -> None:
    write_run(tmp_path, [predicted(0, right=0.5), predicted(1, prompt=None, ids=None)])
    one, two = read([tmp_path]).results
    assert one.settings["command"] == "predict"
    assert len(one.candidates) == 6
    assert two.prompt is None
    assert set(two.marks) <= {"c", "u"}
