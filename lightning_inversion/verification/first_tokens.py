"""``FirstTokenFeatures``: the features of every token as the first one of a prompt."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from lightning_inversion.verification.measurements import Measurements

_log = logging.getLogger(__name__)
_DIRECTIONS = 64
"""Enough directions to distinguish tokens."""
_AT_A_TIME = 1024


@dataclass(frozen=True)
class FirstTokenFeatures:
    """The standardised features of each token as a prompt of its own, projected to ``[V, 64]``.

    Attributes:
        directions: ``[F, 64]`` random directions, the same in every run, without those that
            residuals leave out.
        projected: ``[V, 64]``.
    """

    directions: Tensor
    projected: Tensor

    @classmethod
    def of(cls, measurements: Measurements) -> FirstTokenFeatures:
        """Read them from the cache folder, or compute them once for a model and depth."""
        probe = measurements.probe
        of = probe.std[0], torch.tensor(probe.largest), measurements.calibration.left_out[0]
        return measurements.kept(cls, lambda: cls._scan(measurements), *of)

    def distances(self, standard: Tensor) -> Tensor:
        """``[N, V]`` of each token's features to standardised ones ``[N, F]``.

        They are right up to the error of the projection; infinite where features overflow.
        """
        distances = torch.cdist(standard @ self.directions, self.projected)
        return distances.nan_to_num(nan=torch.inf)

    @classmethod
    @torch.no_grad()
    def _scan(cls, measurements: Measurements) -> FirstTokenFeatures:
        transformer, probe = measurements.transformer, measurements.probe
        features, generator = transformer.feature_size, torch.Generator().manual_seed(0)
        drawn = torch.randn(features, min(_DIRECTIONS, features), generator=generator)
        directions = (drawn / features**0.5).to(transformer.device)
        left_out = measurements.calibration.left_out[0]
        directions = directions - left_out @ (left_out.T @ directions)
        ids = torch.arange(transformer.embedding.vocabulary_size, device=transformer.device)
        parts = []
        console = Console(stderr=True)
        if not console.is_terminal:
            _log.info("scanning the vocabulary for first tokens, once for this model and depth ...")
        for chunk in track(
            torch.split(ids, _AT_A_TIME),
            "scanning first tokens",
            console=console,
            transient=True,
            disable=not console.is_terminal,  # it would leave an empty line in a file
        ):
            features_of_chunk = transformer.features_of(chunk[:, None])
            first = torch.zeros(len(chunk), 1, dtype=torch.long, device=chunk.device)
            parts.append(probe.standardize(features_of_chunk, first)[:, 0] @ directions)
        return cls(directions, torch.cat(parts))
