"""Values, bytes and files that nobody meant to be read: made from a right one, by a seed."""

from __future__ import annotations

import copy
import json
import os
import random
import struct
from pathlib import Path
from typing import Any

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3.5, 1e308, float("nan"), float("inf"), 10**30, 2**63, -(2**63),
    "", " ", "null", "~", "12", "1e400", "# x", "../../escape", "/etc/passwd", "a\0b",
    "\x1b[31mred", "\u202edcba", "\u2028", "\ud83d", "$\\bad{x}$", "<script>alert(1)</script>",
    "é👧", "x" * 2000,
    "!!python/object/apply:os.system ['true']", "__import__('os')", "%s%n{0}", [], {}, [[]], [None],
    [1, "a"], {"a": 1}, [[0] * 4] * 4, [10**30], list(range(300)), {"": ""}, ["../x"] * 3,
]  # fmt: skip
"""What stands where something else should."""
ARTICLES = [
    "The sky is blue.", "A quick brown fox", "  two spaces ", "tab\tinside", "form\x0cfeed",
    "é👧 日本",
    "line\u2028separator", "next\x85line", "bell\x07", "\u202eturned", "\x1b[31mred", "# Heading",
    "null", "~", "12", "yes", "$\\bad{x}$", "{\"a\": 1}", "a, b: c", "'quoted'",
    '"double"', "- item",
    "\\n", "%d %s", "<b>&amp;</b>", "\ufeffmark", "a\u0301", "👩\u200d👧", "&anchor *alias", "!tag",
]  # fmt: skip
"""Texts that are prompts as they stand."""


def text(draw: random.Random) -> str:
    """A prompt: one of `ARTICLES`, some of them joined, or letters from anywhere."""
    kind = draw.random()
    if kind < 0.5:
        return draw.choice(ARTICLES)
    if kind < 0.8:
        return " ".join(draw.choices(ARTICLES, k=draw.randint(2, 3)))
    points = [draw.choice([*range(32, 127), *range(0xA0, 0x2FF), 0x1F467, 0x4E00, 0x5D0])
              for _ in range(draw.randint(1, 12))]  # fmt: skip
    return "".join(map(chr, points)).strip() or "x"


def value(draw: random.Random) -> Any:
    """One of `VALUES`, or a few of them in a list or an object."""
    kind = draw.random()
    if kind < 0.8:
        return draw.choice(VALUES)
    some = draw.choices(VALUES, k=draw.randint(1, 3))
    return some if kind < 0.9 else {str(draw.choice(VALUES)): one for one in some}


def json_value(draw: random.Random, right: Any, changes: int = 1) -> Any:
    """A JSON value of which something is replaced, left out, added or put in another place."""
    changed = copy.deepcopy(right)
    for _ in range(changes):
        changed = _changed(draw, changed)
    return changed


def _changed(draw: random.Random, right: Any) -> Any:
    places: list[tuple[Any, Any]] = []
    pending = [right] if isinstance(right, dict | list) else []
    while pending:
        holder = pending.pop()
        keys = holder if isinstance(holder, dict) else range(min(len(holder), 6))
        places += [(holder, key) for key in keys]
        pending += [holder[key] for key in keys if isinstance(holder[key], dict | list)]
    if not places or draw.random() < 0.03:
        return value(draw)
    holder, key = draw.choice(places)
    how = draw.random()
    if how < 0.15 and isinstance(holder, dict):
        del holder[key]
    elif how < 0.25 and isinstance(holder, dict):
        holder[str(draw.choice(VALUES))] = value(draw)
    elif how < 0.35:
        holder[key] = [holder[key]]
    elif how < 0.45:
        holder[key] = copy.deepcopy(draw.choice(places)[0])
    elif how < 0.55 and isinstance(holder[key], int | float):
        holder[key] = draw.choice([-holder[key], holder[key] * 1000, holder[key] + 0.5, 10**18])
    elif how < 0.6:
        holder[key] = str(holder[key])
    else:
        holder[key] = value(draw)
    return right


def json_text(draw: random.Random, right: Any) -> bytes:
    """The text of a JSON value of which something is wrong: the value, or the text."""
    kind = draw.random()
    if kind < 0.7:
        return dumped(json_value(draw, right, draw.choice([1, 1, 1, 2, 4])))
    if kind < 0.8:
        return draw.choice(WHOLE_FILES)
    return contents(draw, dumped(right))


def dumped(record: Any) -> bytes:
    """JSON, with NaN and halves of surrogate pairs as Python writes them."""
    return json.dumps(record).encode()


