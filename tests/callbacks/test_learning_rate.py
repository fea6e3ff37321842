"""The learning rate of each iteration."""

from __future__ import annotations

import pytest

from lightning_inversion.callbacks.learning_rate import LinearLearningRate
from lightning_inversion.errors import InputError


def test_it_goes_from_its_start_to_a_hundredth() -> None:
    learning_rate = LinearLearningRate()
    assert learning_rate.factor(0, 500) == 1
    assert learning_rate.factor(499, 500) == pytest.approx(0.01)
    assert learning_rate.factor(250, 501) == pytest.approx(0.505)
    assert learning_rate.factor(0, 1) == 1
    with pytest.raises(InputError, match=r"learning_rate\.start"):
        LinearLearningRate(start=-1)
