"""What is measured once and kept: found by content and code, never trusted when damaged."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_inversion.cache import ENVIRONMENT, LIMIT_ENVIRONMENT, measured_files
from lightning_inversion.errors import InputError
from lightning_inversion.transformer import cached
from lightning_inversion.transformer.cached import kept


@dataclass(frozen=True)
class Inner:
    numbers: Tensor
    name: str


@dataclass(frozen=True)
class Value:
    matrix: Tensor
    flag: Tensor
    factor: float
    inner: Inner | None


def value(seed: int = 0) -> Value:
    drawn = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))
    inner = Inner(drawn[0, ::2], "a name")
    return Value(drawn.T, torch.tensor(True), float("inf"), inner)


def once(identity: dict[str, object], *, seed: int = 0) -> tuple[Value, int]:
    """The kept value, and how often it was computed."""
    calls: list[int] = []

    def build() -> Value:
        calls.append(seed)
        return value(seed)

    return kept(Value, identity, build), len(calls)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    return tmp_path / "measured"


def test_a_kept_value_is_the_computed_one_in_every_bit_and_stride() -> None:
    first, computed = once({"of": 1})
    again, recomputed = once({"of": 1})
    assert (computed, recomputed) == (1, 0)
    assert torch.equal(again.matrix, first.matrix)
    assert again.matrix.stride() == first.matrix.stride()
    assert (again.factor, again.inner.name, bool(again.flag)) == (float("inf"), "a name", True)
    assert torch.equal(again.inner.numbers, first.inner.numbers)
    assert once({"of": 2}, seed=1)[1] == 1


@pytest.mark.parametrize("content", [b"", b"not a tensor", "cut", "changed"])
def test_a_damaged_file_is_made_again_and_said(
    cache: Path, content: bytes | str, messages: list[str]
) -> None:
    once({})
    (entry,) = measured_files()
    whole = entry.path.read_bytes()
    if content == "cut":
        content = whole[:-4]
    elif content == "changed":
        content = whole[:-1] + bytes([whole[-1] ^ 1])
    assert isinstance(content, bytes)
    entry.path.write_bytes(content)
    assert once({})[1] == 1
    assert sum("is damaged and is made again" in line for line in messages) == 1
    assert once({})[1] == 0


def test_a_file_of_something_else_under_its_name_is_not_trusted(cache: Path) -> None:
    once({"of": 1})
    (one,) = measured_files()
    once({"of": 2})
    (two,) = [entry for entry in measured_files() if entry.path != one.path]
    two.path.write_bytes(one.path.read_bytes())
    assert once({"of": 2})[1] == 1


def test_other_code_measures_again_and_says_so(
    monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    once({})
    once({"of": 2})
    monkeypatch.setattr(cached, "method", lambda: "another")
    cached._tell_of_another_version.cache_clear()
    assert once({})[1] == once({"of": 2})[1] == 1
    told = [one for one in messages if "another version of the package measured" in one]
    assert len(told) == 1


def test_the_method_is_all_code_that_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever module of these rooms changes, a new one, and what rounds the features."""
    package = tmp_path / "package"
    for room in ("recovery", "transformer", "data"):
        (package / room).mkdir(parents=True)
    file = package / "transformer" / "cached.py"
    file.write_text("")
    monkeypatch.setattr(cached, "__file__", str(file))
    found = {cached.method.__wrapped__()}
    for path in ("recovery/new.py", "transformer/new.py", "data/storage.py"):
        for text in ("", "X = 1"):
            (package / path).write_text(text)
            found.add(cached.method.__wrapped__())
    assert len(found) == 7
    (package / "data" / "prompts.py").write_text("")
    assert cached.method.__wrapped__() in found


def test_the_least_recently_used_go_when_the_limit_is_reached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    once({"of": 1})
    size = measured_files()[0].size
    monkeypatch.setenv(LIMIT_ENVIRONMENT, str(2.5 * size / 1e9))
    once({"of": 2})
    for number, entry in enumerate(measured_files()):
        os.utime(entry.path, (number, number))
    once({"of": 1})  # used again, and now the newer one
    once({"of": 3})
    assert once({"of": 1})[1] == 0
    assert once({"of": 3})[1] == 0
    assert once({"of": 2})[1] == 1


def test_a_value_larger_than_the_limit_stays_for_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT_ENVIRONMENT, "0")
    once({"of": 1})
    once({"of": 2})
    assert once({"of": 2})[1] == 0
    assert len(measured_files()) == 1


@pytest.mark.parametrize("named", ["much", "-1", "nan", "inf"])
def test_a_limit_that_is_no_size(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT_ENVIRONMENT, named)
    with pytest.raises(InputError, match="LIGHTNING_INVERSION_CACHE_GB must be a number"):
        once({})


def test_a_cache_that_cannot_be_written_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv(ENVIRONMENT, str(file))
    assert once({})[1] == 1
    assert "nothing is kept" in messages[0]


PROCESS = """
import sys, time
from pathlib import Path
from dataclasses import dataclass
import torch
from lightning_inversion.transformer.cached import kept

@dataclass(frozen=True)
class Value:
    number: torch.Tensor

def build():
    with Path(sys.argv[1]).open("a") as file:
        file.write("measured\\n")
    time.sleep(0.5)
    return Value(torch.ones(3))

print(kept(Value, {}, build).number.sum().item())
"""


@pytest.mark.integration  # starts processes
def test_processes_measure_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    started = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(log)], stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    printed = [process.communicate()[0] for process in started]
    assert printed == [b"3.0\n"] * 3
    assert log.read_text() == "measured\n"
