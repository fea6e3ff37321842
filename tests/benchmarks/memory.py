"""Peak memory of a fit at depth 1, against what it cannot do without.

    python -m tests.benchmarks.memory

Both numbers are the peak resident set of a process of its own: one that only imports the libraries
and holds the embedding and one block, and one that runs the quickstart.
"""

import subprocess
import sys

FLOOR = """
import lightning_inversion.cli.lightning, resource
from lightning_inversion.transformer.loading import TransformerSpec
spec = TransformerSpec(depth=1)
spec.load_tokenizer()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
config = spec.config()
block = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
print(before // 1024 + 4 * (config.vocab_size * config.hidden_size + block) // 2**20)
"""
FIT = """
import resource, sys, tempfile
from lightning_inversion.__main__ import main as run
with tempfile.TemporaryDirectory() as folder:
    code = run(["fit", "--config=configs/quickstart.yaml", f"--trainer.default_root_dir={folder}"])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
sys.exit(code)
"""


def megabytes(program: str) -> int:
    """The last number a program prints."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def main() -> None:
    """Print both and their ratio."""
    floor, fit = megabytes(FLOOR), megabytes(FIT)
    print(f"libraries, embedding and one block {floor} MB; quickstart {fit} MB; "
          f"ratio {fit / floor:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
