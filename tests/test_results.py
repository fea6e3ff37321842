"""The one schema of rows: every key is of a kind, and nothing else is written or read."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from lightning_inversion.errors import InputError
from lightning_inversion.results import (
    SCHEMA,
    ResultRow,
    append_rows,
    names,
    read_rows,
    sort_rows,
)


def test_every_key_is_a_setting_an_outcome_or_a_version() -> None:
    """A new key must be given a kind: without one it would be compared by nobody or by all."""
    kinds = {field.name: field.metadata.get("kind") for field in fields(ResultRow)}
    assert set(kinds.values()) == {"setting", "outcome", "version"}, kinds
    sets = [set(names(kind)) for kind in ("setting", "outcome", "version")]
    assert sum(map(len, sets)) == len(set().union(*sets)) == len(kinds)
    assert {"depth", "model", "schedule", "command"} <= sets[0]
    assert {"index", "recovered_ids", "seconds", "seed"} <= sets[1]
    assert {"schema", "version_torch"} <= sets[2]


def test_a_key_that_the_schema_does_not_have_cannot_be_written() -> None:
    with pytest.raises(TypeError, match="orders"):
        ResultRow(index=0, **{"orders": []})
    with pytest.raises(TypeError):
        ResultRow(**{"index": 0, "token_accuracies": 1.0})


def test_a_row_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    rows = [
        ResultRow(index=1, prompt="é", ids=[1, 2], token_accuracy=1, depth=3, verified=True),
        ResultRow(index=0, error="is empty; give it a text.", token_residuals=[0.5, None]),
    ]
    append_rows(path, rows)
    assert read_rows(path) == rows[::-1]
    with path.open("ab") as file:
        file.write(b'{"index": 2, "te')  # killed here
    assert read_rows(path) == rows[::-1]
    assert sort_rows(path) == rows[::-1]
    assert path.read_text().count("\n") == 2
    assert read_rows(tmp_path / "none.jsonl") == []


def test_a_record_has_every_key_in_the_order_of_the_schema() -> None:
    record = ResultRow(index=0).to_record()
    assert list(record) == [field.name for field in fields(ResultRow)]
    assert record["schema"] == SCHEMA


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"orders": []}, "has an unknown key 'orders'"),
        ({"schema": 3}, "has schema 3, and 4 is read"),
        ({"schema": None}, "has schema None"),
        ({"index": -1}, "has no index"),
        ({"index": True}, "has a index of the wrong type"),
        ({"depth": "two"}, "has a depth of the wrong type"),
        ({"ids": [1, "2"]}, "has a ids of the wrong type"),
        ({"command": "guess"}, "has a command of the wrong type"),
        ({"verified": 1}, "has a verified of the wrong type"),
        ({"token_accuracy": True}, "has a token_accuracy of the wrong type"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_record_is_named(changes: dict[str, object], sentence: str) -> None:
    record = ResultRow(index=0).to_record()
    assert ResultRow.from_record(record) == ResultRow(index=0)
    with pytest.raises(ValueError, match=sentence):
        ResultRow.from_record({**record, **changes})


def test_a_record_is_an_object_with_an_index() -> None:
    with pytest.raises(ValueError, match="is no JSON object"):
        ResultRow.from_record([1])
    with pytest.raises(ValueError, match="has no index"):
        ResultRow.from_record({"schema": SCHEMA})


def test_a_file_with_another_schema_is_named_with_the_prompt(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"index": 4, "schema": 3}\n')
    with pytest.raises(InputError, match=r"results\.jsonl': the row of prompt 5 has schema 3"):
        read_rows(path)
