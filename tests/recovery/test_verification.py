"""The threshold lies between right and wrong, whatever happened to the target; or at 0."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lightning_inversion.recovery import verification
from lightning_inversion.recovery.calibration import Calibration
from lightning_inversion.recovery.measurements import Measurements
from lightning_inversion.recovery.search import PrefixSearch
from lightning_inversion.recovery.verification import verify
from lightning_inversion.transformer.surgery import Surgery
from lightning_inversion.transformer.truncated import TruncatedTransformer
from tests.tiny import shared_tiny_model


def calibrate(measurements: Measurements, noise: float) -> Calibration:
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
    assert calibration.verifies


def test_noise_moves_the_threshold_and_then_prevents_verification(
    measurements: Measurements,
) -> None:
    little, much = calibrate(measurements, 1e-3), calibrate(measurements, 30.0)
    assert (little.right > 10 * measurements.calibration.right).all()
    assert (little.right < little.threshold).all()
    assert (little.threshold < little.wrong).all()
    assert much.threshold.tolist() == [0.0, 0.0]
    assert (much.plausible > much.right).all()
    assert little.verifies
    assert not much.verifies


def test_a_residual_does_not_drown_where_one_feature_is_massive(measurements: Measurements) -> None:
    calibration = measurements.calibration
    target = measurements.transformer.features_of(torch.tensor([[5]]))[0, 0]
    massive = target.clone()
    massive[0] = 1e6
    for features in (target, massive):
        moved = features.clone()
        moved[3] += 10 * calibration.std[0, 3]
        residual = calibration.residual(moved, features, torch.tensor(0))
        torch.testing.assert_close(residual, torch.tensor(10 / len(target) ** 0.5))


def test_a_residual_is_reproduced_up_to_the_threshold_and_never_at_a_threshold_of_0() -> None:
    nothing = torch.zeros(2)
    calibration = Calibration(torch.ones(2, 4), torch.tensor([0.0, 0.5]), nothing, nothing, nothing)
    residuals = torch.tensor([0.0, 0.1, 0.5, 0.6, torch.nan])
    first, later = torch.zeros(5, dtype=torch.long), torch.full((5,), 7)
    assert calibration.reproduced(residuals, first).tolist() == [False] * 5
    assert calibration.reproduced(residuals, later).tolist() == [True, True, True, False, False]
    assert not calibration.verifies


def test_where_every_wrong_candidate_is_a_duplicate_nothing_is_verified(
    headless: Measurements, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        verification, "_right_and_wrong", lambda _, right, seed: right[:, None].repeat(1, 5)
    )
    calibration = Calibration.measure(headless.transformer, headless.probe)
    assert calibration.wrong.isinf().all()
    assert calibration.threshold.tolist() == [0.0, 0.0]
    assert not calibration.verifies
    blind = dataclasses.replace(headless, calibration=calibration)
    ids = torch.tensor([[3, 4, 5], [9, 8, 7]])
    target = headless.transformer.features_of(ids)
    verdict = verify(target, target, torch.ones_like(ids, dtype=torch.bool), blind)
    assert not verdict.residuals.any()
    assert not verdict.verified.any()
    trial = PrefixSearch(blind, target).run(torch.arange(2), ids[:, :1])
    assert not trial.verified.any()


def test_a_token_is_verified_only_behind_a_verified_prefix(headless: Measurements) -> None:
    transformer = headless.transformer
    ids = torch.tensor([[3, 4, 5, 6]])
    mask = torch.tensor([[True, True, True, True]])
    target = transformer.features_of(ids)
    wrong = transformer.features_of(torch.tensor([[3, 9, 5, 6]]))
    verdict = verify(wrong, target, mask, headless)
    assert verdict.verified.tolist() == [[True, False, False, False]]
    right = verify(transformer.features_of(ids), target, mask, headless)
    assert right.verified.all()
    assert right.residuals.max() < 1e-5


def test_the_padding_is_neither_verified_nor_in_the_way(headless: Measurements) -> None:
    ids, mask = torch.tensor([[3, 4, 5]]), torch.tensor([[True, True, False]])
    target = headless.transformer.features_of(ids)
    far = target.clone()
    far[0, 2] += 100.0
    assert verify(far, target, mask, headless).verified.tolist() == [[True, True, False]]


def test_where_tokens_see_what_follows_all_are_verified_or_none() -> None:
    model = shared_tiny_model("llama")
    transformer = TruncatedTransformer.from_model(model, depth=2, surgery=Surgery(causal=False))
    measurements = Measurements.measure(transformer)
    assert (measurements.calibration.threshold > 0).all()
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 6]])
    target = transformer.features_of(ids)
    ids[1, 2] = 9
    mask = torch.ones_like(ids, dtype=torch.bool)
    verdict = verify(transformer.features_of(ids), target, mask, measurements)
    assert verdict.verified.tolist() == [[True] * 4, [False] * 4]


def test_what_is_derived_from_measurements_is_computed_once(headless: Measurements) -> None:
    class Derived:
        count = 0

        @classmethod
        def of(cls, measurements: Measurements) -> Derived:
            assert measurements is headless
            cls.count += 1
            return cls()

    assert headless.derived(Derived) is headless.derived(Derived)
    assert Derived.count == 1
