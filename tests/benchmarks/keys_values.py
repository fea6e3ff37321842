"""``python -m tests.benchmarks.keys_values``: prompts from the keys and values of one block.

The protocol's prompts run through the model once, and of the cache that it returns one block's keys
and values are read (`past_key_values`). Prints a markdown table: prompts and tokens that are
right and verified, and the CPU seconds of a prompt, without what is measured once for a model.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import torch

from lightning_inversion import recover
from lightning_inversion.replication.policies import protocol_prompts
from lightning_inversion.transformer.loading import TransformerSpec


def main() -> None:
    """Recover every prompt from its cache."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 8, 15, 24, 29])
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--length", type=int, default=20)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    model, tokenizer = TransformerSpec().load_causal_lm()
    vocabulary, file = model.config.vocab_size, Path("configs/recovery/prompts.jsonl")
    prompts = protocol_prompts(tokenizer, vocabulary, file, options.length)[: options.prompts]
    with torch.no_grad():
        caches = [model(torch.tensor([ids])).past_key_values for ids in prompts]
    print(
        "| block | prompts right | tokens right | verified | verified wrongly | CPU s of a prompt |"
    )
    print("|---|---|---|---|---|---|")
    for block in options.blocks:
        recover(model, tokenizer, caches[:1], depth=block)  # measures what is measured once
        began = time.process_time()
        found = recover(model, tokenizer, caches, depth=block)
        seconds = (time.process_time() - began) / len(prompts)
        pairs = [
            (token.id == right, token.verified)
            for prompt, ids in zip(found, prompts, strict=True)
            for token, right in zip(prompt.tokens, ids, strict=True)
        ]
        whole = sum(prompt.ids == ids for prompt, ids in zip(found, prompts, strict=True))
        print(
            f"| {block} | {whole}/{len(prompts)} | {sum(right for right, _ in pairs)}/{len(pairs)} "
            f"| {sum(verified for _, verified in pairs)} "
            f"| {sum(verified and not right for right, verified in pairs)} | {seconds:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
