"""Rows of JSON, one a line, each whole or not at all: a killed run loses no finished row."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

Row = dict[str, Any]

_BLOCK = 1 << 16


def read_rows(path: Path) -> list[Row]:
    """The whole rows of a file in the order of their ``index``; [] where there is no file.

    What a killed process was writing, a last line without its end, is left out.
    """
    if not path.exists():
        return []
    with path.open("rb") as file:
        rows = [json.loads(line) for line in file if line.endswith(b"\n")]
    return sorted(rows, key=lambda row: int(row["index"]))


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Append rows with one write; a torn last line is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with path.open("ab+") as file:
        file.truncate(_end_of_whole_lines(file))
        file.write("".join(lines).encode())
        file.flush()
        os.fsync(file.fileno())


def _end_of_whole_lines(file: BinaryIO) -> int:
    """Where the last line break ends, looked for from the end of the file."""
    start = file.seek(0, os.SEEK_END)
    while start > 0:
        start = max(0, start - _BLOCK)
        file.seek(start)
        found = file.read(_BLOCK).rfind(b"\n")
        if found >= 0:
            return start + found + 1
    return 0
