"""A plausible token that nothing can follow gives way to another."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lightning_inversion.recovery import look_back
from lightning_inversion.recovery.look_back import LookBack
from lightning_inversion.recovery.measurements import Measurements
from lightning_inversion.recovery.policy import recovered
from lightning_inversion.recovery.prior import LanguageModelPrior
from lightning_inversion.recovery.proposals import Proposer
from lightning_inversion.recovery.token_recovery import TokenRecovery
from tests.tiny import VOCABULARY


def test_the_token_that_something_came_closest_behind_stays() -> None:
    one = LookBack(1)
    row, many = torch.tensor([0]), torch.tensor([1000])
    one.settle(0, [(5, 0.1), (6, 0.2), (7, 0.3)])
    assert one.doubts(row, many).all()
    assert not one.doubts(row, torch.tensor([10])).any()
    assert one.next(0, nearest=3.0) == 6
    assert one.next(0, nearest=2.0) == 7
    assert one.next(0, nearest=4.0) == 6
    assert one.residual(0, 6) == 0.2
    assert not one.doubts(row, many).any()  # all were tried: recovery goes on
    one.settle(0, [(5, 0.1)])
    assert not one.doubts(row, many).any()


def test_what_follows_decides_between_plausible_tokens(
    measurements: Measurements, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target is blurred so that a wrong token looks best at place 1, as much noise would do."""
    monkeypatch.setattr(look_back, "_ENOUGH", VOCABULARY)
    transformer, calibration = measurements.transformer, measurements.calibration
    ids = torch.tensor([[7, 40, 3, 250, 9]])
    target = transformer.features_of(ids)
    texts = ids.repeat(VOCABULARY, 1)
    texts[:, 1] = torch.arange(VOCABULARY)
    others, place = transformer.features_of(texts)[:, 1], torch.ones(VOCABULARY, dtype=torch.long)
    distances = calibration.residual(others, target[0, 1], place)
    wrong = int(distances.topk(2, largest=False).indices[1])  # the right one's nearest
    target[0, 1] = 0.4 * target[0, 1] + 0.6 * others[wrong]
    distances = calibration.residual(others, target[0, 1], place)
    assert distances.argmin() == wrong
    right = float(distances[40])
    plausible = torch.full_like(calibration.plausible, 1.01 * right)
    blurred = dataclasses.replace(
        measurements, calibration=dataclasses.replace(calibration, plausible=plausible)
    )

    class WrongFirst(Proposer):
        """Both tokens early, so that they are compared."""

        needs_language_model = True

        def __init__(self) -> None:
            self.prior = LanguageModelPrior()

        def begin(self, search):  # type: ignore[no-untyped-def]
            self.prior.begin(search)

        def advance(self, rows, ids):  # type: ignore[no-untyped-def]
            self.prior.advance(rows, ids)

        def take_back(self, rows):  # type: ignore[no-untyped-def]
            self.prior.take_back(rows)

        def scores(self, search, rows):  # type: ignore[no-untyped-def]
            scores = self.prior.scores(search, rows).clone()
            scores[:, [40, wrong]] += 100.0
            return scores

    policy = TokenRecovery(WrongFirst(), candidates=16, most=64)
    (text,) = recovered(policy, blurred, target, [5])
    assert text.ids == ids[0].tolist()
    assert [token.verified for token in text.tokens] == [True, False, True, True, True]
    assert text.tokens[1].alternatives[:2] == (40, wrong)
    assert len(text.tokens) == 5
    assert text.tokens[2].candidates <= VOCABULARY
