"""``python -m tests.benchmarks.mutations``: ten deliberate faults, and whether the tests see them.

Each fault is put into a copy of the package, one at a time, and the tests named beside it run
there. Prints a line for each; the exit code is 1 if one was not caught.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


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
        "decoding.py",
        "embedding.norms.square() / 2",
        "embedding.norms.square() / 4",
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
        "callbacks/learning_rate.py",
        "return self.start + (self.end - self.start) * share",
        "return self.start",
        "tests/callbacks/test_learning_rate.py",
    ),
    Fault(
        "the final norm is dropped",
        "transformer/selection.py",
        "parts[-1] = normed",
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


def caught(fault: Fault) -> bool:
    """Whether the fault's tests fail where it is, and only there."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("lightning_inversion", "tests", "configs", "docs"):
            ignored = shutil.ignore_patterns("__pycache__", "results", "images")
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", copy)
        fault.put_into(copy / "lightning_inversion")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not integration", "-p"]
        done = subprocess.run(
            [*command, "no:cacheprovider", *fault.tests.split()],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode not in (0, 1):  # no tests, or none that could be collected
        raise RuntimeError(f"{fault.name}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 1


def main() -> int:
    """Put in each fault; returns the exit code."""
    missed = 0
    for fault in FAULTS:
        seen = caught(fault)
        missed += not seen
        print(f"{'caught' if seen else 'NOT CAUGHT'}: {fault.name} ({fault.file})", flush=True)
    print(f"{len(FAULTS) - missed} of {len(FAULTS)} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
