"""The tables of the two pages are what their files of rows say."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_inversion.errors import InputError
from lightning_inversion.replication.claims import SourceExperiment, read_experiments
from lightning_inversion.replication.tables import (
    curve,
    fill,
    pages,
    policy_tables,
    verdict,
    width_of,
)

CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_committed_pages_are_rebuilt_from_the_files() -> None:
    rebuilt = pages(CONFIGS)
    assert len(rebuilt) == 2
    for path, page in rebuilt.items():
        assert path.read_text(encoding="utf-8") == page, f"{path}: run replication.tables"


def test_the_page_names_experiments_that_exist() -> None:
    names = [experiment.name for experiment in read_experiments(CONFIGS / "original")]
    page = (CONFIGS / "original" / "RESULTS.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\(`([a-z0-9-]+(?:\.\.\.)?)`|`([a-z0-9-]+-\.\.\.)`", page))
    assert len(named) > 10
    for word in map("".join, named):
        assert any(name.startswith(word.removesuffix("...")) for name in names), word


def test_pages_name_files_and_modules_that_exist() -> None:
    pages = [*CONFIGS.rglob("*.md")]
    assert len(pages) == 6
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert (page.parent / link).exists(), f"{page}: {link}"
        for path in re.findall(r"\b(?:configs|tests)/[\w/]+\.\w+", text):
            assert path.endswith("NAME.yaml") or (CONFIGS.parent / path).exists(), path
        for module in re.findall(r"python -m ([\w.]*\w)", text):
            assert importlib.util.find_spec(module), f"{page}: {module}"


def test_the_command_needs_neither_torch_nor_lightning() -> None:
    code = (
        "import sys, lightning_inversion.replication.tables;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'lightning', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_page_and_its_tables_have_the_same_names() -> None:
    page = "A\n<!-- rows: one -->\nold\n<!-- end -->\nB\n"
    filled = fill(page, {"one": "| a |"})
    assert filled == "A\n<!-- rows: one -->\n\n| a |\n\n<!-- end -->\nB\n"
    assert fill(filled, {"one": "| a |"}) == filled
    with pytest.raises(InputError, match="two"):
        fill(page, {"one": "", "two": ""})
    with pytest.raises(InputError, match="one"):
        fill(page, {})


def test_verdicts() -> None:
    def of(accuracy: float | None, **more: Any) -> str:
        rows = [] if accuracy is None else [{"token_accuracy": accuracy}]
        return verdict(SourceExperiment("a", "b", "c", "d", **more), rows)

    assert of(0.95, outcome="recovered") == "**agrees**: recovered / recovered"
    assert of(0.6, outcome="recovered") == "**differs**: recovered / partly"
    assert of(0.2) == "not recovered"
    assert of(None) == "not run yet"
    needs = of(0.2, source_model="big", needs_source_model=True)
    assert needs == "not run: needs big; the stand-in: not recovered"


def test_the_critical_width_of_a_curve() -> None:
    values = {"0:1": 0.0, "0:2": 1.0, "0:3": 0.8, "0:4": 1.0, "2:4": 0.0}
    rows = [{"features": name, "token_accuracy": value} for name, value in values.items()]
    points = curve([*rows, {"features": "0:1", "token_accuracy": 0.5}])
    assert points == {**values, "0:1": 0.25}
    assert width_of(points) == 4  # 3 does not recover
    assert width_of({"0:1": 0.2}) is None


def row(**changed: object) -> dict[str, Any]:
    return {
        "index": 0, "run": "a", "policy": "recommended", "model": "m", "depth": 1, "prompts": 2,
        "length": 5, "cap": None, "capped": False, "calibration_seconds": 1.0,
        "forward_seconds": 0.5, "seconds": 5.0, "tokens": 10, "done": 10,
        "right": 10, "verified": 10, "falsely_verified": 0, "exact": 2, "candidates_median": 4,
        "candidates_p95": 9, "candidates_max": 11, "forwards": 30, **changed,
    }  # fmt: skip


def test_ratios_are_of_one_run_and_a_stopped_policy_is_a_bound() -> None:
    rows = [
        row(),
        row(policy="prior_alone", seconds=20.0),
        row(policy="sipit", seconds=60.0, capped=True, cap=60.0, verified=3, done=3),
        row(policy="none", seconds=60.0, capped=True, cap=60.0, verified=0, done=0),
        row(policy="alone", run="b"),
        row(run="c", seconds=50.0),
    ]
    cells = {
        (parts := [cell.strip() for cell in line.strip("|").split("|")])[0]: parts
        for line in policy_tables(rows).splitlines()
        if line.startswith("|")
    }
    assert cells["prior_alone"][7:11] == ["20.0", "40", "2", "4.0"]
    assert cells["sipit"][9:12] == ["20", "40.0", "stopped after 60 s"]
    assert cells["none"][9:11] == ["-", "> 120.0"]
    assert cells["alone"][10] == "-"
    assert cells["recommended"][7] == "50.0"
