"""The readers of ``tests/test_fuzz.py`` on thousands of cases, and whole commands on a few."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_inversion.results import ResultRow
from tests import test_fuzz as few
from tests.hostile_files import KINDS

pytestmark = pytest.mark.integration
MANY = 500


@pytest.mark.parametrize("name", few.READERS)
def test_a_reader_ends_in_a_value_or_one_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()

    @few.fuzz(MANY)
    @given(content=few.contents)
    def read(content: bytes) -> None:
        few.check_reader(name, content, tmp_path / "alone")

    read()


def test_a_manifest_of_anything(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()

    @few.fuzz(MANY)
    @given(data=st.data())
    def read(data: Any) -> None:
        content = few.manifests(data.draw)
        few.check_reader("targets.safetensors", content, tmp_path / "alone")

    read()


@few.fuzz(2 * MANY)
@given(key=st.sampled_from(sorted(ResultRow.__dataclass_fields__)) | st.text(), value=few.values)
def test_a_row_of_anything(key: str, value: Any) -> None:
    few.check_row(ResultRow(index=0).to_record(), key, value)


@few.fuzz(2 * MANY)
@given(text=st.text(st.characters(codec=None)) | st.text(sorted(few.CONTROLS), max_size=5))
def test_a_name_of_anything(text: str) -> None:
    few.check_text(text)


@few.fuzz(2 * MANY)
@given(text=st.text(max_size=60) | st.text("[]{}&*a:-,'\"!<>| \n#", max_size=60))
def test_json_yaml_and_axes_of_anything(text: str) -> None:
    few.check_text_of_values(text)


def test_whole_commands_on_damaged_input() -> None:
    """A few cases of each kind of `tests/benchmarks/fuzz.py`, which runs thousands."""
    command = [sys.executable, "-m", "tests.benchmarks.fuzz", "--share", "0.008"]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    everything = run.stdout.splitlines()[-1].strip("| ").split(" | ")
    name, cases, right, refused, *bad = everything
    assert name == "all"
    assert not any(map(int, bad)), run.stdout
    assert int(right) + int(refused) == int(cases) > 2 * len(KINDS)
    assert int(right) > 5
