"""Files from elsewhere: refused in one error, soon, and never executed or waited for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_inversion.untrusted import (
    HostileError,
    RepeatedKeyError,
    check_yaml,
    read_file,
    read_json,
    read_yaml,
)

BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no regular file"):
        read_file(tmp_path / "pipe")


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '[{"b": {"a": 1, "a": 1}}]'])
def test_a_key_that_stands_twice(text: str) -> None:
    for read in (read_json, read_yaml):
        with pytest.raises(RepeatedKeyError, match="the key 'a' twice"):
            read(text)


@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]", "[" * 100_000, "{a: " * 5000])
def test_what_would_fill_the_memory_or_never_end(text: str) -> None:
    with pytest.raises(HostileError):
        check_yaml(text)


def test_a_list_longer_than_a_parser_can_take() -> None:
    check_yaml("[[1, 2], {a: 1}, 3]", 3)
    for text in ("[[1, 2], 3, 4, 5]", "[[1, 2, 3, 4], 3]", "{a: 1, b: 2}"):
        with pytest.raises(HostileError, match="more than 3 values"):
            check_yaml(text, 3)


def test_depth_of_json() -> None:
    with pytest.raises(HostileError):
        read_json("[" * 100_000)


def test_aliases_that_end_are_read() -> None:
    assert read_yaml("a: &a {x: 1}\nb: [*a, *a]") == {"a": {"x": 1}, "b": [{"x": 1}] * 2}


def test_code_is_not_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="could not determine a constructor"):
        read_yaml(f"!!python/object/apply:os.mkdir ['{tmp_path / 'made'}']")
    assert not (tmp_path / "made").exists()
