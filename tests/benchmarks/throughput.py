"""Throughput of many prompts: packed batches, one by one, a command each, several processes.

    python -m tests.benchmarks.throughput --prompts 1000 --alone 24 --commands 3
    OMP_NUM_THREADS=1 python -m tests.benchmarks.throughput --prompts 200 --processes 2

Prompts of 8 to 64 tokens, SmolLM2 at depth 2. Rates are those of the whole command less its start:
the seconds of the same command with the first prompt alone are taken off; only a command for each
prompt pays for its start. Quote the ratios: machines are noisy.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

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


@dataclass(frozen=True)
class Run:
    """What a fit took.

    Attributes:
        seconds: wall time of its process, with its start.
        early, late: resident MB once a tenth of the rows and once nearly all were written.
    """

    seconds: float
    early: int
    late: int


def fit(texts: list[str], *options: str) -> Run:
    """A fit of these prompts in a process of its own."""
    with tempfile.TemporaryDirectory() as root:
        file = Path(root) / "prompts.jsonl"
        file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        began = time.perf_counter()
        process = subprocess.Popen(
            [
                sys.executable, "-m", "lightning_inversion", "fit", f"--data.file={file}",
                f"--trainer.default_root_dir={root}", "--trainer.accelerator=cpu",
                "--model.transformer.depth=2", "--decoding.show=false", *options,
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        results = Path(root) / "lightning_logs" / "version_0" / "results.jsonl"
        early = late = 0
        while process.poll() is None:
            rows = results.read_bytes().count(b"\n") if results.exists() else 0
            if rows >= len(texts) / 10:
                late = _resident(process.pid) or late
                early = early or late
            time.sleep(0.2)
        assert process.returncode == 0
        return Run(time.perf_counter() - began, early, late)


def _resident(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss) // 2**20
    except psutil.Error:
        return 0  # it has just ended


def rate(texts: list[str], *options: str) -> tuple[float, Run]:
    """Prompts a second, without starting: what all but the first prompt have added."""
    start = fit(texts[:1], *options)
    run = fit(texts, *options)
    return (len(texts) - 1) / (run.seconds - start.seconds), run


def main() -> None:
    """Print prompts a second, their ratios, and the memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--alone", type=int, default=0, help="of them run one by one")
    parser.add_argument("--commands", type=int, default=0, help="of them with a command each")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("options", nargs="*", help="of fit")
    options, more = parser.parse_known_args()
    texts = prompts(options.prompts)
    packed, run = rate(texts, *more)
    print(f"{len(texts)} prompts, packed: {packed:.3f} prompts a second; resident {run.early} MB "
          f"after a tenth of them, {run.late} MB at the end", flush=True)  # fmt: skip
    if options.alone:
        alone, _ = rate(texts[: options.alone], "--data.batch_size=1", *more)
        print(f"{options.alone} one by one: {alone:.3f} a second; packed is "
              f"{packed / alone:.2f} times as fast", flush=True)  # fmt: skip
    if options.commands:
        each = sum(fit([text], *more).seconds for text in texts[: options.commands])
        single = options.commands / each
        whole = len(texts) / run.seconds
        print(f"{options.commands} with a command each: {single:.3f} a second; packed, start "
              f"included, is {whole / single:.1f} times as fast", flush=True)  # fmt: skip
    if options.processes > 1:
        several, _ = rate(texts, f"--trainer.devices={options.processes}", *more)
        print(f"{options.processes} processes: {several:.3f} a second; "
              f"{several / packed:.2f} times one")  # fmt: skip


if __name__ == "__main__":
    main()
