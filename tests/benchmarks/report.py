"""A report over many rows: seconds and peak memory, as a process of its own.

    python -m tests.benchmarks.report                 10,000 rows in 200 runs
    python -m tests.benchmarks.report --runs 20 --prompts 10

The rows are made up, 24 tokens each with all the lists that a run leaves; each run has a config and
event files.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lightning_inversion.report.load import CURVES
from tests.report.rows import row, write_run

OBJECTIVES = ("L1", "L2", "CosineDistance", "Standardized")


def make(folder: Path, runs: int, prompts: int) -> int:
    """Write the runs; returns the bytes of their rows."""
    size = 0
    for run in range(runs):
        depth, objective = 1 + run // 4 % 5, OBJECTIVES[run % 4]
        rows = [
            row(i, depth=depth, seed=run // 20, right=1 - depth / 8, length=24, objective=objective)
            for i in range(prompts)
        ]
        for made in rows:
            made["top_k_ids"] = [[*ids, 7, 8, 9] for ids in made["top_k_ids"]]
        here = write_run(folder / f"run-{run}", rows)
        (here / "config.yaml").write_text(f"model: {{optimizer: {{lr: 0.1}}, seed: {run}}}\n")
        size += (here / "results.jsonl").stat().st_size
        writer = EventFileWriter(str(here))
        for step in range(0, 500, 10):
            for tag in CURVES:
                value = Summary.Value(tag=tag, simple_value=100 / (1 + step) + depth)
                writer.add_event(Event(step=step, summary=Summary(value=[value])))
        writer.close()
    return size


def main() -> None:
    """Make the rows, write the report, say what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = make(Path(folder) / "runs", options.runs, options.prompts)
        command = [sys.executable, "-m", "lightning_inversion", "report", f"{folder}/runs"]
        began = time.perf_counter()
        subprocess.run([*command, "--out", f"{folder}/out"], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        page = (Path(folder) / "out" / "report.html").stat().st_size
    print(
        f"{options.runs * options.prompts} rows ({size / 1e6:.0f} MB) of {options.runs} runs: "
        f"{seconds:.1f} s, {memory:.0f} MB, a page of {page / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()
