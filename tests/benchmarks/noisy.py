"""``python -m tests.benchmarks.noisy``: tokens of ordinary text under told noise, none falsely.

At each position of ordinary text (see ``ordinary``) the tokens whose embeddings are nearest to the
right one are run first, without it, as a search would that has not found it; none may be verified.
Then the right one is run. All that verification compares with them is run too. Prints a markdown
table.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

import torch
from torch.nn.utils.rnn import pad_sequence

from lightning_inversion.data.storage import Storage
from lightning_inversion.recovery.search import PrefixSearch
from lightning_inversion.transformer.embedding import best_tokens
from lightning_inversion.transformer.language_model import LanguageModel
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.verification.measurements import Measurements
from tests.benchmarks.ordinary import prompts

_ROWS, _OFFERED = 64, 4


@torch.no_grad()
def offered(
    measurements: Measurements, channel: Storage, ids: list[list[int]], seed: int
) -> Counter[str]:
    """Counts over prompts that are run together."""
    embedding = measurements.transformer.embedding
    lengths = torch.tensor([len(one) for one in ids])
    padded = pad_sequence([torch.tensor(one) for one in ids], batch_first=True)
    features = measurements.transformer.features_of(padded)
    target = channel(features, torch.Generator().manual_seed(seed))
    search = PrefixSearch(measurements, target)
    counts: Counter[str] = Counter()
    for position in range(padded.shape[1]):
        left = (lengths > position).nonzero()[:, 0]
        counts["tokens"] += len(left)
        near = embedding.nearness(embedding(padded[:, position]))
        near.scatter_(1, padded[:, position, None], -torch.inf)
        for tokens in (*best_tokens(near, _OFFERED).indices.T, padded[:, position]):
            moved = []
            counts["offered"] += int((tokens[left] != padded[left, position]).sum())
            for trial in search.run(left, tokens[left, None]) if len(left) else ():
                right = trial.best == padded[trial.rows, position]
                counts["verified"] += int((trial.verified & right).sum())
                wrong = trial.rows[trial.verified & ~right]
                counts["false"] += len(wrong)
                if len(wrong):
                    search.take_back(wrong)
                moved.append(trial.rows[trial.verified & right])
            left = left[torch.isin(left, torch.cat([left[:0], *moved]), invert=True)]
        if len(left):
            search.accept(left, padded[left, position])
    return counts


def main() -> None:
    """Run the standard deviations that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--std", type=float, nargs="+", default=[1.0])
    parser.add_argument("--kind", choices=("gaussian", "laplace"), default="gaussian")
    parser.add_argument("--largest", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=10_000)
    options = parser.parse_args()
    whole, tokenizer = TransformerSpec().load_causal_lm()
    texts = prompts(tokenizer, options.tokens)
    transformer = TransformerSpec(depth=options.depth).load()
    print("| noise | tokens | verified | wrong ones offered | false | CPU seconds |")
    print("|---|---|---|---|---|---|")
    for std in options.std:
        channel = Storage(noise=std, noise_kind=options.kind, largest=options.largest)
        measurements = Measurements.measure(transformer, LanguageModel(whole, True), channel)
        counts: Counter[str] = Counter()
        began = time.process_time()
        for start in range(0, len(texts), _ROWS):
            counts += offered(measurements, channel, texts[start : start + _ROWS], start)
            print(f"{dict(counts)} {time.process_time() - began:.0f} s", file=sys.stderr)
            if counts["tokens"] >= options.tokens:
                break
        shown = " | ".join(str(counts[key]) for key in ("tokens", "verified", "offered", "false"))
        seconds = time.process_time() - began
        print(f"| {options.kind} {std} | {shown} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
