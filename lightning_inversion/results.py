"""Rows of JSON, one a line, each whole or not at all: a killed run loses no finished row."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

from lightning_inversion.errors import InputError

Row = dict[str, Any]

_BLOCK = 1 << 16


def read_rows(path: Path) -> list[Row]:
    """The whole rows of a file in the order of their ``index``; [] where there is no file.

    What a killed process was writing, a last line without its end, is left out, and so is a row
    that was written twice.

    Raises:
        InputError: another line is no row.
    """
    if not path.exists():
        return []
    rows: dict[int, Row] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                try:
                    row = json.loads(line)
                    rows.setdefault(int(row["index"]), row)
                except (ValueError, TypeError, LookupError) as error:
                    raise InputError(
                        f"{str(path)!r}, line {number} is no row; remove the line and go on."
                    ) from error
    return [rows[index] for index in sorted(rows)]


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Append rows with one write, one process at a time; a torn last line is cut off first.

    Raises:
        OSError: the disk is full; what was there is whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = _lines(rows)
    with _alone(path), path.open("ab+", buffering=0) as file:
        end = _end_of_whole_lines(file)
        file.truncate(end)
        try:
            _write(file, text)
        except OSError:
            file.truncate(end)
            raise


def settle_rows(path: Path) -> list[Row]:
    """Put the rows of a finished run in the order of their ``index``; a kill leaves old or new."""
    with _alone(path):
        rows = read_rows(path)
        if rows:
            ordered = path.with_name(f"{path.name}.writing")
            with ordered.open("wb", buffering=0) as file:
                _write(file, _lines(rows))
            ordered.replace(path)
    return rows


def _lines(rows: Sequence[Row]) -> bytes:
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    return "".join(lines).encode()


def _write(file: BinaryIO, text: bytes) -> None:
    left = memoryview(text)
    while left:
        left = left[file.write(left) :]
    os.fsync(file.fileno())


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """No other process of the run writes meanwhile; a killed one holds nothing up."""
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    with lock:
        yield


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
