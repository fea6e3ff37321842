"""The benchmark of a GPU, run on a CPU with small shapes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.benchmarks import gpu


@pytest.mark.integration  # measures seven models
def test_every_case_runs_and_none_is_verified_wrongly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "--small", "--device=cpu", f"--out={out}"])
    gpu.main()
    found = json.loads(out.read_text())
    assert found["device"] == "cpu"
    assert len(found["entries"]) == 7
    for name, entry in found["entries"].items():
        assert "left_out" not in entry, (name, entry)
        assert entry["right"] == entry["tokens"] == 60, name
        assert entry["falsely_verified"] == 0, name


def test_what_finds_no_time_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = gpu.all_cases(True, gpu.torch.device("cpu"), minutes=-1)
    assert {entry["left_out"] for entry in entries.values()} == {gpu.LEFT_OUT}
