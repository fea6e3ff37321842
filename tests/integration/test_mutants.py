"""Ten deliberate faults, each put into a copy of the package: the tests beside it must fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
RUN_EACH = """
import json, os, sys

import lightning.pytorch.cli, pytest, torch, transformers.modeling_utils  # once: they take longest

for folder, tests in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        os.chdir(folder)
        sys.path.insert(0, folder)
        options = "-q -x -n 0 -m".split() + ["not integration", "-p", "no:cacheprovider"]
        os._exit(pytest.main([*options, *tests]))
    print("exit code", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Runs the tests of each folder in a process of its own."""


@dataclass(frozen=True)
class Fault:
    """A fault, and where it is looked for.

    Attributes:
        name: what is wrong.
        file: of the package.
        right: what stands there, once.
        wrong: what is put in its place.
        tests: that have to see it.
    """

    name: str
    file: str
    right: str
    wrong: str
    tests: str

    def put_into(self, package: Path) -> None:
        """Change the file of a copy of the package."""
        path = package / self.file
        text = path.read_text(encoding="utf-8")
        assert text.count(self.right) == 1, (
            f"{self.file} has {self.right!r} {text.count(self.right)}x"
        )
        path.write_text(text.replace(self.right, self.wrong), encoding="utf-8")


FAULTS = (
    Fault(
        "a padded position counts in the distance",
        "objectives.py",
        "difference = (generated - target) * mask[..., None]",
        "difference = generated - target",
        "tests/test_objectives.py",
    ),
    Fault(
        "the cosine distance averages positions, where it should sum",
        "objectives.py",
        "return (distance * mask).sum(dim=1) if self.each_position",
        "return (distance * mask).mean(dim=1) if self.each_position",
        "tests/test_objectives.py",
    ),
    Fault(
        "all tokens at position 1, where position 0 is meant",
        "transformer/truncated.py",
        "positions = torch.zeros(embeds.shape[:2]",
        "positions = torch.ones(embeds.shape[:2]",
        "tests/transformer/test_surgery.py",
    ),
    Fault(
        "the nearest embedding forgets half of its norm",
        "transformer/embedding.py",
        "self.norms.square() / 2",
        "self.norms.square() / 4",
        "tests/test_decoding.py",
    ),
    Fault(
        "the worst tokens are decoded for the best",
        "decoding.py",
        "best_tokens(all_scores, k)",
        "best_tokens(-all_scores, k)",
        "tests/test_decoding.py",
    ),
    Fault(
        "top-k accuracy counts the padding",
        "metrics.py",
        "return ((ranked == ids[..., None]).any(-1) & mask).sum(1)",
        "return (ranked == ids[..., None]).any(-1).sum(1)",
        "tests/test_metrics.py",
    ),
    Fault(
        "the learning rate ends where it began",
        "inversion.py",
        "return start + (end - start) * iteration / max(1, iterations - 1)",
        "return start",
        "tests/callbacks/test_learning_rate.py",
    ),
    Fault(
        "the final norm is dropped",
        "transformer/selection.py",
        "parts[-1] = output.last_hidden_state",
        "pass",
        "tests/transformer/test_parity.py",
    ),
    Fault(
        "a fixed position moves",
        "state.py",
        "torch.where(held[..., None], before, self.values)",
        "torch.where(held[..., None], self.values, before)",
        "tests/test_state.py tests/test_module.py",
    ),
    Fault(
        "integrated gradients at nodes of the wrong interval",
        "attribution/methods.py",
        "((nodes + 1) / 2).tolist()",
        "nodes.tolist()",
        "tests/attribution/test_methods.py",
    ),
)


def test_each_fault_is_caught(tmp_path: Path) -> None:
    runs: list[tuple[str, list[str]]] = []
    for number, fault in enumerate(FAULTS):
        folder = tmp_path / str(number)
        for name in ("lightning_inversion", "tests", "configs"):
            ignored = shutil.ignore_patterns("__pycache__", "*.jsonl", "images")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", folder)
        fault.put_into(folder / "lightning_inversion")
        runs.append((str(folder), fault.tests.split()))
    path = [word for word in os.environ.get("PYTHONPATH", "").split(os.pathsep) if word]
    done = subprocess.run(
        [sys.executable, "-c", RUN_EACH, json.dumps(runs)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(w for w in path if Path(w) != ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    codes = [line.split()[-1] for line in done.stdout.splitlines() if line.startswith("exit code")]
    # 1: tests failed. Anything else is no verdict: no tests, or none that could be collected.
    found = dict(zip((fault.name for fault in FAULTS), codes, strict=True))
    assert found == dict.fromkeys(found, "1"), done.stdout[-4000:] + done.stderr[-2000:]
