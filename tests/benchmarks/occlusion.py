"""Occlusion beside batched Captum on one model, in one run: time, arithmetic, peak memory.

    python -m tests.benchmarks.occlusion --lengths 64 192 --rounds 3

Time is measured in rounds that alternate, and the ratio is the median over rounds, so that what
else the machine does falls on both. Arithmetic is counted, and the same on every machine. Peak
memory is of a process of its own for each. Captum is given the number of rows it is fastest with
here, and is also measured with `logits_to_keep=1`, which its user would have to think of.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from lightning_inversion.attribution.measures import TokenMeasure
from lightning_inversion.attribution.methods import Task, occlusion
from lightning_inversion.attribution.model import LogitReader, undisturbed
from lightning_inversion.transformer.loading import TransformerSpec
from tests.attribution import captum_reference as captum

TEXT = (
    "Observing input attribution for larger models applied to more complicated inputs, it is clear "
    "that the gradient of a model's output with respect to its input does give useful information. "
)
CAPTUM_ROWS = 32
OURS, CAPTUM, CAPTUM_KEPT = "ours", "Captum", "Captum, last logits only"


def methods(
    model: PreTrainedModel, ids: Tensor, replacement: int
) -> dict[str, Callable[[], Tensor]]:
    """Ids [T] -> the drop of the log-probability of the predicted token, by each."""
    with torch.no_grad():
        target = int(model(input_ids=ids[None], logits_to_keep=1).logits[0, -1].argmax())

    def ours() -> Tensor:
        with undisturbed(model):
            reader = LogitReader(model)
            measure = TokenMeasure(torch.tensor([target]), None, "logprob", "drop")
            at = torch.tensor([len(ids) - 1])
            vector = reader.embed(torch.tensor([replacement]))[0]
            return occlusion(Task(reader, reader.embed(ids), at, measure), vector)[0]

    def theirs(**kept: int) -> Callable[[], Tensor]:
        return lambda: captum.ablation(model, ids, target, replacement, CAPTUM_ROWS, **kept)

    return {OURS: ours, CAPTUM: theirs(), CAPTUM_KEPT: theirs(logits_to_keep=1)}


def load(name: str, length: int) -> tuple[PreTrainedModel, Tensor, int]:
    """A model, a text of `length` tokens, and what tokens are replaced by."""
    model, tokenizer = TransformerSpec(model=name, depth=None).load_causal_lm()
    ids = torch.tensor(tokenizer(TEXT * 20)["input_ids"][:length])
    return model, ids, int(tokenizer.pad_token_id)


def measure_time(name: str, length: int, rounds: int) -> None:
    """Print seconds, ratios and how far the scores are apart."""
    model, ids, replacement = load(name, length)
    runs = methods(model, ids, replacement)
    scores, flops = {}, {}
    for method, run in runs.items():
        with FlopCounterMode(display=False) as counter:
            scores[method] = run()
        flops[method] = counter.get_total_flops()
    wall: dict[str, list[float]] = {method: [] for method in runs}
    cpu: dict[str, list[float]] = {method: [] for method in runs}
    for _ in range(rounds):
        for method, run in runs.items():
            began, began_cpu = time.perf_counter(), time.process_time()
            run()
            wall[method].append(time.perf_counter() - began)
            cpu[method].append(time.process_time() - began_cpu)
    for method in runs:
        ratios = [
            [theirs / ours for theirs, ours in zip(seconds[method], seconds[OURS], strict=True)]
            for seconds in (wall, cpu)
        ]
        apart = float((scores[method] - scores[OURS]).abs().max())
        print(
            f"{length} tokens, {method}: {statistics.median(wall[method]):.2f} s, "
            f"CPU {statistics.median(cpu[method]):.2f} s, {flops[method] / 1e12:.3f} TFLOP; "
            f"over ours: time {statistics.median(ratios[0]):.2f}, "
            f"CPU {statistics.median(ratios[1]):.2f}, "
            f"arithmetic {flops[method] / flops[OURS]:.2f}; apart {apart:.1e}",
            flush=True,
        )


def measure_memory(name: str, length: int) -> None:
    """Print the peak memory of a process that runs one method once."""
    for method in (OURS, CAPTUM, CAPTUM_KEPT):
        command = [sys.executable, "-m", "tests.benchmarks.occlusion", "--model", name]
        answer = subprocess.run(
            [*command, "--lengths", str(length), "--peak", method],
            check=True,
            capture_output=True,
            text=True,
        )
        print(f"{length} tokens, {method}: peak {answer.stdout.strip()}", flush=True)


def memory(field: str) -> int:
    """A field of Linux' account of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(field)]
    return int(line.split()[1]) // 1024


def main() -> None:
    """Read the options and print one line a method and length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=TransformerSpec.model)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 192])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="the default is as many as cores")
    parser.add_argument("--peak", help="run this method alone, and print its peak memory (Linux)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    for length in options.lengths:
        if options.peak:
            run = methods(*load(options.model, length))[options.peak]
            Path("/proc/self/clear_refs").write_text("5")  # the peak from here on, without loading
            before = memory("VmRSS")
            run()
            print(f"{memory('VmHWM')} MiB, {memory('VmHWM') - before} MiB of it its own")
        else:
            measure_time(options.model, length, options.rounds)
            measure_memory(options.model, length)


if __name__ == "__main__":
    main()
