"""Nothing mixes devices: recovery on a device that is not the CPU, on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_inversion.cache import ENVIRONMENT

pytestmark = pytest.mark.integration  # a process of its own: a device is registered for good
LEAST = {"reading": 1, "prior": 1}
"""Tokens right at least, where not all need be: one reads rows alone, one has a small budget."""


def test_tensors_of_two_devices_are_never_mixed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.elsewhere"],
        env={**os.environ, ENVIRONMENT: str(tmp_path)},
        capture_output=True, text=True, check=True, timeout=600,
    )  # fmt: skip
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert len(outcomes) == 13
    for outcome in outcomes:
        assert outcome["failed"] is None, outcome["failed"]
        assert outcome["right"] >= LEAST.get(outcome["name"], 8), outcome


def test_what_mixes_devices_is_refused() -> None:
    code = """
import torch
from tests.gpu.elsewhere import register
register()
there, here = torch.ones(3, device="elsewhere"), torch.ones(3)
assert float((there + there.new_tensor(2.0)).sum()) == 9.0
assert there[torch.tensor([0, 2])].cpu().tolist() == [1.0, 1.0]
for wrong in (
    lambda: there + here,
    lambda: torch.cat([there, here]),
    lambda: here[torch.tensor([0], device="elsewhere")],
    lambda: torch.rand(3, device="elsewhere", generator=torch.Generator()),
    there.numpy,
):
    try:
        wrong()
    except (RuntimeError, TypeError):
        continue
    raise SystemExit("not refused")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
