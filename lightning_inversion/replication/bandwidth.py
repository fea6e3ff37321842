"""``python -m lightning_inversion.replication.bandwidth``: how many features are enough, by bisection.

The document's 'Noise on a Discreet Channel' finds one width at which every token is recovered and
below which none is. Bisection finds a width k that recovers while k - 1 does not; where success is
not monotone there are several, and the full curve (``configs/noisy_channel``, a ``Narrowed``
objective whose ranges are rows of one batch) shows which.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import yaml

from lightning_inversion.replication.run import fit
from lightning_inversion.transformer.blocks import text_config
from lightning_inversion.transformer.loading import TransformerSpec


def critical_width(recovers: Callable[[int], bool], widest: int) -> int | None:
    """A width that recovers while the next smaller does not; None if ``widest`` does not.

    Args:
        recovers: tries a width of 1 to ``widest``; asked about log2(widest) times.
        widest: all the features there are.
    """
    if not recovers(widest):
        return None
    low, high = 0, widest
    while high - low > 1:
        middle = (low + high) // 2
        if recovers(middle):
            high = middle
        else:
            low = middle
    return high


def main(arguments: list[str] | None = None) -> int:
    """Print the critical width of a prompt; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_inversion.replication.bandwidth",
        description="The critical width k of [0:k] by bisection. Other options go to fit.",
    )
    parser.add_argument("--config", default="configs/noisy_channel/recommended.yaml")
    parser.add_argument("--prompt", default="Mario the man versus Mario the idea")
    options, more = parser.parse_known_args(arguments)
    settings = yaml.safe_load(Path(options.config).read_text(encoding="utf-8"))
    spec = dict(settings["model"]["transformer"])
    spec.pop("features", None)
    model = [option for option in more if option.startswith("--model.transformer.model=")]
    if model:
        spec["model"] = model[-1].partition("=")[2]
    widest = int(text_config(TransformerSpec(**spec).config()).hidden_size)

    def recovers(width: int) -> bool:
        given = [
            f"--config={options.config}",
            f"--data.prompts={json.dumps([options.prompt])}",
            *more,
            f"--model.transformer.features=0:{width}",
        ]
        with tempfile.TemporaryDirectory() as root:
            (row,) = fit(given, Path(root))
        print(f"[0:{width}] token accuracy {row['token_accuracy']:.2f}", flush=True)
        return bool(row["exact"])

    width = critical_width(recovers, widest)
    print("no width recovers" if width is None else f"critical width {width} of {widest}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
