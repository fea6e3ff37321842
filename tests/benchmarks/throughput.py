"""Throughput of many prompts: packed batches against one by one, two processes against one.

    python -m tests.benchmarks.throughput --prompts 96 --alone 24
    python -m tests.benchmarks.throughput --prompts 64 --processes 2

Prompts of 8 to 64 tokens, SmolLM2 at depth 2, one thread a process. Seconds are those of the whole
command less those of the same command with the first prompt alone. Quote the ratios: machines
are noisy.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = (
    "the", "committee", "will", "meet", "on", "Tuesday", "and", "a", "light", "blue", "boat",
    "down", "river", "before", "dawn", "nobody", "in", "this", "room", "knows", "why", "paid",
    "hundred", "euros", "for", "it", "of", "our", "neighbour", "called", "after", "six", "said",
    "nothing", "but", "rain", "had", "stopped", "while", "children", "were", "asleep", "under",
)  # fmt: skip


def prompts(count: int, seed: int = 0) -> list[str]:
    """Texts of 8 to 64 common words, each a token of SmolLM2."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(8, 64))) for _ in range(count)]


def seconds(texts: list[str], *options: str) -> float:
    """Wall time of a fit of these prompts in a process of its own."""
    with tempfile.TemporaryDirectory() as root:
        file = Path(root) / "prompts.jsonl"
        file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        began = time.perf_counter()
        subprocess.run(
            [
                sys.executable, "-m", "lightning_inversion", "fit", f"--data.file={file}",
                f"--trainer.default_root_dir={root}", "--trainer.accelerator=cpu",
                "--model.transformer.depth=2", "--decoding.show=false", *options,
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True,
        )  # fmt: skip
        return time.perf_counter() - began


def rate(texts: list[str], *options: str) -> float:
    """Prompts a second, without starting: what all but the first prompt have added."""
    start = seconds(texts[:1], *options)
    return (len(texts) - 1) / (seconds(texts, *options) - start)


def main() -> None:
    """Print prompts a second, their ratio, and the peak memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--alone", type=int, default=0, help="of them run one by one")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("options", nargs="*", help="of fit")
    options, more = parser.parse_known_args()
    texts = prompts(options.prompts)
    packed = rate(texts, *more)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    print(f"{len(texts)} prompts, packed: {packed:.3f} prompts a second, peak {peak} MB")
    if options.alone:
        alone = rate(texts[: options.alone], "--data.batch_size=1", *more)
        print(f"{options.alone} one by one: {alone:.3f} a second; ratio {packed / alone:.2f}")
    if options.processes > 1:
        several = rate(texts, f"--trainer.devices={options.processes}", *more)
        print(f"{options.processes} processes: {several:.3f} a second; "
              f"ratio {several / packed:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
