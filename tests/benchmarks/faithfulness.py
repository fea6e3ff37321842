"""Which attribution names the tokens that a prediction needs: replace them in the order of scores.

    python -m tests.benchmarks.faithfulness [--prompts 20]

Of each text the predicted token's log-probability is read while tokens are replaced by eos: those
with the largest scores first, or last. The figure is the mean drop in nats over all numbers of
replaced tokens, and over the texts. A good attribution drops far when its largest go first and
little when they go last; the difference is what the order is worth. A random order is worth 0.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from lightning_inversion import TransformerSpec, attribute
from lightning_inversion.attribution.config import Choices, Method

METHODS: tuple[Method, ...] = ("gradient", "integrated", "lrp", "occlusion", "combined")


@torch.no_grad()
def mean_drop(model: torch.nn.Module, ids: Tensor, order: Tensor, filler: int) -> float:
    """The mean drop of the predicted token's log-probability, tokens [T] replaced in order."""
    rows = ids.repeat(len(ids), 1)
    for count in range(1, len(ids)):
        rows[count, order[:count]] = filler
    logprobs = model(rows).logits[:, -1].log_softmax(-1)
    target = logprobs[0].argmax()
    return float((logprobs[0, target] - logprobs[1:, target]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=20)
    count = parser.parse_args().prompts
    model, tokenizer = TransformerSpec().load_causal_lm()
    texts = Path("configs/prompts.txt").read_text(encoding="utf-8").splitlines()[:count]
    print(f"{'method':12} {'scalar':8} {'largest first':>13} {'last':>6} {'worth':>6}")
    for method in METHODS:
        for scalar in ("logprob", "logit"):
            drops = []
            for text in texts:
                choices = Choices(method=method, scalar=scalar)
                result = attribute(model, tokenizer, text, choices)
                ids, scores = torch.tensor(result.ids), result.token_scores
                order = scores.argsort(descending=True)
                filler = tokenizer.eos_token_id
                drops.append([mean_drop(model, ids, one, filler) for one in (order, order.flip(0))])
            first, last = torch.tensor(drops).mean(0).tolist()
            print(f"{method:12} {scalar:8} {first:13.2f} {last:6.2f} {first - last:6.2f}")


if __name__ == "__main__":
    main()
