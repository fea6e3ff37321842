"""Distances by hand, rows that are independent, padding that does not count."""

import pytest
import torch

from lightning_inversion.errors import InputError
from lightning_inversion.objectives import (
    L1,
    L2,
    CosineDistance,
    Narrowed,
    Objective,
    Standardized,
    WeightedSum,
)

MASK = torch.ones(4, 3, dtype=torch.bool)
EVERY = [
    L1(),
    L1(relative=True),
    L2(),
    L2(relative=True),
    CosineDistance(),
    CosineDistance(each_position=True),
    CosineDistance(absolute=True),
    WeightedSum(alpha=0.5, beta=2.0),
]


def features(rows: int = 3, length: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, length, 5, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("objective", EVERY, ids=lambda o: type(o).__name__)
def test_rows_are_independent(objective: Objective) -> None:
    generated, target = features(seed=1), features(seed=2)
    mask = torch.ones(3, 4, dtype=torch.bool)
    together = objective(generated, target, mask)
    alone = torch.cat([objective(generated[i, None], target[i, None], mask[:1]) for i in range(3)])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("objective", EVERY, ids=lambda o: type(o).__name__)
def test_padding_changes_neither_value_nor_gradient(objective: Objective) -> None:
    generated, target = features(seed=1), features(seed=2)
    short = generated[:, :2].clone().requires_grad_()
    long = generated.clone().requires_grad_()
    mask = torch.tensor([[True, True, False, False]]).expand(3, -1)
    padded = objective(long, target, mask)
    plain = objective(short, target[:, :2], mask[:, :2])
    torch.testing.assert_close(padded, plain)
    padded.sum().backward()
    plain.sum().backward()
    assert long.grad is not None
    assert short.grad is not None
    torch.testing.assert_close(long.grad[:, :2], short.grad)
    assert not long.grad[:, 2:].any()


@pytest.mark.parametrize("objective", EVERY, ids=lambda o: type(o).__name__)
def test_zero_at_the_target_with_a_finite_gradient(objective: Objective) -> None:
    target = features()
    generated = target.clone().requires_grad_()
    distance = objective(generated, target, torch.ones(3, 4, dtype=torch.bool))
    torch.testing.assert_close(distance, torch.zeros(3), atol=1e-5, rtol=0)
    distance.sum().backward()
    assert generated.grad is not None
    assert generated.grad.isfinite().all()


def test_values_by_hand() -> None:
    generated = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    target = torch.tensor([[[0.0, 0.0], [0.0, 1.0]]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert L1()(generated, target, mask).item() == pytest.approx(8)
    assert L2()(generated, target, mask).item() == pytest.approx(26**0.5)
    second = torch.tensor([[False, True]])
    assert L1(relative=True)(generated, target, second).item() == pytest.approx(1)
    opposite = CosineDistance()(-target, target, mask)
    assert opposite.item() == pytest.approx(2)
    assert CosineDistance(absolute=True)(-target, target, mask).item() == pytest.approx(0)
    combined = WeightedSum(alpha=3, beta=0.5)(generated, target, mask)
    expected = 3 * CosineDistance()(generated, target, mask) + 0.5 * 8
    torch.testing.assert_close(combined, expected)


def test_weights_are_checked() -> None:
    with pytest.raises(InputError, match=r"objective\.alpha"):
        WeightedSum(alpha=-1)


@pytest.mark.parametrize("objective", [L1(), L2(), CosineDistance(), L2(relative=True)])
def test_narrowed_is_the_objective_of_the_sliced_features(objective) -> None:
    generated, target = torch.randn(2, 4, 3, 10).unbind()
    found = Narrowed(["0:4", "2:9"], objective)(generated, target, MASK)
    for row, inside in enumerate([slice(0, 4), slice(2, 9)] * 2):
        alone = objective(
            generated[row : row + 1, :, inside], target[row : row + 1, :, inside], MASK[:1]
        )
        torch.testing.assert_close(found[row], alone[0])


def test_narrowed_gives_no_gradient_outside_its_range() -> None:
    generated = torch.randn(2, 3, 10, requires_grad=True)
    Narrowed(["0:4", "2:9"])(generated, torch.randn(2, 3, 10), MASK[:2]).sum().backward()
    assert generated.grad is not None
    assert not generated.grad[0, :, 4:].any()
    assert not generated.grad[1, :, :2].any()


def test_narrowed_refuses_what_does_not_fit() -> None:
    with pytest.raises(InputError, match="at least one slice"):
        Narrowed([])
    with pytest.raises(InputError, match=r"objective\.ranges: '7' is not a slice"):
        Narrowed(["7"])
    with pytest.raises(InputError, match=r"Standardized\.objective"):
        Narrowed(["0:4"], Standardized())
    with pytest.raises(InputError, match=r"--data\.repeat 3"):
        Narrowed(["0:4"] * 3)(torch.ones(4, 3, 10), torch.ones(4, 3, 10), MASK)
