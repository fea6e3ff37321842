"""Result files as they are found: whole, torn, foreign, of other versions."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lightning_inversion.errors import InputError
from lightning_inversion.report.load import load_curves, load_results, marks_of
from lightning_inversion.results import ResultRow
from tests.report.rows import predicted, row, write_run


def settings_of(folder: Path) -> list[dict[str, Any]]:
    return load_results([folder]).settings.to_dict("records")


def test_rows_are_found_at_any_depth_and_once(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "b", [row(0), row(1)])
    write_run(tmp_path / "c", [row(0, depth=2)])
    file = tmp_path / "c" / "results.jsonl"
    loaded = load_results([tmp_path, tmp_path / "a", file])
    assert len(loaded.results) == 3
    assert len(loaded.files) == 2
    assert loaded.skipped == []
    assert [*loaded.settings["depth"]] == [1, 2]


@pytest.mark.parametrize(
    ("content", "reason", "kept"),
    [
        (b"", "is empty", 0),
        (b'{"index": 0, "text": "attribution"}\n', "line 1 is not a row of results", 0),
        (b"[1, 2]\n" * 9, "line 1 is not a row of results", 0),
        (b"no json\n", "line 1 is not JSON", 0),
        (b"\xff\xfe\x00\n", "line 1 is not JSON", 0),
        (b"[" * 100_000 + b"\n", "line 1 is not JSON", 0),
        (b"%(row)s\n%(row)s\n{broken\n%(row)s\n", "line 3 is not JSON", 3),
        (b'%(row)s\n{"index": 1, "reco', "the last line is not whole", 1),
        (b"%(new)s\n", "line 1 has schema 99, and 4 is read", 0),
        (b"%(key)s\n%(row)s\n", "line 1 has an unknown key 'temperature'", 1),
        (b"%(type)s\n%(row)s\n", "line 1 has a depth of the wrong type", 1),
        (b"%(bad)s\n%(row)s\n", "prompt 2 is empty", 1),
    ],
    ids=range(12),
)
def test_what_is_no_row_is_named_and_the_other_rows_are_used(
    tmp_path: Path, content: bytes, reason: str, kept: int
) -> None:
    write_run(tmp_path / "good", [row(0)])
    file = tmp_path / "bad" / "results.jsonl"
    file.parent.mkdir()
    for key, made in (
        (b"%(row)s", row(1)),
        (b"%(new)s", row(1) | {"schema": 99}),
        (b"%(key)s", row(1) | {"temperature": 0.5}),
        (b"%(type)s", row(1) | {"depth": "1"}),
        (b"%(bad)s", row(1, error="is empty")),
    ):
        content = content.replace(key, json.dumps(made).encode())
    file.write_bytes(content)
    loaded = load_results([tmp_path])
    assert loaded.skipped == [(file, reason)]
    assert len(loaded.results) == 1 + kept
    assert len(loaded.settings) == 1


def test_nothing_to_report_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_results([tmp_path / "none"])
    (tmp_path / "x.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"No results in .*line 1 is not a row of results"):
        load_results([tmp_path])


def test_a_link_to_itself_and_a_pipe_are_passed_over(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [row(0)])
    (tmp_path / "run" / "more.jsonl").symlink_to("more.jsonl")
    os.mkfifo(tmp_path / "run" / "events.out.tfevents.1.x")
    loaded = load_results([tmp_path])
    assert [path.name for path, _ in loaded.skipped] == ["more.jsonl"]
    assert load_curves(loaded.results).empty


@pytest.mark.parametrize(
    ("more", "marks"),
    [
        ({}, "vrkw"),
        ({"ids": None}, "vuuu"),
        ({"duplicates": [0]}, "drkw"),
        ({"recovered_ids": [9, 2, 4, 7]}, "xrkw"),
        ({"recovered_ids": [9, 2, 4, 7], "duplicates": [0]}, "drkw"),
        ({"known_tokens": 2}, "ggkw"),
        ({"ids": [1], "token_verified": [True], "top_k_ids": []}, "vuuu"),
    ],
)
def test_a_letter_for_each_token(more: dict[str, Any], marks: str) -> None:
    fields: dict[str, Any] = {
        "recovered_ids": [1, 2, 4, 7], "ids": [1, 2, 3, 5],
        "token_verified": [True, False, False, False],
        "top_k_ids": [[1, 0], [2, 0], [4, 3], [7, 6]],
    }  # fmt: skip
    assert marks_of(ResultRow(index=0, **{**fields, **more})) == marks


def test_tokens_that_were_given_do_not_count_as_verified_or_missing(tmp_path: Path) -> None:
    given = {"known_tokens": 2, "token_verified": [False] * 2 + [True] * 2 + [False] * 2}
    write_run(tmp_path, [predicted(0, **given)])
    (result,) = load_results([tmp_path]).results.itertuples()
    assert result.verified_share == 0.5
    assert len(result.candidates) == 4


def test_settings_that_differ_are_kept_and_their_consequences_are_not(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [row(0, objective="L1")])
    write_run(tmp_path / "b", [row(0, objective="L2")])
    config = (
        "model: {objective: {class_path: x.L1, init_args: {relative: true}}, optimizer: {lr: %s}}"
    )
    for name, text in (("a", config % 0.1), ("b", config.replace("true", "false") % 0.2)):
        (tmp_path / name / "config.yaml").write_text(text)
    same = {"command": "fit", "model": "a/model", "depth": 1}
    assert settings_of(tmp_path) == [
        {**same, "objective": "L1", "optimizer.lr": 0.1},
        {**same, "objective": "L2", "optimizer.lr": 0.2},
    ]


def test_an_option_of_a_part_is_shown_where_the_part_does_not_decide_it(tmp_path: Path) -> None:
    for name, std in (("a", 0.0), ("b", 1.0)):
        folder = write_run(tmp_path / name, [row(0, initializer="ProbeInitializer")])
        (folder / "config.yaml").write_text(
            "model: {schedule: {class_path: x.LeftToRight, init_args: {iterations: 9}}, "
            "learnable: {class_path: x.EmbeddingInput, init_args: {initializer: {class_path: "
            f"x.ProbeInitializer, init_args: {{std: {std}}}}}}}}}}}"
        )
    shown = [one["learnable.initializer.std"] for one in settings_of(tmp_path)]
    assert shown == [0.0, 1.0]
    assert len(settings_of(tmp_path)[0]) == 4


def test_a_run_has_the_settings_that_its_command_uses_and_no_others(tmp_path: Path) -> None:
    config = (
        "model: {objective: {class_path: x.L1}, iterations: 500, recovery: {class_path: "
        "x.y.TokenRecovery, init_args: {proposer: [{class_path: x.y.%s}]}}, optimizer: {lr: %s}}"
    )
    for number, (proposer, rate) in enumerate((("ProbeProposer", 0.1), ("NearestTokens", 0.2))):
        fitted = write_run(tmp_path / f"fit-{number}", [row(0, objective="L1")])
        (fitted / "config.yaml").write_text(config % (proposer, rate))
        recovered = write_run(tmp_path / f"predict-{number}", [predicted(0)])
        (recovered / "predict.yaml").write_text(config % (proposer, rate))
    found = settings_of(tmp_path)
    assert [*found[0]] == ["command", "model", "depth", "optimizer.lr", "recovery.proposer"]
    assert [(one["command"], one["optimizer.lr"], one["recovery.proposer"]) for one in found] == [
        ("fit", 0.1, None),
        ("fit", 0.2, None),
        ("predict", None, "[ProbeProposer]"),
        ("predict", None, "[NearestTokens]"),
    ]


@pytest.mark.parametrize("config", ["- 1", "a: [", "model: 3", "model: {a: 2024-13-45}", "\0"])
def test_a_config_that_cannot_be_read_costs_nothing(tmp_path: Path, config: str) -> None:
    write_run(tmp_path, [row(0)])
    (tmp_path / "config.yaml").write_text(config)
    assert settings_of(tmp_path) == [{"command": "fit", "model": "a/model", "depth": 1}]


def test_a_slice_of_one_command_alone_is_shown(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [row(0)])
    write_run(tmp_path / "b", [predicted(0, features="0:72")])
    assert [one["features"] for one in settings_of(tmp_path)] == [None, "0:72"]
