"""What a large vocabulary costs: two models of equal blocks and width, drawn by seed.

    python -m tests.benchmarks.vocabulary --depths 1 5 8

Both have 8 blocks of SmolLM2's shape and its tokenizer, and a vocabulary of 49,152 or of 262,144. A
row for each depth: ``predict`` of one prompt with an empty cache, then again, with what was
measured kept; CPU seconds of the whole command, seconds of recovering the prompt alone, and peak
memory. The two models run in turn; of several second runs the least counts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lightning_inversion.cache import ENVIRONMENT
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.sources import resolve_source
from tests.benchmarks.second_run import PROMPT

SIZES = (49152, 262144)
BLOCKS = 8


@dataclass(frozen=True)
class Cost:
    """What one ``predict`` took.

    Attributes:
        cpu: CPU seconds of the command.
        recovering: seconds of recovering the prompt.
        memory: the most resident MiB.
        verified: whether every token is.
    """

    cpu: float
    recovering: float
    memory: float
    verified: bool


def save(vocabulary: int, folder: Path) -> None:
    """A model whose weights are drawn by seed, with SmolLM2's tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=576, intermediate_size=1536, num_hidden_layers=BLOCKS,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    source = resolve_source(TransformerSpec.model).location
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def predict(model: Path, depth: int, cache: Path) -> Cost:
    """``predict`` of one prompt in a process of its own.

    Raises:
        AssertionError: it failed.
    """
    with tempfile.TemporaryDirectory() as root:
        command = [
            sys.executable, "-m", "lightning_inversion", "predict",
            f'--data.prompts=["{PROMPT}"]', f"--model.transformer.model={model}",
            f"--model.transformer.depth={depth}", f"--trainer.default_root_dir={root}",
            "--trainer.accelerator=cpu",
        ]  # fmt: skip
        process = subprocess.Popen(
            command, env={**os.environ, ENVIRONMENT: str(cache)},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        _, status, used = os.wait4(process.pid, 0)
        assert status == 0, command
        (rows,) = Path(root).rglob("results.jsonl")
        row = json.loads(rows.read_text("utf-8"))
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return Cost(
        used.ru_utime + used.ru_stime, row["seconds"], used.ru_maxrss / unit, row["verified"]
    )


def main() -> None:
    """Print a row for each depth and vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 5, 8])
    parser.add_argument("--repeat", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        models = {size: Path(root) / f"of-{size}" for size in SIZES}
        for size, folder in models.items():
            save(size, folder)
        print("| depth | vocabulary | first run: CPU s | MiB | second: CPU s | MiB "
              "| of it the prompt: s | verified |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
        for depth in options.depths:
            costs: dict[int, list[Cost]] = {size: [] for size in SIZES}
            for _ in range(1 + options.repeat):
                for size, folder in models.items():
                    costs[size].append(predict(folder, depth, Path(root) / f"cache-{size}"))
            small, large = (_least(found[1:]) for found in costs.values())
            for (size, (first, *_)), best in zip(costs.items(), (small, large), strict=True):
                print(f"| {depth} | {size:,} | {first.cpu:.1f} | {first.memory:.0f} "
                      f"| {best.cpu:.1f} | {best.memory:.0f} | {best.recovering:.2f} "
                      f"| {'all' if best.verified else 'no'} |")  # fmt: skip
            print(f"| {depth} | ratio | {costs[SIZES[1]][0].cpu / costs[SIZES[0]][0].cpu:.2f} | "
                  f"| {large.cpu / small.cpu:.2f} | | {large.recovering / small.recovering:.2f} "
                  "| |", flush=True)  # fmt: skip


def _least(costs: list[Cost]) -> Cost:
    return Cost(
        min(one.cpu for one in costs), min(one.recovering for one in costs),
        max(one.memory for one in costs), all(one.verified for one in costs),
    )  # fmt: skip


if __name__ == "__main__":
    main()
