"""The threshold lies between right and wrong, whatever happened to the target."""

from __future__ import annotations

import torch

from lightning_inversion.recovery.calibration import Calibration
from lightning_inversion.recovery.measurements import Measurements


def measure(measurements: Measurements, noise: float) -> Calibration:
    generator = torch.Generator().manual_seed(0)

    def channel(features: torch.Tensor) -> torch.Tensor:
        return features + noise * torch.randn(features.shape, generator=generator)

    return Calibration.measure(measurements.transformer, measurements.probe, channel)


def test_right_and_wrong_are_far_apart(measurements: Measurements) -> None:
    calibration = measurements.calibration
    assert (calibration.right < 1e-4).all()
    assert (calibration.wrong > 1e-2).all()
    assert (calibration.right < calibration.threshold).all()
    assert (calibration.threshold < calibration.wrong).all()


def test_noise_moves_the_tolerance_and_then_ends_certainty(measurements: Measurements) -> None:
    little, much = measure(measurements, 1e-3), measure(measurements, 30.0)
    assert (little.right > 10 * measurements.calibration.right).all()
    assert (little.right < little.threshold).all()
    assert (little.threshold < little.wrong).all()
    assert much.threshold.tolist() == [0.0, 0.0]
    assert (much.plausible > much.right).all()


def test_a_residual_does_not_drown_where_one_feature_is_massive(measurements: Measurements) -> None:
    calibration = measurements.calibration
    target = measurements.transformer.features_of(torch.tensor([[5]]))[0, 0]
    massive = target.clone()
    massive[0] = 1e6
    for features in (target, massive):
        moved = features.clone()
        moved[3] += 10 * calibration.scale[0, 3]
        residual = calibration.residual(moved, features, torch.tensor(0))
        torch.testing.assert_close(residual, torch.tensor(10 / len(target) ** 0.5))
