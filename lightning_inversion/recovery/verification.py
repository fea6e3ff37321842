"""Proof by running: tokens whose features reproduce the target's."""

from dataclasses import dataclass

import torch
from lightning_inversion.recovery.measurements import Measurements
from torch import Tensor


@dataclass(frozen=True)
class Verdict:
    """What running a text has shown.

    Attributes:
        verified: ``[B, T]`` bool; True where the token and, in a causal model, all before it
            reproduce the target.
        residuals: ``[B, T]`` of each position, see ``Calibration``.
        thresholds: ``[B, T]`` the residual up to which a position counts as reproduced.
    """

    verified: Tensor
    residuals: Tensor
    thresholds: Tensor


def verify_text(
    features: Tensor, target: Tensor, mask: Tensor, measurements: Measurements
) -> Verdict:
    """Judge decoded tokens by their features.

    Args:
        features: ``[B, T, F]`` of the decoded tokens.
        target: ``[B, T, F]``.
        mask: ``[B, T]`` True at a token.
        measurements: of the transformer that made both.
    """
    calibration = measurements.calibration
    positions = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    residuals = calibration.residual(features, target, positions)
    thresholds = calibration.threshold[positions.clamp(max=1)]
    reproduced = (residuals <= thresholds) | ~mask
    if measurements.transformer.causal:
        reproduced = reproduced.cummin(dim=1).values
    else:
        reproduced = reproduced.all(dim=1, keepdim=True).expand_as(mask)
    return Verdict(reproduced & mask, residuals, thresholds)
