"""Position 0: one scan of the vocabulary, reused for every text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_inversion.files import cached_folder
from lightning_inversion.recovery.measurements import say_nothing
from lightning_inversion.recovery.proposals import Proposer
from lightning_inversion.recovery.search import PrefixSearch
from lightning_inversion.transformer.linear_probe import LinearProbe
from lightning_inversion.transformer.truncated import TruncatedTransformer

_DIMENSIONS = 64
"""Random directions onto which features are projected: enough to tell tokens apart, and small."""

_AT_A_TIME = 1024
_FILE = "first_tokens.safetensors"


class FirstTokenScan(Proposer):
    """Tokens whose features as the first token of a text are close to the target's.

    A first token sees no other, so that its features are a function of the token alone: all are
    computed once for a model and a depth, and kept in the cache folder, projected onto random
    directions. The language model expects nothing at this place, and its activations are massive.
    """

    def begin(self, search: PrefixSearch) -> None:
        """Read the scan from the cache, or make it."""
        self._directions = directions(search.transformer.feature_size).to(search.target.device)
        kept = scan(search.transformer, search.probe, search.measurements.say)
        self._scan = kept.to(search.target.device)

    def scores(self, search: PrefixSearch, rows: Tensor) -> Tensor:
        """The nearest tokens first."""
        target = search.probe.standardize(search.target_at(rows), search.positions(rows))
        return -torch.cdist(target @ self._directions, self._scan)


def directions(features: int) -> Tensor:
    """``[F, 64]`` the same random directions for every run."""
    generator = torch.Generator().manual_seed(0)
    drawn: Tensor = torch.randn(features, min(_DIMENSIONS, features), generator=generator)
    scaled: Tensor = drawn / features**0.5
    return scaled


def scan(
    transformer: TruncatedTransformer, probe: LinearProbe, say: Callable[[str], None] = say_nothing
) -> Tensor:
    """``[V, 64]`` projected, standardised features of each token as a text of its own.

    Args:
        transformer: the frozen model.
        probe: its linear guess, which standardises.
        say: is told where the scan is made, and not only read, and no terminal shows a bar.
    """
    described = json.dumps(transformer.description, sort_keys=True)
    scale = probe.std[0].cpu().numpy().tobytes()
    key = hashlib.sha256(described.encode() + scale).hexdigest()[:24]

    def build(folder: Path) -> None:
        save_file({"scan": _scanned(transformer, probe, say)}, folder / _FILE)

    folder = cached_folder(f"first-tokens-{key}", build, lambda f: (f / _FILE).exists())
    kept: Tensor = load_file(folder / _FILE)["scan"]
    return kept


@torch.no_grad()
def _scanned(
    transformer: TruncatedTransformer, probe: LinearProbe, say: Callable[[str], None]
) -> Tensor:
    ids = torch.arange(transformer.embedding.vocabulary_size, device=transformer.device)
    onto = directions(transformer.feature_size).to(transformer.device)
    parts = []
    chunks = torch.split(ids, _AT_A_TIME)
    console = Console(stderr=True)
    if not console.is_terminal:
        say("scanning the vocabulary for first tokens, once for this model and depth")
    for chunk in track(
        chunks,
        "scanning first tokens",
        console=console,
        transient=True,
        disable=not console.is_terminal,  # it would leave an empty line in a file
    ):
        features = transformer.features_of(chunk[:, None])
        first = torch.zeros(len(chunk), 1, dtype=torch.long, device=chunk.device)
        parts.append((probe.standardize(features, first)[:, 0] @ onto).cpu())
    return torch.cat(parts)
