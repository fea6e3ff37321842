"""The tolerance lies between right and wrong, whatever happened to the target."""

from __future__ import annotations

import torch

from lightning_inversion.recovery.calibration import Calibration
from lightning_inversion.recovery.instruments import Instruments


def measure(instruments: Instruments, noise: float) -> Calibration:
    generator = torch.Generator().manual_seed(0)

    def channel(features: torch.Tensor) -> torch.Tensor:
        return features + noise * torch.randn(features.shape, generator=generator)

    return Calibration.measure(instruments.transformer, instruments.readout, channel)


def test_right_and_wrong_are_far_apart(instruments: Instruments) -> None:
    calibration = instruments.calibration
    assert (calibration.right < 1e-4).all()
    assert (calibration.wrong > 1e-2).all()
    assert (calibration.right < calibration.tolerance).all()
    assert (calibration.tolerance < calibration.wrong).all()


def test_noise_moves_the_tolerance_and_then_ends_certainty(instruments: Instruments) -> None:
    little, much = measure(instruments, 1e-3), measure(instruments, 30.0)
    assert (little.right > 10 * instruments.calibration.right).all()
    assert (little.right < little.tolerance).all()
    assert (little.tolerance < little.wrong).all()
    assert much.tolerance.tolist() == [0.0, 0.0]
    assert (much.plausible > much.right).all()


def test_a_residual_does_not_drown_where_one_feature_is_massive(instruments: Instruments) -> None:
    calibration = instruments.calibration
    target = instruments.transformer.features_of(torch.tensor([[5]]))[0, 0]
    massive = target.clone()
    massive[0] = 1e6
    for features in (target, massive):
        moved = features.clone()
        moved[3] += 10 * calibration.scale[0, 3]
        residual = calibration.residual(moved, features, torch.tensor(0))
        torch.testing.assert_close(residual, torch.tensor(10 / len(target) ** 0.5))
