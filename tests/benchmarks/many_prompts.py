"""Recovering many prompts together: tokens a second, beside one forward over the same texts.

    python -m tests.benchmarks.many_prompts --depth 8 --prompts 1 16 256

The prompts are pieces of 20 tokens of the README. CPU seconds of the recovery alone, with all that
is measured once kept; batches hold up to ``--tokens-per-batch`` tokens, as those of `recover` do.
``in forwards`` is the recovery's time in units of the one forward's.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_inversion.recovery.policy import Targets, recover_prompts
from lightning_inversion.recovery.token_recovery import TokenRecovery
from lightning_inversion.replication.policies import scores
from lightning_inversion.transformer.language_model import LanguageModel
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.verification.measurements import Measurements

LENGTH = 20


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What work returns, and its CPU seconds."""
    began = time.process_time()
    result = work()
    return result, time.process_time() - began


def main() -> None:
    """Print a row for each number of prompts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--tokens-per-batch", type=int, default=2048)
    options = parser.parse_args()
    transformer, whole = TransformerSpec(depth=options.depth).load_with_head()
    assert transformer.tokenizer is not None
    text = Path("README.md").read_text(encoding="utf-8")
    pieces = transformer.tokenizer(text, return_tensors="pt").input_ids[0].unfold(0, LENGTH, LENGTH)
    measurements = Measurements.measure(transformer, LanguageModel(whole, transformer.caches))
    policy = TokenRecovery()
    warm = transformer.features_of(pieces[:1])  # what is computed once is computed
    recover_prompts(policy, measurements, Targets(warm, [LENGTH]))
    heads = ("prompts", "tokens", "recovering: s", "tokens a second", "one forward: s",
             "tokens a second", "in forwards", "verified", "wrong")  # fmt: skip
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|", flush=True)
    for count in options.prompts:
        ids = pieces[torch.arange(count) % len(pieces)]
        batches = torch.split(ids, max(1, options.tokens_per_batch // LENGTH))
        targets = [transformer.features_of(batch) for batch in batches]
        _, forward = timed(lambda batches=batches: [transformer.features_of(b) for b in batches])
        prompts, seconds = timed(
            lambda targets=targets: [
                prompt
                for target in targets
                for prompt in recover_prompts(
                    policy, measurements, Targets(target, [LENGTH] * len(target))
                )
            ]
        )
        found, tokens = scores(prompts, ids.tolist()), ids.numel()
        print(f"| {count} | {tokens} | {seconds:.2f} | {tokens / seconds:.0f} | {forward:.2f} "
              f"| {tokens / forward:.0f} | {seconds / forward:.1f} | {found['verified']} "
              f"| {found['falsely_verified']} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
