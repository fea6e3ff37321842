"""``lightning-inversion cache``, and what a run makes of what was kept by another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_inversion.__main__ import main as run
from lightning_inversion.cache import ENVIRONMENT, measured_files
from lightning_inversion.transformer.linear_probe import LinearProbe
from lightning_inversion.verification.calibration import Calibration

pytestmark = pytest.mark.usefixtures("shared_parsers")


def rows(folder: Path, root: Path, *options: str) -> list[dict[str, Any]]:
    assert run([
        "predict", f"--trainer.default_root_dir={root}", "--trainer.accelerator=cpu",
        f"--model.transformer.model={folder}", "--model.transformer.depth=2",
        '--data.prompts=["The sky is blue.", "A boat"]', *options,
    ]) == 0  # fmt: skip
    (file,) = root.glob("lightning_logs/version_*/results.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_rows_with_what_was_kept_are_the_rows_without(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = rows(tiny_folder, tmp_path / "first")
    for kind, name in ((LinearProbe, "fit"), (Calibration, "measure")):
        monkeypatch.setattr(kind, name, lambda *_, **__: pytest.fail("measured again"))
    again = rows(tiny_folder, tmp_path / "again")
    differ = {
        name
        for one, two in zip(first, again, strict=True)
        for name in one.keys() | two.keys()
        if one.get(name) != two.get(name)
    }
    assert not {name for name in differ if "seconds" not in name and name != "created"}


def test_it_lists_and_clears(
    tiny_folder: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows(tiny_folder, tmp_path)
    (cache / "a-model-v1").mkdir()
    (cache / "a-model-v1" / "weights").write_bytes(b"12")
    (first, *_) = (one for one in measured_files() if one.path.name.startswith("Moments"))
    first.path.write_bytes(b"damaged")
    (cache / "measured" / "\x1b[31m-x.safetensors").symlink_to(tmp_path)
    (cache / "measured" / "Moments-x.safetensors.part-7").write_bytes(b"of a run that was killed")
    capsys.readouterr()
    assert run(["cache"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    for part in ("calibration", "linear probe", "behaviour", "own text", "depth 2"):
        assert part in shown
    assert "damaged" in shown
    assert "a-model-v1" in shown
    assert shown.count("depth 2") == 1  # one row, whatever was measured
    assert run(["cache", "clear"]) == 0
    assert "removed" in capsys.readouterr().out
    assert not list((cache / "measured").iterdir())
    assert list(tmp_path.iterdir())  # what a link names is left alone
    assert (cache / "a-model-v1").exists()
    assert run(["cache", "clear", "--models", "true"]) == 0
    assert not (cache / "a-model-v1").exists()
    capsys.readouterr()
    assert run(["cache"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "measured: 0.0 of 4000 MB", "models and other folders: 0.0 MB", str(cache),
    ]  # fmt: skip


def test_a_word_that_is_no_action(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["cache", "empty"]) == 2
    assert "empty" in capsys.readouterr().err


def test_it_needs_no_torch() -> None:
    code = (
        "import sys\nfrom lightning_inversion.__main__ import main\nassert main(['cache']) == 0\n"
        "assert not {'torch', 'lightning', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
