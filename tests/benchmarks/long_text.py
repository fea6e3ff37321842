"""``python -m tests.benchmarks.long_text``: one long text, and what a token costs along it.

The text is the README's. Prints how many tokens came back, and the seconds of each quarter beside
those of one plain forward over the text so far.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from lightning_inversion.recovery.policy import Targets
from lightning_inversion.recovery.token_recovery import TokenRecovery
from lightning_inversion.transformer.language_model import LanguageModel
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.verification.measurements import Measurements


def main() -> None:
    """Recover it, and say what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    transformer, whole = TransformerSpec(depth=options.depth).load_with_head()
    assert transformer.tokenizer is not None
    text = Path("README.md").read_text(encoding="utf-8")
    ids = transformer.tokenizer(text, return_tensors="pt").input_ids[:, : options.length]
    measurements = Measurements.measure(transformer, LanguageModel(whole, transformer.caches))
    target = transformer.features_of(ids)
    marks: list[tuple[int, float]] = []
    began = time.monotonic()
    length = ids.shape[1]
    with torch.no_grad():
        for (found,) in TokenRecovery().recover(measurements, Targets(target, [length])):
            if len(found.tokens) >= (len(marks) + 1) * length // 4:
                marks.append((len(found.tokens), time.monotonic() - began))
    right = sum(ours == theirs for ours, theirs in zip(found.ids, ids[0].tolist(), strict=True))
    verified = sum(token.verified for token in found.tokens)
    print(f"{right}/{length} right, {verified} verified, {marks[-1][1]:.0f} s")
    before = 0.0
    for count, seconds in marks:
        forward = time.monotonic()
        transformer.features_of(ids[:, :count])
        forward = time.monotonic() - forward
        print(f"to token {count}: {seconds - before:.1f} s; one forward so far {forward:.2f} s")
        before = seconds


if __name__ == "__main__":
    main()
