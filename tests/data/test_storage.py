"""What happens to features between the model and the file, in its order."""

from __future__ import annotations

import torch

from lightning_inversion.data.storage import Storage

FEATURES = torch.tensor([[3.0, -0.1, 0.2, -4.0], [0.5, 0.1, 6.0, -0.4]])


def drawn(storage: Storage) -> torch.Tensor:
    return storage(FEATURES, torch.Generator().manual_seed(0))


def test_in_a_few_words() -> None:
    assert Storage().summary is None
    assert Storage("bfloat16").summary == "bfloat16"
    assert Storage("float16", 0.5, "laplace", scale=2.0, largest=0.25).summary == (
        "largest 0.25, laplace noise 0.5, times 2, float16"
    )


def test_the_largest_of_each_position_are_kept() -> None:
    expected = torch.tensor([[3.0, 0.0, 0.0, -4.0], [0.5, 0.0, 6.0, 0.0]])
    assert torch.equal(drawn(Storage(largest=0.5)), expected)
    assert torch.equal(drawn(Storage(largest=0.26)), expected)  # 1.04 features: 2
    assert torch.equal(Storage(largest=0.5, noise=1.0).without_noise(FEATURES), expected)


def test_noise_is_added_to_those_that_are_kept() -> None:
    whole, sparse = drawn(Storage(noise=9.0)), drawn(Storage(noise=9.0, largest=0.5))
    kept = Storage(largest=0.5)(FEATURES) != 0
    assert torch.equal(sparse, whole.where(kept, 0))


def test_a_factor_and_rounding_come_last() -> None:
    storage = Storage("bfloat16", noise=0.5, noise_kind="laplace", scale=2.0, largest=0.5)
    before = drawn(Storage(noise=0.5, noise_kind="laplace", largest=0.5))
    assert torch.equal(drawn(storage), (2 * before).bfloat16().float() / 2)
