"""``python -m tests.benchmarks.last_position``: short texts from the state of their last position.

The first tokens of the protocol's prompts are looked for with a budget of texts, beside the
gradient alone: the embeddings of all positions descend together from random starts, and end at
their nearest tokens. Prints a markdown table; each text is a line of JSON in --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lightning_inversion.recovery.last_position import LastPosition
from lightning_inversion.recovery.policy import Targets
from lightning_inversion.replication.policies import protocol_prompts
from lightning_inversion.transformer.embedding import best_tokens
from lightning_inversion.transformer.language_model import LanguageModel
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.unembedding import Unembedding
from lightning_inversion.verification.measurements import Measurements

STARTS, EVERY, RATE = 8, 20, 0.3


def gradient_alone(measurements: Measurements, row: Tensor, tokens: int, steps: int) -> list[int]:
    """The nearest text that descending embeddings come by."""
    transformer, embedding = measurements.transformer, measurements.transformer.embedding
    std = measurements.calibration.std[min(tokens - 1, 1)]
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(embedding.vocabulary_size, (STARTS, tokens), generator=generator)
    best = float("inf"), drawn[0]
    with torch.enable_grad():
        vectors = embedding(drawn).clone().requires_grad_()
        optimizer = torch.optim.Adam([vectors], lr=RATE * float(embedding.std))
        for step in range(steps):
            features = transformer(vectors)[:, -1] / std
            distance = 1 - cosine_similarity(features, row[None] / std)
            (vectors.grad,) = torch.autograd.grad(distance.sum(), vectors)
            optimizer.step()
            if step % EVERY == EVERY - 1:
                near = embedding.nearness(vectors.detach().flatten(0, 1))
                texts = best_tokens(near, 1).indices.view(drawn.shape)
                with torch.no_grad():
                    found = transformer.features_of(texts)[:, -1]
                residuals = ((found - row) / std).square().mean(1).sqrt()
                best = min(best, (float(residuals.min()), texts[residuals.argmin()]),
                           key=lambda one: one[0])  # fmt: skip
    return [int(token) for token in best[1]]


def main() -> None:
    """Look for every text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8])
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--budget", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=200, help="of the gradient alone; 0 for none")
    parser.add_argument("--final_norm", action="store_true")
    parser.add_argument("--logits", action="store_true", help="from the logits of all blocks")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    print(
        "| depth | tokens | exact | verified | verified wrongly | tokens right | texts run | "
        "CPU s of a text | gradient alone: exact | CPU s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    whole_depth = dataclasses.replace(TransformerSpec(), depth=None).blocks_needed()
    for depth in [whole_depth] if options.logits else options.depths:
        final_norm = options.final_norm or options.logits
        spec = dataclasses.replace(TransformerSpec(), depth=depth, final_norm=final_norm)
        transformer, whole = spec.load_with_head()
        assert transformer.tokenizer is not None
        measurements = Measurements.measure(transformer, LanguageModel(whole, transformer.caches))
        vocabulary, file = transformer.embedding.vocabulary_size, "configs/recovery/prompts.jsonl"
        prompts = protocol_prompts(transformer.tokenizer, vocabulary, Path(file), 20)
        prompts = [
            prompt for at, prompt in enumerate(prompts, start=1) if at % 10
        ]  # no random ones
        for tokens in options.lengths:
            rows = []
            for prompt in prompts[: options.prompts]:
                ids = prompt[:tokens]
                if options.logits:
                    logits = whole(torch.tensor([ids])).logits.detach()
                    row = Unembedding.of(whole).states(logits[:, -1:])
                else:
                    row = transformer.features_of(torch.tensor([ids]))[:, -1:].detach()
                began = time.process_time()
                policy = LastPosition(tokens, budget=options.budget)
                with torch.no_grad():
                    *_, (found,) = policy.recover(measurements, Targets(row, [1]))
                seconds, began = time.process_time() - began, time.process_time()
                alone = None
                if options.steps:
                    alone = gradient_alone(measurements, row[0, 0], tokens, options.steps)
                rows.append(
                    {
                        "depth": depth,
                        "ids": ids,
                        "found": found.ids,
                        "verified": found.verified,
                        "states": [token.state for token in found.tokens],
                        "residual": found.tokens[-1].residual,
                        "texts": max(token.compared for token in found.tokens),
                        "cpu_seconds": seconds,
                        "gradient": alone,
                        "gradient_cpu_seconds": time.process_time() - began,
                    }
                )
                if options.out is not None:
                    with options.out.open("a") as lines:
                        lines.write(json.dumps(rows[-1]) + "\n")
            print(f"| {depth} | {tokens} | {_summary(rows)} |", flush=True)


def _summary(rows: list[dict[str, object]]) -> str:
    count = len(rows)

    def mean(key: str) -> float:
        return sum(float(str(row[key])) for row in rows) / count

    exact = sum(row["found"] == row["ids"] for row in rows)
    verified = sum(bool(row["verified"]) for row in rows)
    wrong = sum(bool(row["verified"]) and row["found"] != row["ids"] for row in rows)
    pairs = [pair for row in rows for pair in zip(row["found"], row["ids"], strict=True)]  # type: ignore[call-overload]
    right = sum(ours == theirs for ours, theirs in pairs)
    alone = "-"
    if rows[0]["gradient"] is not None:
        alone = f"{sum(row['gradient'] == row['ids'] for row in rows)}/{count}"
    return (
        f"{exact}/{count} | {verified} | {wrong} | {right}/{len(pairs)} | {mean('texts'):.0f} | "
        f"{mean('cpu_seconds'):.1f} | {alone} | {mean('gradient_cpu_seconds'):.1f}"
    )


if __name__ == "__main__":
    main()
