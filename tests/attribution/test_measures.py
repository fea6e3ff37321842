"""The pure functions against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from lightning_inversion.attribution.config import Reduce, Scalar
from lightning_inversion.attribution.measures import (
    FeatureMeasure,
    TokenMeasure,
    combine,
    reduce_embedding,
    scalar_of,
)

LOGITS = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
TOKENS = torch.tensor([2, 0])


@pytest.mark.parametrize(
    ("scalar", "expected"),
    [
        ("logit", [3.0, 0.0]),
        ("sum_logits", [6.0, 0.0]),
        ("prob", [0.6652, 0.3333]),
        ("logprob", [-0.4076, -1.0986]),
    ],
)
def test_scalars(scalar: Scalar, expected: list[float]) -> None:
    torch.testing.assert_close(
        scalar_of(LOGITS, TOKENS, scalar), torch.tensor(expected), atol=1e-4, rtol=0
    )


def test_the_sum_of_logits_is_not_a_function_of_the_prediction() -> None:
    moved = LOGITS + 7
    torch.testing.assert_close(moved.softmax(-1), LOGITS.softmax(-1))
    assert not torch.equal(
        scalar_of(moved, TOKENS, "sum_logits"), scalar_of(LOGITS, TOKENS, "sum_logits")
    )


@pytest.mark.parametrize(
    ("reduce", "expected"), [("l1", 7.0), ("abs_sum", 1.0), ("l2", 5.0), ("sum", -1.0)]
)
def test_reductions(reduce: Reduce, expected: float) -> None:
    assert float(reduce_embedding(torch.tensor([3.0, -4.0]), reduce)) == pytest.approx(expected)


def test_distances_of_predictions() -> None:
    clean, changed = LOGITS[:1], LOGITS[1:][None]
    query = torch.tensor([0])

    def change(distance: str) -> float:
        return float(TokenMeasure(TOKENS, None, "logprob", distance).change(clean, changed, query))

    assert change("drop") == pytest.approx(-0.4076 + 1.0986, abs=1e-4)
    assert change("l1_logits") == pytest.approx(6.0)
    assert change("l1_probs") == pytest.approx(2 * (0.6652 - 0.3333), abs=1e-3)


def test_contrast_is_the_difference_of_two_scalars() -> None:
    measure = TokenMeasure(TOKENS, torch.tensor([0, 0]), "logprob", "drop")
    # The normaliser cancels: 3 - 1.
    assert float(measure.value(LOGITS[0], torch.tensor(0))) == pytest.approx(2.0)


def test_distances_of_features() -> None:
    clean, changed = torch.tensor([[3.0, 4.0]]), torch.tensor([[[3.0, 9.0]]])
    query = torch.tensor([0])
    measures = [FeatureMeasure(torch.eye(2), d) for d in ("l1_features", "relative_features")]
    assert [float(m.change(clean, changed, query)) for m in measures] == [5.0, 1.0]


def test_combined_takes_each_by_its_largest_and_keeps_what_is_not_visible() -> None:
    occluded = torch.tensor([[-4.0, 2.0, torch.nan], [0.0, 0.0, 0.0]])
    gradient = torch.tensor([[1.0, 10.0, torch.nan], [1.0, 2.0, 0.0]])
    expected = torch.tensor([[0.775, 0.625, torch.nan], [0.125, 0.25, 0.0]])
    torch.testing.assert_close(combine(occluded, gradient, 0.75), expected, equal_nan=True)
