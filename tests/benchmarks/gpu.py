"""Exact recovery on a GPU, of models that are made there by seed: no file, no network.

    python -m tests.benchmarks.gpu --out gpu.json
    python -m tests.benchmarks.gpu --small --device cpu --out small.json     the same on a CPU

The gpu tests; 100 prompts of 20 tokens of GPT-2 small's shape (the setting of SIPIT, arXiv
2510.15511); models of the shapes of Llama 2 7B and Llama 3 8B in bfloat16 at 1, 8 and 32 blocks;
and 8 blocks of the first with int8 and nf4 weights. The JSON has an entry for each: seconds of
measuring and of recovering, tokens a second, tokens right, verified and verified wrongly, peak
memory, the device's name. An entry begins while time is left, and says where it did not run.
"""

import argparse
import json
import subprocess
import sys
import tempfile
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

from lightning_inversion.recovery.measurements import Measurements
from lightning_inversion.recovery.policy import Targets, recover_prompts
from lightning_inversion.recovery.token_recovery import TokenRecovery
from lightning_inversion.replication.policies import scores
from lightning_inversion.transformer.language_model import LanguageModel
from lightning_inversion.transformer.quantization import prepare_quantized_, quantization_config
from lightning_inversion.transformer.truncated import TruncatedTransformer

LENGTH = 20
LEFT_OUT = "no time was left"


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


def run(case: Case, device: torch.device) -> dict[str, Any]:
    """Recover random prompts; what it took, as plain values."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    model = made(case, device)
    transformer = TruncatedTransformer.from_model(model, depth=case.depth)
    measurements, measuring = timed(
        lambda: Measurements.measure(transformer, LanguageModel(model, transformer.caches))
    )
    generator = torch.Generator().manual_seed(1)
    size = (case.prompts, LENGTH)
    ids = torch.randint(transformer.embedding.vocabulary_size, size, generator=generator)
    target = transformer.features_of(ids.to(device))
    prompts, seconds = timed(
        lambda: recover_prompts(
            TokenRecovery(budget=4096), measurements, Targets(target, [LENGTH] * case.prompts)
        )
    )
    return {
        "measuring_seconds": round(measuring, 2),
        "seconds": round(seconds, 2),
        "tokens_per_second": round(ids.numel() / seconds, 1),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        **scores(prompts, ids.tolist()),
    }


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What work returns, and its wall seconds; a GPU has finished then."""
    began = time.monotonic()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.monotonic() - began


def all_cases(small: bool, device: torch.device, minutes: float) -> dict[str, Any]:
    """An entry for each case; one that fails says why, and the others run."""
    began, entries = time.monotonic(), {}
    for case in cases(small):
        if time.monotonic() - began > 60 * minutes:
            entries[case.name] = {"left_out": LEFT_OUT}
            continue
        try:
            entries[case.name] = run(case, device)
        except (RuntimeError, ImportError, ValueError) as error:  # too little memory, no kernels
            entries[case.name] = {"left_out": " ".join(str(error).split())[:300]}
        print(case.name, json.dumps(entries[case.name]), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return entries


def main() -> None:
    """Run everything, and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="shapes for a CPU")
    parser.add_argument("--minutes", type=float, default=6, help="after which no model begins")
    options = parser.parse_args()
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "torch": torch.__version__,
        "entries": all_cases(options.small, device, options.minutes),
    }
    if cuda:
        command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-m", "gpu", "tests"]
        tests = subprocess.run(command, capture_output=True, text=True, check=False)
        found["tests"] = tests.stdout.strip().splitlines()[-1:]
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
