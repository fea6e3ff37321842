"""The benchmark of a GPU, run on a CPU with small shapes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_inversion.cache import ENVIRONMENT
from tests.benchmarks import gpu


@pytest.mark.integration  # measures seven models
def test_every_case_runs_and_none_is_verified_wrongly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "gpu.json"
    monkeypatch.setenv(ENVIRONMENT, "")  # the benchmark sets another, which is undone here
    monkeypatch.setattr(sys, "argv", ["gpu", "--small", "--device=cpu", f"--out={out}"])
    gpu.main()
    found = json.loads(out.read_text())
    assert found["device"] == "cpu"
    assert len(found["entries"]) == 7
    for name, entry in found["entries"].items():
        assert "left_out" not in entry, (name, entry)
        assert entry["right"] == entry["tokens"] == 60, name
        assert entry["falsely_verified"] == 0, name
        assert not entry["capped"], name


def _entries(ends: float) -> dict[str, dict[str, object]]:
    entries: dict[str, dict[str, object]] = {}
    gpu.all_cases(True, gpu.torch.device("cpu"), ends, entries.__setitem__)
    return entries


def test_what_finds_no_time_is_named() -> None:
    entries = _entries(time.monotonic() - 1)
    assert len(entries) == 7
    assert {entry["left_out"] for entry in entries.values()} == {gpu.LEFT_OUT}


def test_a_model_that_cannot_be_run_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(case: gpu.Case, device: object, cap: float) -> dict[str, object]:
        assert 0 < cap <= gpu.LONGEST
        if case.quantization:
            raise KeyError("no such kernel")
        return {"right": 60}

    monkeypatch.setattr(gpu, "run", failing)
    entries = _entries(time.monotonic() + 1000)
    failed = [entry for entry in entries.values() if "left_out" in entry]
    assert failed == [{"left_out": "KeyError: 'no such kernel'"}] * 2
    assert len(entries) == 7


@pytest.mark.integration  # imports torch in a process of its own
def test_it_ends_when_its_time_is_up(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    code = (
        "import sys, time; from tests.benchmarks import gpu; "
        "gpu.run = lambda *_: time.sleep(1000); gpu.main()"
    )
    options = ["--small", "--device=cpu", f"--out={out}", "--minutes=0.15"]
    done = subprocess.run([sys.executable, "-c", code, *options], check=False, timeout=300)
    assert done.returncode == 1
