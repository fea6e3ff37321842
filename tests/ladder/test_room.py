"""The room beside a token, and what is read without a part of it."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from lightning_inversion.ladder.room import room_numbers, room_of

PROMPTS, LENGTH = 250, 8


def at_angle(true: torch.Tensor, cosine: float, generator: torch.Generator) -> torch.Tensor:
    """Vectors of a cosine with others ``[..., D]``, in random directions, of random lengths."""
    unit = normalize(true, dim=-1)
    across = torch.randn(true.shape, generator=generator)
    across = normalize(across - (across * unit).sum(-1, keepdim=True) * unit, dim=-1)
    length = 0.1 + 9 * torch.rand((*true.shape[:-1], 1), generator=generator)
    return length * (cosine * unit + math.sqrt(1 - cosine**2) * across)


@pytest.mark.parametrize(("width", "near", "cosine"), [(64, 0.8, 0.3), (256, 0.8, 0.15),
                                                       (64, 0.0, 0.1)])  # fmt: skip
def test_room_tells_how_often_a_random_error_is_read_right(
    width: int, near: float, cosine: float
) -> None:
    """Of two tokens the right one is read as often as a normal variable is above -room."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.zeros(2, width)
    matrix[0, 0], matrix[1, 0], matrix[1, 1] = 1, 3 * near, 3 * math.sqrt(1 - near**2)
    ids = torch.zeros(PROMPTS, LENGTH, dtype=torch.long)
    values = at_angle(matrix[ids], cosine, generator)
    room = float(room_of(torch.tensor(cosine), torch.tensor(near), width))
    expected = 0.5 * (1 + math.erf(room / math.sqrt(2)))
    numbers = room_numbers(values, ids, matrix)
    assert numbers["room"] == pytest.approx(room, rel=1e-3, abs=1e-3)
    assert 0.6 < expected < 0.98
    assert numbers["by_direction"] == pytest.approx(expected, abs=0.03)
    assert numbers["random_error"] == pytest.approx(expected, abs=0.03)


def test_true_inputs_are_read_whatever_is_taken_away() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(100, 96, generator=generator)
    ids = torch.randint(100, (5, LENGTH), generator=generator)
    numbers = room_numbers(2 * matrix[ids], ids, matrix)
    for name in ("by_direction", "in_64", "far_apart", "as_few", "random_error"):
        assert numbers[name] == 1
    assert numbers["direction"] == pytest.approx(1)


def test_crowded_tokens_are_read_when_their_neighbours_are_left_out_and_narrow_ones_less() -> None:
    """Each token has a neighbour of cosine 0.9; as many others left out do not help."""
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(50, 256, generator=generator)
    matrix = torch.cat([own, at_angle(own, 0.9, generator)])
    ids = torch.randint(50, (PROMPTS, LENGTH), generator=generator)
    numbers = room_numbers(at_angle(matrix[ids], 0.35, generator), ids, matrix)
    assert numbers["nearest_direction"] == pytest.approx(0.9, abs=1e-3)
    assert numbers["by_direction"] < 0.95
    assert numbers["far_apart"] > numbers["by_direction"] + 0.05
    assert numbers["as_few"] == pytest.approx(numbers["by_direction"], abs=0.03)
    assert numbers["in_64"] < numbers["by_direction"] - 0.2
