"""Bytes from anywhere through each reader: the right value or one sentence, and nothing is run.

Few cases here; ``integration/test_fuzz.py`` runs the same readers on thousands.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from lightning_inversion.cli.resume import read_checkpoint, read_settings
from lightning_inversion.data.targets import Captured
from lightning_inversion.data.texts import read_prompts
from lightning_inversion.errors import InputError
from lightning_inversion.files import is_plain_name, one_line, printable, visible
from lightning_inversion.results import ResultRow, read_rows
from lightning_inversion.sweep.audit import AuditPlan
from lightning_inversion.sweep.grid import read_axis
from lightning_inversion.sweep.run import Sweep
from lightning_inversion.untrusted import check_yaml, read_json, read_yaml

FEW = 15
"""Cases of each reader in the fast tier."""
RAN = Path(__file__).with_name("ran")
CONTROLS = {*map(chr, range(32)), "\x7f", *map(chr, range(0x80, 0xA0)), *"\u202a\u202e\u2066\u2069"}


class Runs:
    """A pickle that leaves a file when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (RAN,)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(st.characters(codec=None), max_size=8)
    | st.sampled_from(["../../x", "\x1b[31m", "\u202e", "$\\bad{x}$", "a\0b", "\ud83d"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)
OBJECT_KEYS = [
    *("prompt", "index", "schema", "cells", "name", "command", "arguments", "values", "channels"),
    *("fit", "options", "transformer", "model", "depth", "positions", "known_prefix", "ids"),
    *(field for field in ("prompts", "storage", "noise", "versions", "recovered_ids", "top_k_ids")),
]
objects = st.dictionaries(st.sampled_from(OBJECT_KEYS), values, max_size=5)
hostile = st.sampled_from([
    b"[" * 100_000, b'{"a":' * 5000, b"9" * 5000, b"\xff\xfe", b"\xef\xbb\xbf", b"", b"\0", b"null",
    b'{"prompt": "a", "prompt": "b"}', b'{"prompt": "\\ud83d"}', b"a: &a [*a]",
    b"a0: &a0 [x,x]\n" + b"".join(
        b"a%d: &a%d [%s]\n" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 12)
    ),
    b"!!python/object/apply:pathlib.Path.touch [%r]" % str(RAN), pickle.dumps(Runs()),
    struct.pack("<Q", 2**62) + b"{}", b"PK\x03\x04" + bytes(30), b"GGUF" + bytes(20),
])  # fmt: skip
texts = objects.map(json.dumps).map(str.encode) | values.map(json.dumps).map(str.encode)
contents = st.one_of(texts, hostile, st.binary(max_size=200), st.lists(texts).map(b"\n".join))


def manifests(draw: Any) -> bytes:
    """A whole safetensors file whose manifest is anything."""
    manifest = draw(objects.map(json.dumps) | values.map(json.dumps))
    return save({"0": torch.zeros(2, 4)}, {"manifest": manifest})


READERS: dict[str, Callable[[Path], Any]] = {
    "prompts.txt": lambda path: read_prompts(path, "--data.file"),
    "prompts.jsonl": lambda path: read_prompts(path, "--data.file"),
    "results.jsonl": read_rows,
    "plan.yaml": AuditPlan.read,
    "sweep.json": lambda path: Sweep.open(path.parent),
    "config.yaml": read_settings,
    "last.ckpt": read_checkpoint,
    "targets.safetensors": Captured.read,
}


def check_reader(name: str, content: bytes, folder: Path) -> None:
    """Read a file of such content: a value or one sentence, and no other file is made."""
    path = folder / name
    path.write_bytes(content)
    before = sorted(folder.parent.iterdir())
    with suppress(InputError):
        READERS[name](path)
    assert sorted(folder.parent.iterdir()) == before
    assert not RAN.exists()


def fuzz(cases: int) -> Any:
    """Settings of a test that draws so many cases, the same ones each time."""
    return settings(
        max_examples=cases,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize("name", READERS)
def test_a_reader_ends_in_a_value_or_one_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()

    @fuzz(FEW)
    @given(content=contents)
    def read(content: bytes) -> None:
        check_reader(name, content, tmp_path / "alone")

    read()


@fuzz(FEW)
@given(data=st.data())
def test_a_manifest_of_anything(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    content = manifests(data.draw)
    check_reader("targets.safetensors", content, tmp_path_factory.mktemp("manifest"))


def check_row(record: dict[str, Any], key: str, value: Any) -> None:
    """A row with another value under a key is a row, or no row with a reason."""
    with suppress(ValueError):
        ResultRow.from_record({**record, key: value})


@fuzz(4 * FEW)
@given(key=st.sampled_from(sorted(ResultRow.__dataclass_fields__)) | st.text(), value=values)
def test_a_row_of_anything(key: str, value: Any) -> None:
    check_row(ResultRow(index=0).to_record(), key, value)


def check_text(text: str) -> None:
    """What is printed holds no character that steers a terminal or turns the text."""
    for shown in (visible(text).replace("\t", ""), one_line(text).replace("\t", "")):
        assert not CONTROLS.intersection(shown.replace("\n", ""))
    assert not CONTROLS.intersection(printable(text).replace("\n", "").replace("\t", ""))
    if is_plain_name(text):
        assert (Path("/root") / text).resolve().parent == Path("/root")


@fuzz(4 * FEW)
@given(text=st.text(st.characters(codec=None)) | st.text(sorted(CONTROLS), max_size=5))
def test_a_name_of_anything(text: str) -> None:
    check_text(text)


def check_text_of_values(text: str) -> None:
    """JSON, YAML and an axis of a sweep that are anything."""
    for read in (read_json, read_yaml, check_yaml):
        with suppress(ValueError):
            read(text)
    with suppress(InputError):
        read_axis(text, frozenset({"transformer"}))


@fuzz(4 * FEW)
@given(text=st.text(max_size=60) | st.text("[]{}&*a:-,'\"!<>| \n#", max_size=60))
def test_json_yaml_and_axes_of_anything(text: str) -> None:
    check_text_of_values(text)
