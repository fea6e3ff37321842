"""Batches: their padding; they follow from the lengths alone, and part no prompt's repeats."""

import random

import pytest

from lightning_inversion.data.batch import PromptBatch, pack

LENGTHS = [random.Random(3).randint(1, 64) for _ in range(500)]


@pytest.mark.parametrize("tokens", [1, 64, 300, 100_000])
def test_each_row_once_within_the_budget(tokens: int) -> None:
    batches = pack(LENGTHS, tokens)
    assert sorted(row for batch in batches for row in batch) == list(range(len(LENGTHS)))
    for batch in batches:
        size = max(LENGTHS[row] for row in batch) * len(batch)
        assert size <= tokens or len(batch) == 1
        assert batch == sorted(batch)


def test_the_longest_first_and_little_padding() -> None:
    batches = pack(LENGTHS, 1024)
    longest = [max(LENGTHS[row] for row in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    padded = sum(n * len(batch) for n, batch in zip(longest, batches, strict=True))
    assert padded < 1.1 * sum(LENGTHS)


def test_repeats_stay_together_and_rows_are_limited() -> None:
    lengths = [length for length in LENGTHS[:50] for _ in range(3)]
    for batch in pack(lengths, 200, together=3):
        assert all(
            batch[start : start + 3] == [batch[start] + n for n in range(3)]
            for start in range(0, len(batch), 3)
        )
    assert max(map(len, pack(LENGTHS, 10_000, rows=7))) == 7
    assert pack([2] * 5, 100, rows=2, together=5) == [[0, 1], [2, 3], [4]]


def test_a_ragged_batch_is_padded_on_the_right() -> None:
    batch = PromptBatch.collate([(4, "a", [1, 2, 3]), (9, "b", [7])])
    assert batch.ids is not None
    assert batch.ids.tolist() == [[1, 2, 3], [7, 0, 0]]
    assert batch.mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.lengths == [3, 1]
    assert batch.index == (4, 9)


def test_a_half_has_no_padding_that_it_does_not_need() -> None:
    first, second = PromptBatch.collate([(4, "a", [1, 2, 3]), (9, "b", [7])]).halves()
    assert (first.index, second.index) == ((4,), (9,))
    assert second.ids is not None
    assert second.ids.tolist() == [[7]]
    assert PromptBatch.from_checkpoint(first.to_checkpoint()).prompts == ("a",)
