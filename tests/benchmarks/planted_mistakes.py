"""``python -m tests.benchmarks.planted_mistakes``: whether mistakes in captured features are named.

Each of the protocol's prompts is captured with one mistake, and diagnosed alone. Prints a markdown
table: how many mistakes are named with their option, how many others are named, and the seconds,
beside those of what is measured before. With nothing in the cache folder
(``LIGHTNING_INVERSION_CACHE``) they are those of a first run.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lightning_inversion.recovery.diagnosis import Diagnosis, diagnose
from lightning_inversion.recovery.policy import Targets
from lightning_inversion.recovery.variants import OtherCuts
from lightning_inversion.replication.policies import protocol_prompts
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.truncated import TruncatedTransformer
from lightning_inversion.verification.measurements import Measurements

Cut = Callable[[tuple[int, ...], bool], TruncatedTransformer]


def kinds(cut: Cut, depth: int, blocks: int) -> dict[str, tuple[Callable[[Tensor], Tensor], str]]:
    """The features ``[T, F]`` of ids ``[T]`` with each mistake, and what must be named."""

    def at(depth: int, final_norm: bool = False) -> Callable[[Tensor], Tensor]:
        return lambda ids: cut((depth,), final_norm).features_of(ids[None])[0]

    right = at(depth)
    found: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
        "none": (right, ""),
        "a block less": (at(depth - 1), f"set --model.transformer.depth {depth - 1}"),
        "after the final norm": (
            at(depth, True), "set --model.transformer.final_norm true"
        ),
        "mean removed": (
            lambda ids: right(ids) - right(ids).mean(-1, keepdim=True), "set --data.centred true"
        ),
        "times 0.5": (lambda ids: right(ids) * 0.5, "set --data.scale 0.5"),
        "times 30": (lambda ids: right(ids) * 30, "set --data.scale 30"),
        "begins at position 5": (
            lambda ids: right(ids)[5:], "give the tokens before it as --data.known_prefix"
        ),
        "difference of rows": (lambda ids: right(ids) - right(ids).flip(0), ""),
        "features shuffled": (lambda ids: right(ids).roll(100, -1), ""),
    }  # fmt: skip
    if depth < blocks:
        found["a block more"] = (at(depth + 1), f"set --model.transformer.depth {depth + 1}")
    return found


def main() -> None:
    """Diagnose each prompt with each mistake."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--length", type=int, default=20)
    options = parser.parse_args()
    spec = dataclasses.replace(TransformerSpec(), depth=options.depth)
    transformer, whole = spec.load_with_head()
    tokenizer = transformer.tokenizer
    assert tokenizer is not None
    began = time.process_time()
    measurements = Measurements.measure(transformer, first_alone=True)
    print(f"Measured in {time.process_time() - began:.1f} CPU seconds.\n")
    made: dict[tuple[tuple[int, ...], bool], TruncatedTransformer] = {}

    def cut(depths: tuple[int, ...], final_norm: bool) -> TruncatedTransformer:
        key = depths, final_norm
        if key not in made:
            made[key] = TruncatedTransformer.from_model(
                whole, tokenizer, layers=depths, final_norm=final_norm
            )
        return made[key]

    blocks = dataclasses.replace(spec, depth=None).blocks_needed()
    file = Path("configs/recovery/prompts.jsonl")
    vocabulary = transformer.embedding.vocabulary_size
    prompts = protocol_prompts(tokenizer, vocabulary, file, options.length)[: options.prompts]
    print("| mistake | named | another named | nothing named | CPU seconds of a prompt, most |")
    print("|---|---|---|---|---|")
    for name, (features, wanted) in kinds(cut, options.depth, blocks).items():
        found: list[Diagnosis | None] = []
        seconds = 0.0
        for ids in torch.tensor(prompts):
            target = features(ids)
            began = time.process_time()
            found += diagnose(
                measurements, Targets(target[None], [len(target)]), OtherCuts(cut, blocks)
            )
            seconds = max(seconds, time.process_time() - began)
        ways = [None if one is None else one.way_out for one in found]
        named = sum(way is not None and way.startswith(wanted) for way in ways)
        nothing = ways.count(None)
        print(
            f"| {name} | {named if wanted else '-'} | {len(ways) - named - nothing} | {nothing} | "
            f"{seconds:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
