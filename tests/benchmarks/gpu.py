"""Exact recovery on a GPU, of models that are made there by seed: no file, no network.

    python -m tests.benchmarks.gpu --out gpu.json
    python -m tests.benchmarks.gpu --small --device cpu --out small.json     the same on a CPU

The gpu tests; 100 prompts of 20 tokens of GPT-2 small's shape (the setting of SIPIT, arXiv
2510.15511); models of the shapes of Llama 2 7B and Llama 3 8B in bfloat16 at 1, 8 and 32 blocks;
and 8 blocks of the first with int8 and nf4 weights. The JSON has an entry for each: seconds of
measuring and of recovering, tokens a second, tokens right, verified and verified wrongly, peak
memory, the device's name. It is written after each entry. An entry begins while time is left, is
stopped where it takes too long, and says so; after ``--minutes`` the command ends in any case.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from lightning_inversion.cache import ENVIRONMENT
from lightning_inversion.recovery.token_recovery import TokenRecovery
from lightning_inversion.replication.policies import run_policy
from lightning_inversion.transformer.language_model import LanguageModel
from lightning_inversion.transformer.quantization import prepare_quantized_, quantization_config
from lightning_inversion.transformer.truncated import TruncatedTransformer
from lightning_inversion.verification.measurements import Measurements

LENGTH = 20
LEFT_OUT = "no time was left"
FEWEST = 60.0
"""Seconds that must be left for an entry to begin: the largest model is made and measured."""
LONGEST = 60.0
"""Seconds of recovering the prompts of an entry."""
TESTS = 150.0
"""Seconds of the gpu tests."""


@dataclass(frozen=True)
class Case:
    """One model and depth.

    Attributes:
        name: of the entry.
        config: of the model.
        depth: blocks kept.
        prompts: of random tokens.
        dtype: what the model computes in.
        quantization: int8, nf4 or None.
    """

    name: str
    config: PretrainedConfig
    depth: int
    prompts: int
    dtype: torch.dtype
    quantization: str | None = None


def cases(small: bool) -> list[Case]:
    """What is run, in this order; ``small`` for a CPU."""
    if small:
        heads = {"num_hidden_layers": 4, "num_attention_heads": 4}
        shape: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, **heads}
        gpt2 = GPT2Config(
            vocab_size=512, n_embd=64, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0
        )
        llama = LlamaConfig(**shape, intermediate_size=128)
        grouped = LlamaConfig(**shape, intermediate_size=160, num_key_value_heads=2)
        depths, prompts = (1, 4), 3
    else:
        gpt2 = GPT2Config()
        llama = LlamaConfig()  # the shape of Llama 2 7B
        grouped = LlamaConfig(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8)
        depths, prompts = (1, 8, 32), 16
    half = torch.bfloat16
    last = gpt2.num_hidden_layers
    found = [Case("GPT-2 small", gpt2, last, prompts if small else 100, torch.float32)]
    for name, config in (("7B", llama), ("8B", grouped)):
        found += [Case(f"{name}, depth {n}", config, n, prompts, half) for n in depths]
    few = LlamaConfig(**{**llama.to_dict(), "num_hidden_layers": min(8, llama.num_hidden_layers)})
    found += [
        Case(f"7B, {kind}", few, few.num_hidden_layers, prompts, half, kind)
        for kind in ("int8", "nf4")
    ]
    return found


def made(case: Case, device: torch.device) -> PreTrainedModel:
    """The model, its weights drawn on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(case.config, dtype=case.dtype)
    if case.quantization is not None:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            del model
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=case.dtype,
                quantization_config=quantization_config(case.quantization, case.dtype),
                device_map=str(device),
            )
        prepare_quantized_(model)
    return model.eval()


def run(case: Case, device: torch.device, cap: float = LONGEST) -> dict[str, Any]:
    """Recover random prompts; what it took, as plain values."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    model = made(case, device)
    transformer = TruncatedTransformer.from_model(model, depth=case.depth)
    measurements, measuring = timed(
        lambda: Measurements.measure(transformer, LanguageModel(model, transformer.caches)), device
    )
    generator = torch.Generator().manual_seed(1)
    size = (case.prompts, LENGTH)
    ids = torch.randint(transformer.embedding.vocabulary_size, size, generator=generator)
    ids = ids.to(device)
    _, forward = timed(lambda: transformer.features_of(ids), device)
    found, seconds = timed(
        lambda: run_policy(TokenRecovery(budget=4096), measurements, ids, cap), device
    )
    return {
        **found,
        "measuring_seconds": round(measuring, 2),
        "forward_seconds": round(forward, 4),
        "seconds": round(seconds, 2),
        "tokens_per_second": round(found["done"] / seconds, 1),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
        if cuda
        else None,
    }


def timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What work returns, and its wall seconds; the device has finished before and after."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    finish()
    began = time.monotonic()
    result = work()
    finish()
    return result, time.monotonic() - began


def all_cases(
    small: bool, device: torch.device, ends: float, keep: Callable[[str, Any], None]
) -> None:
    """An entry for each case; one that fails says why, and the others run.

    Args:
        small: shapes for a CPU.
        device: where the models are made.
        ends: when the time is up, by the monotonic clock.
        keep: is called with the name of each entry, and the entry.
    """
    for case in cases(small):
        left = ends - time.monotonic()
        if left < (0 if small else FEWEST):
            keep(case.name, {"left_out": LEFT_OUT})
            continue
        try:
            entry = run(case, device, min(LONGEST, left / 2))
        except Exception as error:  # too little memory, no kernels, what no CPU has shown
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            entry = {"left_out": reason[:300]}
        keep(case.name, entry)
        gc.collect()  # a model's hooks hold it in cycles
        if device.type == "cuda":
            torch.cuda.empty_cache()


def gpu_tests(seconds: float) -> str:
    """The last line of the gpu tests."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-m", "gpu", "tests/gpu"]
    try:
        tests = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"not ended after {seconds:.0f} s"
    return (tests.stdout.strip() or tests.stderr.strip()).splitlines()[-1]


def main() -> None:
    """Run everything, and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="shapes for a CPU")
    parser.add_argument("--minutes", type=float, default=8, help="after which it ends")
    options = parser.parse_args()
    ends = time.monotonic() + 60 * options.minutes
    # What the main thread waits for, a kernel or a download, does not hold up the clock.
    clock = threading.Timer(60 * options.minutes, lambda: os._exit(1))
    clock.daemon = True
    clock.start()
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "torch": torch.__version__,
        "entries": {},
    }

    def keep(name: str, entry: Any) -> None:
        print(name, json.dumps(entry), flush=True)
        found["entries"][name] = entry
        write()

    def write() -> None:
        part = options.out.with_name(f"{options.out.name}.part")
        part.write_text(json.dumps(found, indent=1) + "\n")
        part.replace(options.out)

    if cuda:
        found["tests"] = gpu_tests(min(TESTS, 15 * options.minutes))
        write()
    with tempfile.TemporaryDirectory() as cache:  # all is measured, and nothing is read
        os.environ[ENVIRONMENT] = cache
        all_cases(options.small, device, ends - 5, keep)
    clock.cancel()


if __name__ == "__main__":
    main()
