"""The one search: candidates are run, verified, remembered; rows move on and go back."""

from __future__ import annotations

import pytest
import torch

from lightning_inversion.proposers.mixture import MixedProposals
from lightning_inversion.proposers.nearest_to_input import NearestToInput
from lightning_inversion.proposers.probe_proposer import ProbeProposer
from lightning_inversion.recovery.search import PrefixSearch
from lightning_inversion.verification.measurements import Measurements
from tests.tiny import VOCABULARY

ROW, ROWS = torch.tensor([0]), torch.arange(2)
TWO = torch.tensor([[7, 40, 3, 250, 9], [12, 7, 88, 41, 230]])


def search_at(measurements: Measurements, ids: torch.Tensor, position: int) -> PrefixSearch:
    """A search that knows the tokens before ``position``."""
    search = PrefixSearch(measurements, measurements.transformer.features_of(ids))
    rows = torch.arange(len(ids))
    vectors = measurements.transformer.embedding(ids)
    search.prefix.begin(rows, vectors, torch.full_like(rows, position))
    return search


def test_no_wrong_token_is_ever_verified(headless: Measurements) -> None:
    ids = torch.tensor([[3, 4, 5], [9, 8, 7]])
    search = search_at(headless, ids, 1)
    search.tried[0, 4] = True  # the right token of row 0 is withheld
    search.count[0] = 1
    proposals = NearestToInput(search, headless.transformer.embedding(ids))
    (trial,) = search.step(proposals, ROWS, torch.tensor([299, 299]), torch.ones(2))
    assert trial.verified.tolist() == [False, True]
    assert trial.best[1] == 8
    assert (trial.residuals[0].min() > trial.threshold[0]).item()
    assert search.positions(ROWS).tolist() == [1, 2]
    assert trial.tried.tolist() == [300, 299]
    assert trial.proposers == ("NearestToInput",) * 299


def test_candidates_are_never_repeated_and_end_with_the_vocabulary(headless: Measurements) -> None:
    ids = torch.tensor([[3, 4]])
    search = search_at(headless, ids, 1)
    search.target += 1.0  # no token fits
    vectors = headless.transformer.embedding(ids)
    parts = [ProbeProposer().begin(search), NearestToInput(search, vectors)]
    proposals = MixedProposals(search, parts, [0, 0], share_alone=1.0)
    named: set[int] = set()
    for _ in range(5):
        (trial,) = search.step(proposals, ROW, torch.tensor([60]), torch.ones(1))
        assert named.isdisjoint(trial.ids[0].tolist())
        named |= set(trial.ids[0].tolist())
    assert search.tried.all()


def test_positions_are_verified_together_up_to_the_first_wrong_guess(
    headless: Measurements,
) -> None:
    ids = torch.tensor([[3, 4, 5, 6], [9, 8, 7, 6], [1, 2, 3, 4]])
    rows = torch.arange(3)
    search = PrefixSearch(headless, headless.transformer.features_of(ids))
    guesses = torch.stack([ids, ids + 20], dim=2)  # of two candidates the first is right
    guesses[1, 2] = torch.tensor([40, 41])  # neither is
    guesses[2, 1] = guesses[2, 1].flip(0)  # the second is: those after come after a wrong one
    trials = list(search._run(rows, guesses, torch.full((3,), 4)))
    assert [trial.rows.tolist() for trial in trials] == [[0, 1, 2], [0, 1, 2], [0, 1], [0]]
    assert search.positions(rows).tolist() == [4, 2, 2]
    assert [trial.same_forward for trial in trials] == [False, True, True, True]
    known = headless.transformer.embedding(ids)
    for row, length in enumerate([4, 2, 2]):
        assert torch.equal(search.prefix.vectors[row, :length], known[row, :length])
    assert search.tried[1].nonzero()[:, 0].tolist() == [40, 41]
    assert not search.tried[[0, 2]].any()
    assert search.reach.tolist() == [8, 2, 2]
    # The keys and values that were kept are those of the right tokens.
    (trial,) = search.run(rows[1:], ids[1:, 2:3])
    assert trial.verified.all()


@pytest.mark.parametrize(
    ("few", "rows"),
    [(32, [[0, 1], [0, 1], [0], [0]]), (0, [[1], [1], [0], [0], [0], [0]])],
)
def test_prompts_that_end_are_run_with_longer_ones(
    headless: Measurements, monkeypatch: pytest.MonkeyPatch, few: int, rows: list[list[int]]
) -> None:
    monkeypatch.setattr("lightning_inversion.recovery.search._FEW_ROWS", few)
    ids = torch.tensor([[3, 4, 5, 6], [9, 8, 0, 0]])
    one_each, vectors = torch.ones(2).long(), headless.transformer.embedding(ids)
    vectors[1, 2:] = torch.nan  # a fit holds nothing after a prompt's end
    search = PrefixSearch(headless, headless.transformer.features_of(ids))
    search.reach[:] = torch.tensor([3, 64])
    proposals = NearestToInput(search, vectors)
    trials = list(search.step(proposals, ROWS, one_each, torch.tensor([4, 2])))
    assert [trial.rows.tolist() for trial in trials] == rows  # of few, all at one width
    assert search.positions(ROWS).tolist() == [4, 2]
    ids = torch.tensor([[3, 4, 5, 6], [9, 8, 7, 6]])  # the last token is after the second's end
    search = PrefixSearch(headless, headless.transformer.features_of(ids))
    proposals = NearestToInput(search, headless.transformer.embedding(ids))
    trials = list(search.step(proposals, ROWS, one_each, torch.tensor([4, 3])))
    assert [trial.rows.tolist() for trial in trials] == [[0, 1], [0, 1], [0, 1], [0]]
    assert search.positions(ROWS).tolist() == [4, 3]


