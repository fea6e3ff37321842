"""The memory of a fit: predicted against measured.

python -m tests.benchmarks.scale
"""

import argparse
import subprocess
import sys

import torch

from lightning_inversion.data.memory import LIBRARIES, ModelSize, memory
from lightning_inversion.transformer.loading import TransformerSpec

PEAK = """
import resource, sys, tempfile, torch
from lightning_inversion.__main__ import main as run
with tempfile.TemporaryDirectory() as root:
    run(["fit", f"--trainer.default_root_dir={root}", "--trainer.accelerator=cpu", *sys.argv[1:]])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def main() -> None:
    """Print one line a prediction."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    compare_memory()


def compare_memory() -> None:
    """The peak of a fit in a process of its own."""
    config = TransformerSpec().config()
    for depth, tokens in ((1, 64), (1, 512), (1, 2048), (4, 2048), (8, 2048), (8, 8192)):
        text = ", ".join('"' + " the" * 63 + '."' for _ in range(tokens // 64))
        arguments = [
            f"--data.prompts=[{text}]", f"--data.tokens_per_batch={tokens}",
            f"--model.transformer.depth={depth}", "--model.iterations=2", "--decoding.show=false",
            "--model.schedule=AllPositions",  # candidates would leave nothing to iterate
        ]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=True
        )
        measured = int(done.stdout.split()[-1]) * 2**20
        predicted = memory(ModelSize.of(config, depth), tokens, tokens // 64).total
        print(f"depth {depth}, {tokens} tokens: peak {measured / 2**20:.0f} MB, predicted "
              f"{predicted / 2**20:.0f} MB, ratio {predicted / measured:.2f} (of it libraries "
              f"{LIBRARIES / 2**20:.0f} MB)", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
