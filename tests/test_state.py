"""The record of a batch: what moves, what is held, and what a checkpoint holds."""

from __future__ import annotations

import io

import pytest
import torch

from lightning_inversion.data.batch import PromptBatch
from lightning_inversion.recovery.search import PrefixSearch
from lightning_inversion.state import BatchState
from lightning_inversion.transformer.truncated import TruncatedTransformer
from lightning_inversion.verification.measurements import Measurements

BATCH = PromptBatch.collate([(4, "a", [5, 6, 7]), (9, "b", [8, 9])])


@pytest.fixture
def state() -> BatchState:
    generator = torch.Generator().manual_seed(0)
    return BatchState(BATCH, torch.randn(2, 3, 8, generator=generator), torch.zeros(2, 3, 4))


def test_fixed_positions_and_stopped_rows_return_to_where_they_were(state: BatchState) -> None:
    before = state.values.detach().clone()
    state.fixed[0, 1] = True
    state.stop(torch.tensor([False, True]))
    with torch.no_grad():
        state.values.add_(1.0)
    state.hold(before)
    moved = (state.values != before).any(-1)
    assert moved.tolist() == [[True, False, True], [False, False, False]]


def test_a_position_is_fixed_to_a_value_verified_or_not(state: BatchState) -> None:
    rows, value = torch.tensor([1]), torch.full((1, 8), 3.0)
    state.fix(rows, torch.tensor([0]), value)
    state.fix(torch.tensor([0, 1]), torch.tensor([0, 1]), value.repeat(2, 1), verified=True)
    assert state.fixed.tolist() == [[True, False, False], [True, True, False]]
    assert state.verified.tolist() == [[True, False, False], [False, True, False]]
    assert (state.values[1, :2] == 3).all()
    assert state.prefix_lengths.tolist() == [1, 2]
    state.fixed[0, 2] = True  # after an open position
    assert state.prefix_lengths.tolist() == [1, 2]


def test_only_the_focus_of_rows_that_move_is_compared(state: BatchState) -> None:
    assert torch.equal(state.compared, BATCH.mask)
    state.focus[:, 0] = False
    assert state.compared.tolist() == [[False, True, True], [False, True, False]]
    state.stop(torch.tensor([True, False]))
    assert state.compared.tolist() == [[False] * 3, [False, True, False]]


def test_a_row_stops_once(state: BatchState) -> None:
    state.iteration = 3
    state.stop(torch.tensor([True, False]))
    state.iteration = 5
    state.stop(torch.tensor([True, True]))
    assert state.stopped_at.tolist() == [3, 5]


def test_a_row_that_has_stopped_meets_the_criterion_no_later(state: BatchState) -> None:
    state.iteration = 3
    state.stop(torch.tensor([True, False]))
    state.iteration = 10
    ratio = torch.tensor([0.5, 0.6])
    state.record_ratio(ratio, torch.tensor([True, False]))
    assert state.criterion_met_at.tolist() == [3, -1]
    state.record_ratio(ratio, torch.tensor([True, True]))
    state.iteration = 12
    state.record_ratio(ratio, torch.tensor([True, True]))
    assert state.criterion_met_at.tolist() == [3, 10]
    assert state.ratio.tolist() == ratio.tolist()


def test_no_prompt_is_a_state_too() -> None:
    empty = BatchState.empty()
    assert empty.is_empty
    assert bool(empty.stopped.all())
    assert empty.lengths.tolist() == []


def test_a_checkpoint_holds_all_but_what_can_be_computed(
    state: BatchState, tiny_transformer: TruncatedTransformer
) -> None:
    state.fix(torch.tensor([1]), torch.tensor([0]), torch.ones(1, 8), verified=True)
    state.focus[:, 0] = False
    state.iteration = 7
    state.stop(torch.tensor([True, False]))
    state.record_ratio(torch.tensor([0.5, 2.0]), torch.tensor([True, False]))
    measurements = Measurements.measure(tiny_transformer)
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    state.search = PrefixSearch(measurements, tiny_transformer.features_of(ids))
    state.search.run(torch.tensor([1]), torch.tensor([[30, 31]]))
    file = io.BytesIO()
    torch.save(state.to_checkpoint(), file)
    file.seek(0)
    again = BatchState.from_checkpoint(torch.load(file, weights_only=True), torch.device("cpu"))
    assert again.target is None
    assert again.search is None
    assert (again.batch.index, again.batch.prompts) == (BATCH.index, BATCH.prompts)
    assert torch.equal(again.batch.mask, BATCH.mask)
    assert BATCH.ids is not None
    assert again.batch.ids is not None
    assert torch.equal(again.batch.ids, BATCH.ids)
    for name in ("values", "fixed", "verified", "focus", "stopped_at", "criterion_met_at", "ratio"):
        assert torch.equal(getattr(again, name), getattr(state, name)), name
    for name, stored in state.search.to_checkpoint().items():
        assert torch.equal(again.stored_search[name], stored), name
    # A search that no schedule has taken up yet is kept on.
    assert again.to_checkpoint()["search"].keys() == state.to_checkpoint()["search"].keys()
    assert [name for name, _ in again.named_parameters()] == ["values"]
