"""Files and folders: writable paths, claims, JSON lines; text that is safe to print."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tempfile
import types
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal, Union, get_args, get_origin

from filelock import FileLock, Timeout

from lightning_inversion.errors import InputError
from lightning_inversion.untrusted import check_regular, read_json

MOST_PROCESSES = max(16, 4 * (os.cpu_count() or 1))
"""Processes that one command starts at most: each holds a model."""


def check_processes(count: int) -> None:
    """Raise InputError for a --processes that is below 1, or more than a machine can run."""
    if count < 1:
        raise InputError(f"--processes must be at least 1, and is {count}.")
    if count > MOST_PROCESSES:
        raise InputError(f"--processes must be at most {MOST_PROCESSES} here, and is {count}.")


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process has the claim; it ends with the block, or with the process.

    Args:
        path: of a file that stands for the work and holds nothing; its folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    with suppress(Timeout):
        lock.acquire(timeout=0)
    try:
        yield lock.is_locked
    finally:
        lock.release()


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all: whoever reads it finds the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Error numbers of a full disk, quota or file."""


def check_writable(path: Path, option: str, folder: bool = False) -> None:
    """Refuse a path where nothing can be written, and leave nothing there.

    Args:
        path: the file or folder to be; folders on the way to it need not exist.
        option: that names it, for the message.
        folder: whether it is to be a folder.

    Raises:
        InputError: it cannot be made there.
    """
    where = f"{option} {str(path)!r}"
    if "\0" in str(path):
        raise InputError(f"{where} has a NUL in it; give another path.")
    there = path.absolute()
    try:
        while not there.exists():
            there = there.parent
        if there.is_dir():
            with tempfile.TemporaryFile(dir=there):  # in /proc permissions are not enough
                return
        writable = os.access(there, os.W_OK)
        if there.is_fifo():  # to open one that nobody reads would wait for a reader
            os.close(os.open(there, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        raise InputError(
            f"{where} cannot be written ({error.strerror}); give another path."
        ) from error
    if folder or there != path.absolute():
        raise InputError(f"{where} cannot hold files: {there} is a file; give a folder.")
    if not writable:
        raise InputError(f"{where} may not be written; give another path.")


_FORMATS = re.compile(
    r"\.(jsonl?|csv|tsv|ya?ml|toml|xml|html?|xlsx?|od[st]|docx?|pdf|parquet|arrow|feather|np[yz]"
    r"|pth?|ckpt|safetensors|gguf|pkl|pickle|h5|hdf5|db|sqlite|gz|bz2|xz|zst|zip|tar|tgz|7z"
    r"|png|jpe?g|svg|gif|txt|md)"
)


def other_format(path: Path, *own: str) -> str | None:
    """The ending of a path that names a format which is none of `own`; None without such a one."""
    ending = path.suffix.lower()
    return ending if _FORMATS.fullmatch(ending) and ending not in own else None


def check_ending(path: Path, option: str, *own: str) -> None:
    """Raise InputError for a path to write whose ending names a format that is none of `own`."""
    if kind := other_format(path, *own):
        raise InputError(
            f"{option} {str(path)!r}: no {kind} file is written; name a {own[0]} file."
        )


@contextmanager
def as_os_error() -> Iterator[None]:
    """Raise a full disk as the OSError that it is: safetensors has an error of its own."""
    try:
        yield
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None or isinstance(error, OSError):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def ended_by(error: OSError) -> str | None:
    """A sentence that names the file that failed; None where no file is to blame."""
    if error.errno in FULL:
        return f"nothing more can be written ({error.strerror}); make room and resume."
    if error.filename is not None:
        return f"{str(error.filename)!r} failed: {error.strerror}; the run has ended."
    if error.errno is not None:  # a closed pipe, too many open files, no memory for a process
        return f"the system refused: {os.strerror(error.errno)}; the run has ended."
    return None


def readable_time(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.5 h``; never none at all."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def visible(text: str) -> str:
    """`text` with a mark for each character that has no shape or would rearrange the rest.

    A line break is marked and kept; joiners and variation selectors, which belong to an emoji or a
    script, stay.
    """
    return "".join(_visible(character) for character in text)


def one_line(text: str) -> str:
    """As `visible`, in one line, spaces marked too: for tables and lists of tokens."""
    return visible(text).replace("\n", "").replace(" ", "·")


def printable(text: str) -> str:
    """`text` whose line breaks and tabs stay as they are, and the rest is `visible`: messages."""
    return "".join(letter if letter in "\n\t" else _visible(letter) for letter in text)


def _visible(character: str) -> str:
    if character == "\n":
        return "↵\n"
    if character == "\t":
        return "⇥\t"
    if character in "\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}":
        return character
    if ord(character) < 32:
        return chr(0x2400 + ord(character))
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and not (
        0xE0020 <= ord(character) <= 0xE007F  # the tags of flags
    ):
        return f"⟨U+{ord(character):04X}⟩"
    return character


_LONGEST_NAME = 240


def is_plain_name(name: str) -> bool:
    """Whether a folder of this name lies in the folder it is made in."""
    return bool(re.fullmatch(r"[\w+=,-][\w.+=,-]*", name)) and len(name) <= _LONGEST_NAME


# -- JSON lines ------------------------------------------------------------------------------

Record = dict[str, Any]
"""One line of a file of JSON lines: an object with an ``index``."""
_BLOCK = 1 << 16


def read_records(path: Path) -> list[Record]:
    """The whole records of a file in the order of their ``index``; [] where there is no file.

    A last line without its end, which a killed process was writing, is left out. Of two records
    with one index, the first counts.

    Raises:
        InputError: another line is no record.
    """
    if not path.exists():
        return []
    check_regular(path)
    records: dict[int, Record] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                try:
                    record = read_json(line)
                    records.setdefault(int(record["index"]), record)
                except (ValueError, TypeError, LookupError, OverflowError) as error:
                    raise InputError(
                        f"{str(path)!r}, line {number} is no row; remove the line and run again."
                    ) from error
    return [records[index] for index in sorted(records)]


def append_records(path: Path, records: Sequence[Record]) -> None:
    """Append records with one write, one process at a time; a torn last line is cut off first.

    Raises:
        OSError: the disk is full; what was there is whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = _encoded(records)
    with _locked(path), path.open("ab+", buffering=0) as file:
        end = _end_of_whole_lines(file)
        file.truncate(end)
        try:
            _write_synced(file, text)
        except OSError:
            file.truncate(end)
            raise


def sort_records(path: Path) -> list[Record]:
    """Put the records of a file in the order of their ``index``; a kill leaves old or new."""
    with _locked(path):
        records = read_records(path)
        if records:
            ordered = path.with_name(f"{path.name}.writing")
            with ordered.open("wb", buffering=0) as file:
                _write_synced(file, _encoded(records))
            ordered.replace(path)
    return records


def _encoded(records: Sequence[Record]) -> bytes:
    lines = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    return "".join(lines).encode()


def _write_synced(file: BinaryIO, text: bytes) -> None:
    left = memoryview(text)
    while left:
        left = left[file.write(left) :]
    os.fsync(file.fileno())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """No other process writes the file meanwhile; a killed one blocks nobody."""
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield


def _end_of_whole_lines(file: BinaryIO) -> int:
    """Where the last line break ends, searched from the end of the file."""
    start = file.seek(0, os.SEEK_END)
    while start > 0:
        start = max(0, start - _BLOCK)
        file.seek(start)
        found = file.read(_BLOCK).rfind(b"\n")
        if found >= 0:
            return start + found + 1
    return 0


def check_of(wanted: Any) -> Callable[[Any], bool]:
    """A test of whether a JSON value has a type; JSON's whole numbers serve as floats."""
    origin, arguments = get_origin(wanted), get_args(wanted)
    if wanted is Any:
        return lambda value: True
    if origin is dict:
        of_entry = check_of(arguments[1])
        return lambda value: type(value) is dict and all(map(of_entry, value.values()))
    if origin is Literal:
        return lambda value: value in arguments
    options = arguments if origin in (Union, types.UnionType) else (wanted,)
    scalars = {one for one in options if get_origin(one) is None}
    if float in scalars:
        scalars.add(int)
    entries = [check_of(get_args(one)[0]) for one in options if get_origin(one) is list]
    if not entries:
        return lambda value: type(value) in scalars
    return lambda value: (
        type(value) in scalars or (type(value) is list and all(map(entries[0], value)))
    )


def sha256_of(file: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
