"""What a second ``predict`` of one prompt takes beside its imports and loading the model.

    python -m tests.benchmarks.second_run --depths 1 8 30 --repeat 3

A row for each depth: CPU seconds and wall seconds of the whole command, of a process that imports
torch, transformers and lightning and loads the model with its tokenizer, and their ratio. The two
run in turn; the least of each counts, as a machine that does something else only adds to it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.sources import resolve_source

PROMPT = "The committee will meet on Tuesday, before anybody else knows why."
LOADING = """
import sys, torch, transformers, lightning
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
transformers.AutoTokenizer.from_pretrained(sys.argv[1])
"""


@dataclass(frozen=True)
class Cost:
    """CPU seconds, with those of the system, and wall seconds."""

    cpu: float
    wall: float

    def least(self, other: "Cost") -> "Cost":
        return Cost(min(self.cpu, other.cpu), min(self.wall, other.wall))


def cost(command: list[str]) -> Cost:
    """What a process takes.

    Raises:
        AssertionError: it failed.
    """
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, command
    return Cost(used.ru_utime + used.ru_stime, time.perf_counter() - began)


def predict(depth: int, model: str | None = None) -> Cost:
    """What ``predict`` of one prompt takes."""
    with tempfile.TemporaryDirectory() as root:
        return cost([
            "-m", "lightning_inversion", "predict", f'--data.prompts=["{PROMPT}"]',
            f"--model.transformer.depth={depth}", f"--trainer.default_root_dir={root}",
            "--trainer.accelerator=cpu",
            *([f"--model.transformer.model={model}"] if model else []),
        ])  # fmt: skip


def main() -> None:
    """Print a row for each depth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 8, 30])
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    folder = resolve_source(TransformerSpec.model).location
    print("| depth | predict: CPU s | wall s | imports and loading: CPU s | wall s "
          "| ratio of CPU | of wall |\n|---|---|---|---|---|---|---|", flush=True)  # fmt: skip
    for depth in options.depths:
        predict(depth)  # the first run measures
        pairs = [(predict(depth), cost(["-c", LOADING, folder])) for _ in range(options.repeat)]
        whole, loading = pairs[0]
        for one, other in pairs[1:]:
            whole, loading = whole.least(one), loading.least(other)
        print(f"| {depth} | {whole.cpu:.2f} | {whole.wall:.2f} | {loading.cpu:.2f} "
              f"| {loading.wall:.2f} | {whole.cpu / loading.cpu:.2f} "
              f"| {whole.wall / loading.wall:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
