"""Files of prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_inversion.data.texts import read_prompts
from lightning_inversion.errors import InputError


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "", "holds no text"),
        (
            "p.jsonl",
            '{"prompt": "a"}\n{"text": "b"}\n',
            'line 2 is not a JSON object with a key "p',
        ),
        ("p.jsonl", '{"prompt": 12}\n', "line 1: .*not a string; quote it"),
        ("p.jsonl", "{", "line 1 is not"),
    ],
)
def test_bad_prompt_files_are_named_by_line(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_prompts(path, "--data.file")


def test_prompt_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("  leading space\nzwei\n\n")
    assert read_prompts(tmp_path / "p.txt", "--data.file") == ["  leading space", "zwei"]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\\nb"}\n')
    assert read_prompts(tmp_path / "p.jsonl", "--data.file") == ["a\nb"]
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_prompts(tmp_path / "none.txt", "--data.file")
