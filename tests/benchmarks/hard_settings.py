"""``python -m tests.benchmarks.hard_settings``: exact recovery where states were not kept whole.

Rounded, noisy, sliced, quantised, normed: for each setting, how many tokens of the protocol's texts
are right, how many are verified, and whether any certificate is false. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from lightning_inversion.data.storage import Storage
from lightning_inversion.recovery.policy import RecoveredPrompt, Targets, recover_prompts
from lightning_inversion.recovery.token_recovery import TokenRecovery
from lightning_inversion.replication.policies import protocol_prompts
from lightning_inversion.transformer.language_model import LanguageModel
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.verification.measurements import Measurements
from tests.benchmarks.ordinary import prompts as ordinary_prompts

_AT_A_TIME = 64
"""Prompts that are recovered together."""
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "float32": ({}, {}),
    "stored as bfloat16": ({}, {"dtype": "bfloat16"}),
    "stored as float16": ({}, {"dtype": "float16"}),
    "computed in bfloat16": ({"dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    "int8 weights": ({"quantization": "int8"}, {}),
    "nf4 weights": ({"quantization": "nf4"}, {}),
    "noise 0.1": ({}, {"noise": 0.1}),
    "noise 1": ({}, {"noise": 1.0}),
    "noise 3": ({}, {"noise": 3.0}),
    "Laplace noise 0.1": ({}, {"noise": 0.1, "noise_kind": "laplace"}),
    "Laplace noise 1": ({}, {"noise": 1.0, "noise_kind": "laplace"}),
    "Laplace noise 3": ({}, {"noise": 3.0, "noise_kind": "laplace"}),
    "largest 0.5": ({}, {"largest": 0.5}),
    "largest 0.15": ({}, {"largest": 0.15}),
    "largest 0.15 in bfloat16": ({}, {"largest": 0.15, "dtype": "bfloat16"}),
    "largest 0.5, noise 0.1": ({}, {"largest": 0.5, "noise": 0.1}),
    "largest 0.5, Laplace noise 1": (
        {},
        {"largest": 0.5, "noise": 1.0, "noise_kind": "laplace"},
    ),
    "features 0:64": ({"features": "0:64"}, {}),
    "features 0:8": ({"features": "0:8"}, {}),
    "layers 4 and 8": ({"layers": [4, 8]}, {}),
    "final norm": ({"final_norm": True}, {}),
    "keys and values": ({"output": "keys_values"}, {}),
    "keys and values in bfloat16": ({"output": "keys_values"}, {"dtype": "bfloat16"}),
}


def main() -> None:
    """Run the settings that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--length", type=int, default=20)
    parser.add_argument("--budget", type=int, default=4096)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS))
    parser.add_argument("--certify", choices=("near", "exhaustive"), default="near")
    parser.add_argument("--tokens", type=int, help="of ordinary text, in place of the protocol's")
    options = parser.parse_args()
    print("| setting | right | verified | false certificates | seconds | threshold |")
    print("|---|---|---|---|---|---|")
    for name in options.settings:
        loaded, stored = SETTINGS[name]
        depth = None if "layers" in loaded else options.depth
        spec = dataclasses.replace(TransformerSpec(), **{"depth": depth, **loaded})
        transformer, whole = spec.load_with_head()
        language_model = LanguageModel(whole, transformer.caches)
        tokenizer = transformer.tokenizer
        assert tokenizer is not None
        vocabulary = transformer.embedding.vocabulary_size
        file = Path("configs/recovery/prompts.jsonl")
        texts = protocol_prompts(tokenizer, vocabulary, file, options.length)[: options.prompts]
        if options.tokens is not None:
            texts = ordinary_prompts(tokenizer, options.tokens)
        channel = Storage(**stored)
        measurements = Measurements.measure(transformer, language_model, channel)
        policy = TokenRecovery(budget=options.budget, certify=options.certify)
        generator = torch.Generator().manual_seed(0)
        found: list[RecoveredPrompt] = []
        began = time.monotonic()
        for start in range(0, len(texts), _AT_A_TIME):
            some = [torch.tensor(text) for text in texts[start : start + _AT_A_TIME]]
            lengths = [len(text) for text in some]
            target = channel(transformer.features_of(pad_sequence(some, True)), generator)
            found += recover_prompts(policy, measurements, Targets(target, lengths))
            print(f"{name}: {len(found)} of {len(texts)} prompts", file=sys.stderr)
        seconds = time.monotonic() - began
        pairs = [
            (token, right)
            for text, row in zip(found, texts, strict=True)
            for token, right in zip(text.tokens, row, strict=True)
        ]
        right = sum(token.id == truth for token, truth in pairs)
        verified = sum(token.verified for token, _ in pairs)
        false = sum(token.verified and token.id != truth for token, truth in pairs)
        threshold = float(measurements.calibration.threshold[1])
        print(
            f"| {name} | {right}/{len(pairs)} | {verified} | {false} | {seconds:.0f} | "
            f"{threshold:.2g} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
