"""The rows of many texts: one a text, whole, in order, whoever writes them."""

from __future__ import annotations

import html
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_inversion.attribution import AttributionResult, Choices, attribute, many_texts
from lightning_inversion.attribution.many_texts import RowFile
from lightning_inversion.errors import InputError
from lightning_inversion.files import claimed
from tests.attribution.test_command import run

TEXTS = ["The sky", "A bus", "The sky"]


@pytest.fixture
def attributed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that are attributed in this process."""
    texts: list[str] = []
    attribute = many_texts.attribute

    def recording(model: Any, tokenizer: Any, text: str, *rest: Any, **named: Any) -> Any:
        texts.append(text)
        return attribute(model, tokenizer, text, *rest, **named)

    monkeypatch.setattr(many_texts, "attribute", recording)
    return texts


@pytest.fixture
def command(tiny_folder: Path, tmp_path: Path) -> tuple[object, ...]:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n\n", encoding="utf-8")
    return (
        "--prompts", tmp_path / "texts.txt", "--json", tmp_path / "rows.jsonl",
        "--model", tiny_folder, "--method", "gradient",
    )  # fmt: skip


def test_a_stopped_run_is_resumed(
    command: tuple[object, ...], tmp_path: Path, attributed: list[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    run(*command)
    whole = rows.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert [json.loads(line)["text"] for line in lines] == TEXTS == attributed
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []  # no claims are left

    attributed.clear()
    rows.write_bytes(lines[0] + lines[1][:40])  # killed while it wrote the second row
    run(*command)
    assert attributed == TEXTS[1:]
    assert rows.read_bytes() == whole
    with pytest.raises(InputError, match="other options"):
        run(*command, "--scalar", "prob")

    attributed.clear()
    rows.write_bytes(b"".join(reversed(lines)))  # killed when only the order was left to do
    run(*command)
    assert attributed == []
    assert rows.read_bytes() == whole


def test_pages_of_a_file_of_texts(tiny_folder: Path, tmp_path: Path, attributed: list[str]) -> None:
    (tmp_path / "texts.txt").write_text("A <b>cat</b>\nThe sky\n")
    words = (
        "--prompts", tmp_path / "texts.txt", "--out", tmp_path / "pages", "--model", tiny_folder,
    )  # fmt: skip
    run(*words)
    pages = tmp_path / "pages"
    names = ["index.html", "rows.jsonl", "text-1.html", "text-2.html"]
    assert sorted(path.name for path in pages.glob("[a-z]*")) == names
    index = (pages / "index.html").read_text()
    assert all(f'href="{name}"' in index for name in names[2:])
    assert "<b>" not in index
    first = (pages / "text-1.html").read_text()
    row = json.loads((pages / "rows.jsonl").read_text().splitlines()[0])
    assert row["command"] in html.unescape(first)
    attributed.clear()
    run(*words, "--scale", "rank")  # another look at the same rows
    assert attributed == []
    assert (pages / "text-1.html").read_text() != first


def test_a_text_that_cannot_be_run_costs_no_other(
    tiny_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture,
) -> None:
    texts = tmp_path / "texts.jsonl"
    prompts = ["A bus", "", "\ud83d", "The sky"]
    texts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    words = ("--prompts", texts, "--model", tiny_folder, "--method", "gradient")
    assert run(*words, "--out", tmp_path / "pages") == 0
    assert "prompt 2 is empty; give it a text. The others are run." in caplog.messages
    rows = (tmp_path / "pages" / "rows.jsonl").read_text()
    assert [
        (row["index"], row["text"], row.get("error", "")[:8])
        for row in map(json.loads, rows.splitlines())
    ] == [(0, "A bus", ""), (1, "", "is empty"), (2, "?", "has half"), (3, "The sky", "")]
    pages = {path.name for path in (tmp_path / "pages").glob("*.html")}
    assert pages == {"index.html", "text-1.html", "text-2.html"}
    assert run(*words, "--out", tmp_path / "pages") == 0  # again, and nothing is missing
    assert (tmp_path / "pages" / "rows.jsonl").read_text() == rows
    capsys.readouterr()
    assert run(*words, "--json", "-") == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [("error" in row, "scores" in row) for row in printed] == [
        (False, True), (True, False), (True, False), (False, True),
    ]  # fmt: skip

    texts.write_text('{"prompt": ""}\n{"prompt": ""}\n')
    with pytest.raises(InputError, match=r"--prompts .*, prompt 1 is empty; give it a text"):
        run(*words, "--json", "-")


def test_a_row_is_the_whole_result(llama, tokenizer) -> None:
    results = attribute(llama, tokenizer, TEXTS[:2], Choices(every_token=True))
    for result in results:
        again = AttributionResult.from_dict(json.loads(result.to_json()), display=result.display)
        assert again.to_html() == result.to_html()
        assert again.to_dict() == result.to_dict()
    assert results.to_html().count("<li>") == results._repr_html_().count("<li>") == 2
    assert [one["text"] for one in json.loads(results.to_json())] == TEXTS[:2]
    assert {record["text"] for record in results.to_records()} == {1, 2}
    for damaged in ({}, {**results[0].to_dict(), "choices": {"x": 1}}, {"schema": 1}):
        with pytest.raises(InputError, match="no result of an attribution"):
            AttributionResult.from_dict(damaged, display=results[0].display)


def test_two_runs_share_the_texts(tmp_path: Path) -> None:
    first, second = (RowFile(tmp_path / "rows.jsonl", TEXTS, {"a": 1}) for _ in range(2))
    ours, theirs = first.unclaimed(), second.unclaimed()
    assert (next(ours), next(theirs)) == (0, 1)
    first.append(0, {"text": TEXTS[0]})
    assert next(ours) == 2
    second.append(1, {"text": TEXTS[1]})
    first.append(2, {"text": TEXTS[2]})
    assert list(ours) == list(theirs) == []
    for rows in (first, second):
        assert rows.missing == []
        rows.close()
    assert len(RowFile(first.path, TEXTS, {"a": 1}).finished) == 3


def test_a_run_with_other_options_does_not_join(tmp_path: Path) -> None:
    ours, theirs = (RowFile(tmp_path / "rows.jsonl", TEXTS, {"a": a}) for a in (1, 2))
    ours.append(0, {"text": TEXTS[0]})
    with pytest.raises(InputError, match="other options"):
        next(theirs.unclaimed())


def test_the_text_of_a_run_that_dies_is_taken_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = RowFile(tmp_path / "rows.jsonl", ["a"], {})
    other = claimed(tmp_path / ".rows.jsonl.claims" / "0.claim")
    assert other.__enter__()
    looks: list[float] = []

    def die(seconds: float) -> None:
        looks.append(seconds)
        other.__exit__(None, None, None)

    monkeypatch.setattr(many_texts.time, "sleep", die)
    assert next(rows.unclaimed()) == 0
    assert len(looks) == 1


def test_a_row_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = RowFile(path, ["a", "b"], {})
    waiting = rows.unclaimed()
    assert next(waiting) == 0
    rows.append(0, {"text": "a"})
    line = b'{"index": 1, "text": "b", "settings": {}}\n'
    with path.open("ab") as file:
        file.write(line[:12])
    assert next(waiting) == 1
    with path.open("ab") as file:
        file.write(line[12:])
    assert list(waiting) == []
    assert rows.missing == []


def test_a_started_process_sends_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Exception] = []

    class Connection:
        send = sent.append

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "rows")

    threads: Callable[[int], None] = lambda _: None  # noqa: E731
    monkeypatch.setattr(many_texts.torch, "set_num_threads", threads)
    monkeypatch.setattr(many_texts, "_fill", full)
    monkeypatch.setattr(logging.getLogger("lightning_inversion"), "level", logging.ERROR)
    many_texts._work(Connection(), None, None)
    assert [(type(error), error.errno) for error in sent] == [(OSError, 28)]
