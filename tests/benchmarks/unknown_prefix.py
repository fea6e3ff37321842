"""``python -m tests.benchmarks.unknown_prefix``: rows after a prefix that is not known.

The protocol's prompts come after prefixes of several lengths, of which nothing is told. Prints
for each depth and length how many of the prompts' tokens are read right, by the linear probe alone
and together with the language model; the mean probability; and of the tokens with a probability of
0.9 or more those that are right. Each result is a line of JSON in --out, and what is there is not
run again; with --figure the lines are drawn, and nothing is run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from itertools import pairwise, product
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch

from lightning_inversion.recovery.policy import Targets
from lightning_inversion.recovery.reading import Reading
from lightning_inversion.replication.policies import protocol_prompts
from lightning_inversion.transformer.language_model import LanguageModel
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.verification.measurements import Measurements

SYSTEM = (
    "You are a careful assistant of a hospital in the north of the country. Answer in whole "
    "sentences, never name a patient, and do not give advice on medicines. If a question is about "
    "an emergency, tell the user to call the emergency number at once. Today is the third of May, "
    "the wards on the second floor are closed, and visitors may come between ten and four only."
)


EDGES = (0.0, 0.5, 0.9, 0.99, 1.0)
"""Of the intervals of probability whose tokens are counted together."""
FEW = 10
"""Tokens below which an interval is not drawn."""


def draw(rows: Path, figure: Path) -> None:
    """Tokens that are read right, by depth and by the probability that they were given."""
    table = pd.DataFrame(json.loads(line) for line in rows.read_text().splitlines())
    table["read right"] = table["right"] / table["tokens"]
    table["read by"] = table["beams"].map({0: "probe alone", 8: "probe and language model"})
    table["prefix"] = table["prefix"].map("{} tokens".format)
    binned = table.explode("bins")
    tokens, right, probability = (binned["bins"].str[at].astype(float) for at in range(3))
    binned["tokens of the interval"] = tokens
    binned["read right"], binned["mean probability"] = right / tokens, probability / tokens
    _, (left, beside) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    sns.lineplot(
        table, x="depth", y="read right", hue="prefix", style="read by", markers=True,
        palette="colorblind", ax=left,
    )  # fmt: skip
    sns.scatterplot(
        binned[tokens >= FEW], x="mean probability", y="read right", hue="prefix", style="read by",
        size="tokens of the interval", palette="colorblind", ax=beside, legend=False,
    )  # fmt: skip
    beside.axline((0, 0), slope=1, color="gray", linewidth=1, zorder=0)
    left.set_title("Tokens right, by depth")
    beside.set_title("Tokens right, by their probability (a point for each interval)")
    plt.savefig(figure)


def main() -> None:
    """Read every prompt after every prefix."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 4, 8, 15, 24, 30])
    parser.add_argument("--prefixes", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--length", type=int, default=20)
    parser.add_argument("--beams", type=int, nargs="+", default=[0, 8])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path, help=".svg or .png")
    options = parser.parse_args()
    if options.figure is not None:
        draw(options.out, options.figure)
        return
    there = set()
    if options.out is not None and options.out.exists():
        lines = map(json.loads, options.out.read_text().splitlines())
        there = {(row["depth"], row["prefix"], row["beams"]) for row in lines}
    print(
        "| depth | prefix | beams | read right | mean probability "
        "| right of those with 0.9 or more | CPU seconds |"
    )
    print("|---|---|---|---|---|---|---|")
    for depth in options.depths:
        wanted = set(product([depth], options.prefixes, options.beams)) - there
        if not wanted:
            continue
        transformer, whole = dataclasses.replace(TransformerSpec(), depth=depth).load_with_head()
        tokenizer = transformer.tokenizer
        assert tokenizer is not None
        measurements = Measurements.measure(transformer, LanguageModel(whole, transformer.caches))
        vocabulary, file = transformer.embedding.vocabulary_size, "configs/recovery/prompts.jsonl"
        prompts = protocol_prompts(tokenizer, vocabulary, Path(file), options.length)
        texts = torch.tensor(prompts[: options.prompts])
        system = tokenizer(SYSTEM).input_ids
        for length in options.prefixes:
            prefix = torch.tensor(system[:length]).expand(len(texts), -1)
            assert prefix.shape[1] == length
            target = transformer.features_of(torch.cat([prefix, texts], dim=1))[:, length:]
            for beams in options.beams:
                if (depth, length, beams) not in wanted:
                    continue
                began = time.process_time()
                lengths = [texts.shape[1]] * len(texts)
                *_, found = Reading(beams).recover(measurements, Targets(target, lengths))
                pairs = [
                    (token.id == right, token.probability or 0.0)
                    for prompt, ids in zip(found, texts.tolist(), strict=True)
                    for token, right in zip(prompt.tokens, ids, strict=True)
                ]
                bins = [
                    [(right, chance) for right, chance in pairs if low <= chance < high]
                    for low, high in pairwise((*EDGES[:-1], 1.1))
                ]
                sure = [right for right, chance in pairs if chance >= 0.9]
                row = {
                    "depth": depth,
                    "prefix": length,
                    "prompts": len(texts),
                    "beams": beams,
                    "tokens": len(pairs),
                    "right": sum(right for right, _ in pairs),
                    "mean_probability": sum(chance for _, chance in pairs) / len(pairs),
                    "sure": len(sure),
                    "sure_right": sum(sure),
                    "bins": [
                        [len(one), sum(right for right, _ in one), sum(chance for _, chance in one)]
                        for one in bins
                    ],
                    "cpu_seconds": time.process_time() - began,
                }
                print(
                    f"| {depth} | {length} | {beams} | {row['right'] / len(pairs):.3f} "
                    f"| {row['mean_probability']:.3f} | {sum(sure)}/{len(sure)} "
                    f"| {row['cpu_seconds']:.1f} |",
                    flush=True,
                )
                if options.out is not None:
                    with options.out.open("a") as rows:
                        rows.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
