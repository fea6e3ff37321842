"""The command: files and pipes, one sentence for wrong input, rows that go on after a kill."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_inversion.attribution import request
from lightning_inversion.attribution.command import add_attribute_arguments, run_attribute
from lightning_inversion.attribution.rows import RowFile
from lightning_inversion.errors import InputError
from lightning_inversion.transformer.loading import TransformerSpec
from tests.attribution.conftest import SENTENCE


def run(*words: object) -> int:
    parser = ArgumentParser(prog="attribute", exit_on_error=False, allow_abbrev=False)
    add_attribute_arguments(parser)
    return run_attribute(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(spec: TransformerSpec) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(TransformerSpec, "load_causal_lm", load)


def test_page_and_json(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    page, data = tmp_path / "new" / "page.html", tmp_path / "result.json"
    words = [SENTENCE, "--model", tiny_folder, "--out", page, "--json", data]
    assert run(*words, "--method", "occlusion", "--against", "s", "--scale", "sqrt") == 0
    assert "<!doctype html>" in page.read_text(encoding="utf-8")
    result = json.loads(data.read_text(encoding="utf-8"))
    assert result["text"] == SENTENCE
    assert result["look"]["scale"] == "sqrt"
    assert result["model"]["model"] == str(tiny_folder)
    said = capsys.readouterr()
    assert "forwards" in said.err
    assert "predicted next token" in said.out


def test_the_command_in_the_output_gives_the_same_result(tiny_folder: Path, tmp_path: Path) -> None:
    import shlex

    first, second = tmp_path / "1.json", tmp_path / "2.json"
    options = ["--preset", "document", "--method", "occlusion", "--dtype", "bfloat16"]
    run("a bus", "--model", tiny_folder, "--json", first, *options)
    words = shlex.split(json.loads(first.read_text())["command"])
    run(*words[2:], "--json", second)
    assert first.read_text() == second.read_text()


def test_pipes(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(SENTENCE + "\n"))
    assert run("-", "--model", tiny_folder, "--json", "-") == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["text"] == SENTENCE
    assert "predicted next token" in said.err


def test_tensorboard(tiny_folder: Path, tmp_path: Path) -> None:
    run(SENTENCE, "--model", tiny_folder, "--tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["images"] == ["attribution"]
    assert events.Tags()["tensors"] == ["attribution/text_summary"]


def test_many_texts_go_on_where_they_stopped(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, rows = tmp_path / "texts.txt", tmp_path / "rows.jsonl"
    texts.write_text("The sky\nA bus\nThe sky\n\n", encoding="utf-8")
    words = ("--texts", texts, "--model", tiny_folder, "--json", rows, "--method", "gradient")
    run(*words)
    whole = rows.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert [json.loads(line)["text"] for line in lines] == ["The sky", "A bus", "The sky"]

    rows.write_bytes(lines[0] + lines[1][:40])  # killed while it wrote the second row
    done: list[str] = []
    attribute = request.attribute

    def counting(model: object, tokenizer: object, text: str, *rest: object, **named: object):
        done.append(text)
        return attribute(model, tokenizer, text, *rest, **named)

    monkeypatch.setattr(request, "attribute", counting)
    run(*words)
    assert done == ["A bus", "The sky"]
    assert rows.read_bytes() == whole
    with pytest.raises(InputError, match="other options"):
        run(*words, "--scalar", "prob")

    rows.write_bytes(b"".join(reversed(lines)))  # killed when only the order was left to do
    run(*words)
    assert done == ["A bus", "The sky"]
    assert rows.read_bytes() == whole


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Give one text"),
        (["a", "--texts", "b"], "two inputs"),
        ([""], "empty"),
        (["a", "--weight", "2"], "--weight"),
        (["a", "--preset", "paper"], "--preset"),
        (["a", "--preset", "document", "--scalar", "prob"], "--scalar"),
        (["a", "--out", "-", "--json", "-"], "--out and --json"),
        (["a", "--out", "."], "--out"),
        (["a", "--out", "/proc/x.html"], "--out '/proc/x.html' cannot be written"),
        (["a", "--model", "no such model"], "^--model"),
        (["a", "--quantization", "int8", "--dtype", "float16"], "^--quantization"),
        (["a", "--token", "two words"], "--token"),
        (["a", "--replacement", "two words"], "--replacement"),
        (["--texts", "no such file"], "--texts"),
        (["a", "--processes", "0"], "--processes must be at least 1, and is 0"),
        (["a", "--processes", "-2"], "--processes must be at least 1, and is -2"),
        (["a", "--processes", "2"], "--processes .* one text"),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_wrong_input_is_one_sentence_before_a_model_loads(
    tiny_folder: Path, words: list[str], message: str
) -> None:
    model = [] if "--model" in words or "--quantization" in words else ["--model", tiny_folder]
    with pytest.raises(InputError, match=message) as error:
        run(*words, *model)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("no_model")
def test_texts_need_rows(tiny_folder: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"prompt": "a"}\n')
    words = ["--texts", texts, "--model", tiny_folder]
    with pytest.raises(InputError, match="--json"):
        run(*words)
    with pytest.raises(InputError, match="--out"):
        run(*words, "--json", tmp_path / "rows", "--out", tmp_path / "page.html")
    texts.write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match="line 1"):
        run(*words, "--json", tmp_path / "rows")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "0", "--json", "rows"], "--processes must be at least 1"),
        (["--processes", "2", "--json", "-"], "--processes needs a file of rows"),
        (
            ["--processes", "2", "--json", "rows", "--device_map", "auto"],
            "--device_map .* --processes",
        ),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_what_cannot_be_shared_over_processes(
    tiny_folder: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("a\nb\n")
    with pytest.raises(InputError, match=message) as error:
        run("--texts", texts, "--model", tiny_folder, *options)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("no_model")
def test_two_runs_do_not_write_one_file(tiny_folder: Path, tmp_path: Path) -> None:
    texts, rows = tmp_path / "texts.txt", tmp_path / "rows.jsonl"
    texts.write_text("a\n")
    with (
        RowFile.alone(rows, ["a"], {}),
        pytest.raises(InputError, match=r"--json .* is being written by another run"),
    ):
        run("--texts", texts, "--model", tiny_folder, "--json", rows)
