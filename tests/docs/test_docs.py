"""The examples in the documentation run, and say what comes of them."""

import doctest
import importlib
import pkgutil
import runpy
import sys
from pathlib import Path

import pytest

import lightning_inversion

DOCS = Path(__file__).parents[2] / "docs"
MODULES = [
    module.name
    for module in pkgutil.walk_packages(lightning_inversion.__path__, "lightning_inversion.")
    if not module.name.endswith("__main__")
]
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def test_the_page_of_the_python_interface(tiny_folder: Path) -> None:
    failed, tried = doctest.testfile(
        str(DOCS / "python.md"), False, globs={"folder": str(tiny_folder)}, optionflags=FLAGS
    )
    assert tried > 30
    assert failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name), optionflags=FLAGS).failed == 0


def test_public_parts_have_examples() -> None:
    finder = doctest.DocTestFinder()
    for name in ("objectives", "metrics", "decoding", "report.tables", "sweep.grid"):
        module = importlib.import_module(f"lightning_inversion.{name}")
        assert any(test.examples for test in finder.find(module)), name


@pytest.mark.integration  # five whole fits
def test_the_tour(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    arguments = [f"--model={tiny_folder}", f"--out={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["tour.py", *arguments])
    runpy.run_path(str(DOCS / "tour.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "5. All of it on one page" in said
    assert "<html" in (tmp_path / "attribution.html").read_text()
    page = (tmp_path / "report" / "report.html").read_text()
    assert "token_by_token.every" in page
    assert len(list((tmp_path / "lightning_logs").rglob("results.jsonl"))) == 5
