import pytest
import torch

from lightning_inversion import metrics

IDS = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0]])
MASK = torch.tensor([[True, True, True, False], [True, True, False, False]])
DECODED = torch.tensor([[1, 9, 3, 7], [4, 5, 9, 9]])
RANKED = torch.stack([DECODED, torch.tensor([[8, 2, 8, 0], [8, 8, 0, 0]])], dim=-1)


def test_against_counting_by_hand() -> None:
    assert metrics.token_accuracy(DECODED, IDS, MASK).tolist() == pytest.approx([2 / 3, 1])
    assert metrics.exact_match(DECODED, IDS, MASK).tolist() == [False, True]
    assert metrics.top_k_accuracy(RANKED, IDS, MASK).tolist() == pytest.approx([1, 1])
    only_first = metrics.hamming(RANKED[..., :1], IDS, MASK)
    assert only_first.tolist() == pytest.approx([1 / 3, 0])


def test_distance_ratio_ignores_padding() -> None:
    target = torch.zeros(1, 2, 3)
    generated, shifted = target + 1, target + 4
    mask = torch.tensor([[True, False]])
    shifted[0, 1] = 100
    assert metrics.distance_ratio(generated, shifted, target, mask).item() == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("metric", "arguments", "expected"),
    [
        (metrics.TokenAccuracy(), (DECODED, IDS, MASK), (2 / 3 + 1) / 2),
        (metrics.ExactMatch(), (DECODED, IDS, MASK), 0.5),
        (metrics.TopKAccuracy(), (RANKED, IDS, MASK), 1.0),
        (metrics.Hamming(), (RANKED, IDS, MASK), 0.0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_metrics_are_means_over_rows_however_they_are_batched(metric, arguments, expected) -> None:
    metric.update(*arguments)
    assert metric.compute().item() == pytest.approx(expected)
    metric.reset()
    for row in range(2):
        metric.update(*(argument[row, None] for argument in arguments))
    assert metric.compute().item() == pytest.approx(expected)
