"""Prompt files, and the tokens of a prompt that a model can run."""

import os
from pathlib import Path

import pytest
from transformers import Gemma3Config, XLNetConfig

from lightning_inversion.data.prompts import PromptDataModule
from lightning_inversion.data.texts import ModelLimits, read_prompts, tokenize
from lightning_inversion.errors import InputError
from tests.tiny import tiny_tokenizer

LIMITS = ModelLimits(tokens=20, vocabulary=300)


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("p.txt", b"  leading space\nzwei\n\n", ["  leading space", "zwei"]),
        ("p.txt", b"windows\r\nlines\r\n", ["windows", "lines"]),
        ("p.txt", "\ufeffone\x0cpage\u2028a\x85b\n".encode(), ["one\x0cpage\u2028a\x85b"]),
        ("p.txt", b"one\n   \n", ["one", "   "]),
        ("p.jsonl", b'{"prompt": "a\\nb", "id": 3}\n', ["a\nb"]),
        ("p.jsonl", '\ufeff{"prompt": "a\u2028b\x85c"}\n'.encode(), ["a\u2028b\x85c"]),
        ("P.JSONL", b'{"prompt": "a"}\n{"prompt": "\\ud83d"}', ["a", "\ud83d"]),
    ],
)  # fmt: skip
def test_prompt_files_are_read(
    tmp_path: Path, name: str, content: bytes, prompts: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_prompts(tmp_path / name, "--data.file") == prompts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "holds no text"),
        ("p.txt", b"\xff\xfe", "cannot be read: it is not UTF-8 text"),
        ("p.txt", b"T\0h\0e\0", "cannot be read: it has NUL characters, as UTF-16 has"),
        ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "line 2 is not a JSON object"),
        ("p.jsonl", b'{"prompt": 12}\n', "line 1: .*not a string; quote it"),
        ("p.jsonl", b"{", "line 1 is not"),
        ("p.jsonl", b"[" * 100_000, "line 1 is not"),
        ("p.jsonl", b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", "line 1 is not"),
        ("p.jsonl", b'{"prompt": "a", "prompt": "b"}', "line 1: it has the key 'prompt' twice"),
        ("p.json", b'["a"]', r"is a \.json file; give a text file"),
        ("p.CSV", b"prompt\na\n", r"is a \.csv file; give a text file"),
    ],
)  # fmt: skip
def test_bad_prompt_files_are_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_prompts(tmp_path / name, "--data.file")
    assert str(error.value).startswith(f"--data.file {str(tmp_path / name)!r}")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_prompts(tmp_path / "none.txt", "--data.file")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(InputError, match="it is no regular file"):
            read_prompts(path, "--data.file")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "is empty; give it a text"),
        ("a " * 20, "has 40 tokens, and the model reads at most 20; shorten it"),
        ("a " * 5_000_000, "has over 1280 tokens, and the model reads at most 20; shorten it"),
        ("\ud83d", "half of a surrogate pair"),
        ("a<|new|>", "has token 300, and the model has embeddings for tokens 0 to 299"),
    ],
)
def test_prompts_that_cannot_be_run(prompt: str, message: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|new|>"])
    with pytest.raises(InputError, match=message):
        tokenize(prompt, tokenizer, LIMITS, special_tokens=False)


def test_spaces_alone_are_a_prompt() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenize("   ", tokenizer, LIMITS, special_tokens=False)
    assert tokenizer.decode(ids) == "   "


def test_bad_prompts_are_rows_of_their_own(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "\\ud83d"}\n{"prompt": ""}\n')
    data = PromptDataModule(
        file=str(tmp_path / "p.jsonl"), tokenizer=str(tiny_folder), tokens_per_batch=100
    )
    data.setup()
    assert [batch.prompts for batch in data.batches] == [("a",)]
    assert set(data.bad) == {1, 2}
    assert all(character < "\ud800" for text in data.prompts for character in text or "")


def test_a_token_that_stands_for_an_image_is_refused() -> None:
    config = Gemma3Config(image_token_index=7)
    with pytest.raises(InputError, match="token 7, whose place an image or a sound takes"):
        ModelLimits.of(config).check([5, 7])
    ModelLimits.of(config.text_config).check([5, 7])


def test_a_length_of_minus_one_is_no_limit() -> None:
    ModelLimits.of(XLNetConfig(vocab_size=10)).check([5] * 100)
