"""``python -m tests.benchmarks.unknown_order``: rows of each prompt in an order that nobody tells.

Prints a markdown table: prompts whose order is found, tokens that are right and verified, and the
CPU seconds for the order and for the recovery after it.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import torch

from lightning_inversion.recovery.order import in_order
from lightning_inversion.recovery.policy import Targets, recover_prompts
from lightning_inversion.recovery.token_recovery import TokenRecovery
from lightning_inversion.replication.policies import protocol_prompts
from lightning_inversion.transformer.language_model import LanguageModel
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.verification.measurements import Measurements


def main() -> None:
    """Recover every prompt from shuffled rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 8, 15])
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--length", type=int, default=20)
    options = parser.parse_args()
    print(
        "| depth | orders found | tokens right | verified | verified wrongly "
        "| CPU s of a prompt: order | recovery |"
    )
    print("|---|---|---|---|---|---|---|")
    for depth in options.depths:
        transformer, whole = dataclasses.replace(TransformerSpec(), depth=depth).load_with_head()
        assert transformer.tokenizer is not None
        measurements = Measurements.measure(transformer, LanguageModel(whole, transformer.caches))
        vocabulary, file = transformer.embedding.vocabulary_size, "configs/recovery/prompts.jsonl"
        prompts = protocol_prompts(
            transformer.tokenizer, vocabulary, Path(file), options.length
        )[: options.prompts]  # fmt: skip
        ids = torch.tensor(prompts)
        generator = torch.Generator().manual_seed(0)
        shuffles = torch.stack([torch.randperm(ids.shape[1], generator=generator) for _ in ids])
        rows = torch.arange(len(ids))[:, None]
        target = transformer.features_of(ids).detach()[rows, shuffles]
        lengths = [ids.shape[1]] * len(ids)
        began = time.process_time()
        targets, orders = in_order(measurements, Targets(target, lengths))
        middle = time.process_time()
        found = recover_prompts(TokenRecovery(budget=1024), measurements, targets)
        ended = time.process_time()
        right = [
            order.rows == tuple(shuffle.argsort().tolist())
            for order, shuffle in zip(orders, shuffles, strict=True)
        ]
        pairs = [
            (token.id == own, token.verified)
            for prompt, truth in zip(found, prompts, strict=True)
            for token, own in zip(prompt.tokens, truth, strict=True)
        ]
        print(
            f"| {depth} | {sum(right)}/{len(right)} | {sum(one for one, _ in pairs)}/{len(pairs)} "
            f"| {sum(verified for _, verified in pairs)} "
            f"| {sum(verified and not one for one, verified in pairs)} "
            f"| {(middle - began) / len(ids):.2f} | {(ended - middle) / len(ids):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
