"""Many texts -> one JSON line each, whole or not at all; a killed run goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning_inversion.errors import InputError

Row = dict[str, Any]


def read_texts(path: Path, option: str = "--texts") -> list[str]:
    """The texts of a file: one a line, or in a .jsonl file the key "prompt" of each line.

    Raises:
        InputError: names the file, and the line where one is at fault.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InputError(f"{option} {str(path)!r} cannot be read: {reason}.") from error
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise InputError(f"{option} {str(path)!r} holds no text.")
    texts = []
    for number, line in enumerate(lines, 1):
        where = f"{option} {str(path)!r}, line {number}"
        text = _prompt_of(line, where) if path.suffix == ".jsonl" else line
        if not text.strip():
            raise InputError(f"{where} is empty; every line needs a text.")
        texts.append(text)
    return texts


def _prompt_of(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f'{where} is not a JSON object with a key "prompt".') from error
    if not isinstance(prompt, str):
        raise InputError(f'{where}: "prompt" is {prompt!r}, not a string; quote it.')
    return prompt


class RowFile:
    """A JSONL file that several runs of one command fill.

    Args:
        path: of the file, which may be there already.
        texts: of the whole run, in order.
        settings: what decides the scores beside the text.

    Raises:
        InputError: the file holds rows of another run.
    """

    def __init__(self, path: Path, texts: Sequence[str], settings: Row) -> None:
        self.path, self.settings = path, settings
        self.finished: set[int] = set()
        for row in _whole_rows(path):
            index = int(row.get("index", -1))
            text = texts[index] if 0 <= index < len(texts) else None
            if text is None or row.get("text") != text or row.get("settings") != settings:
                raise InputError(
                    f"--json {str(path)!r} holds rows of other texts or other options; "
                    "give another file, or remove it."
                )
            self.finished.add(index)

    def append(self, index: int, row: Row) -> None:
        """Append the row of text `index`; a torn last line is cut off first."""
        line = {"index": index, "settings": self.settings, **row}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            file.seek(0, os.SEEK_END)
            file.truncate(_end_of_whole_lines(file))
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.finished.add(index)


def _end_of_whole_lines(file: Any) -> int:
    """Where the last line break is, looked for from the end."""
    end = file.tell()
    block = 1 << 16
    start = end
    while start > 0:
        start = max(0, start - block)
        file.seek(start)
        found = file.read(block).rfind(b"\n")
        if found >= 0:
            return int(start + found + 1)
    return 0


def _whole_rows(path: Path) -> Iterable[Row]:
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)
