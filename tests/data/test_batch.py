"""Prompts as rows of one batch."""

from __future__ import annotations

from lightning_inversion.data.batch import PromptBatch


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