def test_more_positions_than_the_model_has_room_for_are_halved(
    headless: Measurements, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]])
    search = PrefixSearch(headless, headless.transformer.features_of(ids))
    proposals = NearestToInput(search, headless.transformer.embedding(ids))
    monkeypatch.setattr(search.prefix, "reaches", lambda rows, width, count: width <= 2)
    trials = list(search.step(proposals, ROW, torch.ones(1).long(), ROW + 8))
    assert [trial.same_forward for trial in trials] == [False, True]
    assert search.positions(ROW).tolist() == [2]


def test_each_position_of_several_has_at_least_so_many_candidates(headless: Measurements) -> None:
    ids = torch.tensor([[3, 4, 5, 6]])
    search = PrefixSearch(headless, headless.transformer.features_of(ids))
    proposals = NearestToInput(search, headless.transformer.embedding(ids))
    trials = list(search.step(proposals, ROW, torch.ones(1).long(), ROW + 4, at_least=2))
    assert [trial.ids.shape for trial in trials] == [(1, 2)] * 4
    assert all(trial.verified.all() for trial in trials)


def test_several_positions_in_one_forward_are_those_positions_one_by_one(
    headless: Measurements,
) -> None:
    ids = torch.randint(300, (2, 5), generator=torch.Generator().manual_seed(4))
    others = torch.randint(300, (2, 5), generator=torch.Generator().manual_seed(5))
    search = PrefixSearch(headless, headless.transformer.features_of(ids))
    search.run(ROW, ids[:1, :1])  # the rows stand at different positions
    vectors = headless.transformer.embedding(torch.stack([ids[:, 1:4], others[:, 1:4]], dim=2))
    together = search.prefix.ahead(ROWS, vectors)
    for row, start in enumerate([ids[:1, :1], ids[1:, :0]]):
        for offset in range(3):
            before = torch.cat([start, ids[row : row + 1, 1 : 1 + offset]], dim=1)
            for column, own in enumerate((ids, others)):
                prompt = torch.cat([before, own[row : row + 1, 1 + offset : 2 + offset]], dim=1)
                isolated = headless.transformer.features_of(prompt)[0, -1]
                torch.testing.assert_close(
                    together[row, offset, column], isolated, atol=1e-5, rtol=1e-4
                )


def test_a_search_continues_where_it_was_left(headless: Measurements) -> None:
    ids = torch.tensor([[3, 4]])
    one, other = search_at(headless, ids, 1), search_at(headless, ids, 1)
    for search in (one, other):
        search.target += 1.0  # no token fits
    one.run(ROW, torch.tensor([[20, 21, 22]]))
    other.restore({name: value.clone() for name, value in one.to_checkpoint().items()})
    for search in (one, other):
        search.run(ROW, torch.tensor([[30, 31]]))
    assert torch.equal(one.guess(ROW), other.guess(ROW))
    assert torch.equal(one.tried, other.tried)
    assert one.tried.sum() == 5
    assert one.rounds.tolist() == other.rounds.tolist() == [2]


def test_a_position_that_is_taken_back_begins_anew(headless: Measurements) -> None:
    search = search_at(headless, torch.tensor([[3, 4, 5]]), 1)
    search.run(ROW, torch.tensor([[20, 21]]))
    search.accept(ROW, torch.tensor([20]))  # wrong
    assert not search.run(ROW, torch.tensor([[5]]))[0].verified.any()
    search.take_back(ROW)
    assert search.positions(ROW).tolist() == [1]
    assert not search.tried.any()
    assert search.count.tolist() == search.rounds.tolist() == [0]
    assert search.run(ROW, torch.tensor([[4]]))[0].verified.all()
    assert search.run(ROW, torch.tensor([[5]]))[0].verified.all()


def test_another_token_is_no_evidence_on_a_first_one(measurements: Measurements) -> None:
    ids = torch.tensor([[7, 40]])
    search = PrefixSearch(measurements, measurements.transformer.features_of(ids))
    guess = search.guess(ROW)
    assert not search.run(ROW, torch.tensor([[9, 10, 11]]))[0].verified.any()
    assert torch.equal(search.guess(ROW), guess)


def test_the_corrected_guess_is_nearer_than_the_linear_one(measurements: Measurements) -> None:
    search = search_at(measurements, TWO, 2)
    right = search.transformer.embedding(TWO[:, 2])
    plain = (search.guess(ROWS) - right).norm(dim=-1)
    others = torch.randint(VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(2))
    others = torch.where(others == TWO[:, 2:3], (others + 1) % VOCABULARY, others)
    assert not search.run(ROWS, others)[0].verified.any()
    assert ((search.guess(ROWS) - right).norm(dim=-1) < plain).all()


def test_before_any_candidate_the_guess_stands_in_for_the_closest(
    measurements: Measurements,
) -> None:
    search = search_at(measurements, TWO, 2)
    closest = search.closest(ROWS, 3)
    torch.testing.assert_close(closest, search.guess(ROWS)[:, None].expand_as(closest))
