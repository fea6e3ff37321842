"""The command: files and pipes, text as it is written, one sentence for wrong input."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_inversion.__main__ import main
from lightning_inversion.attribution.command import add_attribute_arguments, run_attribute
from lightning_inversion.cli.parser import OneSentenceParser
from lightning_inversion.errors import InputError
from lightning_inversion.transformer.loading import TransformerSpec
from tests.attribution.conftest import SENTENCE


def run(*words: object) -> int:
    parser = OneSentenceParser(prog="attribute")
    add_attribute_arguments(parser)
    return run_attribute(parser.parse_command([str(word) for word in words]))


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(spec: TransformerSpec) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(TransformerSpec, "load_causal_lm", load)


def test_page_and_json(
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "lightning_inversion")
    page, data = tmp_path / "new" / "page.html", tmp_path / "result.json"
    words = [SENTENCE, "--model", tiny_folder, "--out", page, "--json", data]
    assert run(*words, "--method", "occlusion", "--against", "s", "--scale", "sqrt") == 0
    assert "<!doctype html>" in page.read_text(encoding="utf-8")
    result = json.loads(data.read_text(encoding="utf-8"))
    assert result["text"] == SENTENCE
    assert result["display"]["scale"] == "sqrt"
    assert result["model"]["model"] == str(tiny_folder)
    assert "forwards" in caplog.text
    assert f"written to {page}" in caplog.messages
    printed = capsys.readouterr().out
    assert "predicted next token" in printed
    position, score, _ = printed.splitlines()[-1].split("\t")  # no terminal
    assert int(position) == len(result["ids"]) - 1
    assert float(score) == pytest.approx(result["scores"][0][-1], rel=1e-5)


def test_the_command_in_the_output_gives_the_same_result(tiny_folder: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "1.json", tmp_path / "2.json"
    options = ["--preset", "original", "--method", "occlusion", "--dtype", "bfloat16"]
    run("a bus", "--model", tiny_folder, "--json", first, *options)
    words = shlex.split(json.loads(first.read_text())["command"])
    run(*words[2:], "--json", second)
    assert first.read_text() == second.read_text()


def test_pipes(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(SENTENCE + "\n"))
    assert run("-", "--model", tiny_folder, "--json", "-") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["text"] == SENTENCE
    assert "predicted next token" in printed.err
    monkeypatch.setattr("sys.stdin", io.StringIO("a" * 10_000_001))
    with pytest.raises(InputError, match="on stdin has over 10000000 characters; shorten it"):
        run("-", "--model", tiny_folder, "--json", "-")


@pytest.mark.parametrize("text", ["# Heading", "null", "~", "[1]", "'x'", "a: b", "12", " #", "\n"])
def test_text_is_text(text: str) -> None:
    parser = OneSentenceParser(prog="attribute")
    add_attribute_arguments(parser)
    options = parser.parse_command(
        [text, "--token", text, "--against", text, "--replacement", text]
    )
    assert (options.text, options.token, options.against, options.replacement) == (text,) * 4


@pytest.mark.integration  # a whole run
def test_rows_of_results_and_of_attributions_have_the_same_tokens(
    tiny_folder: Path, tmp_path: Path
) -> None:
    prompt = "Ça va, é 👧!"
    words = [
        "predict",
        f"--model.transformer.model={tiny_folder}",
        "--model.transformer.depth=1",
        f"--data.prompts={json.dumps([prompt], ensure_ascii=False)}",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.accelerator=cpu",
    ]
    assert main(words) == 0
    (results,) = tmp_path.rglob("results.jsonl")
    assert run(prompt, "--model", tiny_folder, "--json", tmp_path / "attribution.json") == 0
    row = json.loads(results.read_text(encoding="utf-8"))
    attribution = json.loads((tmp_path / "attribution.json").read_text(encoding="utf-8"))
    assert row["recovered"] == "".join(row["recovered_tokens"]) == prompt
    assert attribution["tokens"] == row["recovered_tokens"]
    assert "👧" in attribution["tokens"]


def test_tensorboard(tiny_folder: Path, tmp_path: Path) -> None:
    run(SENTENCE, "--model", tiny_folder, "--tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["images"] == ["attribution"]
    assert events.Tags()["tensors"] == ["attribution/text_summary"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Give one text"),
        (["a", "--prompts", "b"], "two inputs"),
        ([""], "empty"),
        (["a", "--weight", "2"], "--weight"),
        ([" ", "--preset", "paper"], "--preset"),
        (["a", "--preset", "original", "--scalar", "prob"], "--scalar"),
        (["a", "--out", "-", "--json", "-"], "--out and --json"),
        (["a", "--out", "x", "--json", "x"], "--out and --json are both 'x'; give two files"),
        (["a", "--out", "."], "--out"),
        (["a", "--out", "page.pdf"], "--out 'page.pdf': no .pdf file is written; name a .html"),
        (["a", "--json", "a.HTML"], "--json 'a.HTML': no .html file is written; name a .json"),
        (["a", "--out", "/proc/x.html"], "--out '/proc/x.html' cannot be written"),
        (["a", "--model", "no such model"], "^--model"),
        (["a", "--quantization", "int8", "--dtype", "float16"], "quantization: int8"),
        (["a", "--token", "two words"], "--token"),
        (["a" * 400], "400 tokens, and the model reads at most 128"),
        (["a", "--replacement", "two words"], "--replacement"),
        (["--prompts", "no such file"], "--prompts"),
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
    words = ["--prompts", texts, "--model", tiny_folder]
    with pytest.raises(InputError, match="--json"):
        run(*words)
    for options, message in (
        (["--json", tmp_path / "rows", "--out", tmp_path / "page.html"], "name a folder"),
        (["--json", "-", "--out", tmp_path / "pages"], "leave out the -"),
        (["--tensorboard", tmp_path / "events"], "--tensorboard shows one text"),
    ):
        with pytest.raises(InputError, match=message):
            run(*words, *options)
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
        run("--prompts", texts, "--model", tiny_folder, *options)
    assert "\n" not in str(error.value)