WHOLE_FILES = [
    b"", b"\0", b"null", b"[]", b"{}", b"0", b'""', b"[" * 100_000, b'{"a":' * 5000, b"9" * 5000,
    b"\xff\xfe\x00", b"\xef\xbb\xbf", b"\xef\xbb\xbf{}", b"PK\x03\x04" + bytes(30),
    b"GGUF" + bytes(20),
    b"\x93NUMPY\x01\x00" + bytes(20), struct.pack("<Q", 2**62) + b"{}", b"\n" * 1000, b"\r",
    b"a\rb",
    b"%PDF-1.4", b"\x89PNG\r\n\x1a\n", b"<html>", b"\x80\x04\x95" + bytes(9), b"nan", b"- - - - -",
    b"a: &a [*a]", b"&a a: *a", b"? ? ? ?", b"!!python/name:os.system", b"--- a\n--- b\n",
    b"a: b: c",
    b"x: !!binary aGk=", b"<<: *x", b"%YAML 9.9\n---\n", b"2001-01-01", b"0o7: 0x1f", b"\t", b"@",
]  # fmt: skip
"""Files of other kinds, and of none."""


def contents(draw: random.Random, right: bytes) -> bytes:
    """A file's bytes, damaged: cut, flipped, doubled, filled, mixed up, or in another encoding."""
    how, data = draw.randrange(11), bytearray(right)
    at = draw.randrange(len(data) + 1)
    if how == 0:
        return bytes(data[:at])
    if how == 1:
        for _ in range(draw.choice([1, 1, 3, 30])):
            if data:
                data[draw.randrange(len(data))] = draw.randrange(256)
    elif how == 2:
        data[at:at] = draw.choice([b"\0", b"\n", b"\xff", b"\x1b[31m", b'"', b"{", b"\xe2\x80\xa8"])
    elif how == 3:
        del data[at : at + draw.choice([1, 2, 10, 100])]
    elif how == 4:
        data[at : at + 16] = bytes(16)
    elif how == 5:
        data += data[at:]
    elif how == 6:
        return draw.choice(WHOLE_FILES) + bytes(data)
    elif how == 7:
        return bytes(data) + draw.choice(WHOLE_FILES)
    elif how == 8:
        return data.decode("latin-1").encode(draw.choice(["utf-16", "utf-32", "utf-8-sig"]))
    elif how == 9:
        return draw.choice(WHOLE_FILES)
    else:
        other = draw.randrange(len(data) + 1)
        data = data[other:] + data[:other]
    return bytes(data)


def in_place_of(draw: random.Random, path: Path) -> str:
    """Put something else where a file is: a folder, a pipe, a link to itself; returns what."""
    what = draw.choice(["folder", "pipe", "loop", "dangling", "device", "unreadable", "nothing"])
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(path):
        path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "loop":
        path.symlink_to(path)
    elif what == "dangling":
        path.symlink_to(path.parent / "not there")
    elif what == "device":
        path.symlink_to(draw.choice(["/dev/null", "/dev/zero", "/dev/full"]))
    elif what == "unreadable":
        path.write_bytes(b"x")
        path.chmod(0)
    return what


def safetensors(draw: random.Random, right: bytes) -> bytes:
    """A safetensors file whose header lies, or whose bytes are damaged."""
    if draw.random() < 0.4:
        return contents(draw, right)
    (length,) = struct.unpack("<Q", right[:8])
    header, data = json.loads(right[8 : 8 + length]), right[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    if not names:
        return contents(draw, right)
    name = draw.choice(names)
    entry = header[name]
    how = draw.randrange(8)
    if how == 0:
        entry["dtype"] = draw.choice(["F64", "BF16", "I8", "BOOL", "F8_E4M3", "X", 3, None, "C64"])
    elif how == 1:
        entry["shape"] = draw.choice(
            [[], [0], [1], [-1], [10**18], [2**40, 2**40], "x", [1.5], [[]]]
        )
    elif how == 2:
        entry["data_offsets"] = draw.choice([[0, 0], [-1, 4], [0, 10**15], [8, 4], [0], "x", None])
    elif how == 3:
        header["__metadata__"] = draw.choice(
            [{"a": 1}, {"format": "tf"}, [], "x", {"manifest": "{"}]
        )
    elif how == 4:
        header[str(draw.choice(VALUES))] = header.pop(name)
    elif how == 5:
        del header[name]
    elif how == 6:
        header = json_value(draw, header)
    else:
        whole = bytearray(data)
        word = draw.choice(
            [b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", bytes(4)]
        )
        for _ in range(draw.choice([1, 50])):
            at = draw.randrange(max(1, len(whole) // 4)) * 4
            whole[at : at + 4] = word
        data = bytes(whole[: len(data)])
    text = dumped(header)
    return struct.pack("<Q", draw.choice([len(text)] * 6 + [len(text) + 1, 2**40])) + text + data
