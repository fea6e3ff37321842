"""``FirstTokenFeatures``: the features of every token as the first one of a prompt."""

from __future__ import annotations

import hashlib
import json
import logging

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from lightning_inversion.recovery.measurements import Measurements
from lightning_inversion.transformer.cached import cached_tensor

_log = logging.getLogger(__name__)


class FirstTokenFeatures:
    """The standardised features of each token as a prompt of its own, projected to ``[V, 64]``.

    Attributes:
        directions: ``[F, 64]`` random directions, the same in every run.
        projected: ``[V, 64]``.
    """

    DIRECTIONS = 64
    """Enough directions to distinguish tokens."""
    AT_A_TIME = 1024

    def __init__(self, directions: Tensor, projected: Tensor) -> None:
        self.directions, self.projected = directions, projected

    @classmethod
    def of(cls, measurements: Measurements) -> FirstTokenFeatures:
        """Read them from the cache folder, or compute them once for a model and depth."""
        transformer, probe = measurements.transformer, measurements.probe
        features = transformer.feature_size
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(features, min(cls.DIRECTIONS, features), generator=generator)
        directions = drawn / features**0.5
        described = json.dumps(transformer.description, sort_keys=True)
        std = probe.std[0].cpu().numpy().tobytes()
        key = hashlib.sha256(described.encode() + std).hexdigest()[:24]

        scan = cached_tensor(
            f"first-tokens-{key}",
            lambda: cls._scan(measurements, directions),
            (transformer.embedding.vocabulary_size, directions.shape[1]),
            torch.float32,
        )
        return cls(directions, scan)

    @classmethod
    @torch.no_grad()
    def _scan(cls, measurements: Measurements, directions: Tensor) -> Tensor:
        transformer, probe = measurements.transformer, measurements.probe
        ids = torch.arange(transformer.embedding.vocabulary_size, device=transformer.device)
        directions = directions.to(transformer.device)
        parts = []
        console = Console(stderr=True)
        if not console.is_terminal:
            _log.info("scanning the vocabulary for first tokens, once for this model and depth ...")
        for chunk in track(
            torch.split(ids, cls.AT_A_TIME),
            "scanning first tokens",
            console=console,
            transient=True,
            disable=not console.is_terminal,  # it would leave an empty line in a file
        ):
            features = transformer.features_of(chunk[:, None])
            first = torch.zeros(len(chunk), 1, dtype=torch.long, device=chunk.device)
            parts.append((probe.standardize(features, first)[:, 0] @ directions).cpu())
        return torch.cat(parts)
