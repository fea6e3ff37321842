"""What orders propose, alone and together."""

from __future__ import annotations

import torch

from lightning_inversion.recovery.gradient_proxy import GradientProxy
from lightning_inversion.recovery.instruments import Instruments
from lightning_inversion.recovery.linear_map import LinearMap
from lightning_inversion.recovery.prior import LanguageModelPrior
from lightning_inversion.recovery.proposals import CandidateOrder, Exhaustive, Mixture
from lightning_inversion.recovery.search import Frontier
from lightning_inversion.transformer.language_model import Continuations
from tests.tiny import VOCABULARY

ROWS = torch.arange(2)
IDS = torch.tensor([[7, 40, 3, 250, 9], [12, 7, 88, 41, 230]])


def frontier_at(instruments: Instruments, place: int) -> Frontier:
    frontier = Frontier(instruments, instruments.transformer.features_of(IDS))
    vectors = instruments.transformer.embedding(IDS)
    frontier.prefix.begin(ROWS, vectors, torch.full_like(ROWS, place))
    return frontier


def begun(order: CandidateOrder, instruments: Instruments, place: int) -> Frontier:
    frontier = frontier_at(instruments, place)
    order.begin(frontier)
    for position in range(place):
        order.advance(ROWS, IDS[:, position])
    return frontier


def test_tried_tokens_are_not_proposed_again(instruments: Instruments) -> None:
    order = Exhaustive()
    frontier = begun(order, instruments, 1)
    first = order.propose(frontier, ROWS, 5)
    assert first.ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    frontier.try_out(ROWS, first.ids)
    assert order.propose(frontier, ROWS, 3).ids.tolist() == [[5, 6, 7]] * 2


def test_a_mixture_names_no_token_twice_and_says_who_named_it(instruments: Instruments) -> None:
    order = Mixture([LinearMap(), GradientProxy(steps=1), LanguageModelPrior()])
    frontier = begun(order, instruments, 2)
    first = order.propose(frontier, ROWS, 12)
    assert set(first.orders) == {"LinearMap+LanguageModelPrior"}
    wrong = torch.where(first.ids == IDS[:, 2:3], (IDS[:, 2:3] + 1) % VOCABULARY, first.ids)
    frontier.try_out(ROWS, wrong)
    later = order.propose(frontier, ROWS, 12)
    assert set(later.orders) == {
        "LinearMap+GradientProxy+LanguageModelPrior",
        "LinearMap", "GradientProxy", "LanguageModelPrior",
    }  # fmt: skip
    for row in range(2):
        assert len(set(first.ids[row].tolist())) == 12
        new = set(later.ids[row].tolist())
        assert len(new) == 12
        assert new.isdisjoint(wrong[row].tolist())


def test_the_prior_is_that_of_the_whole_text(instruments: Instruments) -> None:
    assert instruments.language_model is not None
    expected = instruments.language_model.log_probabilities(IDS)
    continuations = Continuations(instruments.language_model, 2)
    for position in range(4):
        continuations.append(ROWS[:1], IDS[:1, position])
        if position != 1:  # row 0 catches up two tokens at once, row 1 lags behind
            got = continuations.log_probabilities(ROWS[:1])
            torch.testing.assert_close(got[0], expected[0, position], atol=1e-4, rtol=1e-4)
    continuations.append(ROWS[1:], IDS[1:, 0])
    got = continuations.log_probabilities(ROWS)
    torch.testing.assert_close(got[1], expected[1, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[0], expected[0, 3], atol=1e-4, rtol=1e-4)


def test_surprise_keeps_every_token_possible(instruments: Instruments) -> None:
    order = LanguageModelPrior(surprise=0.5)
    frontier = begun(order, instruments, 2)
    scores = order.scores(frontier, ROWS)
    assert float(scores.min()) >= -torch.tensor(2.0 * VOCABULARY).log() - 1e-4
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(2))


def test_the_gradient_comes_nearer_to_the_target(instruments: Instruments) -> None:
    order = GradientProxy(steps=10)
    frontier = begun(order, instruments, 3)
    wrong = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert not frontier.try_out(ROWS, wrong).certified.any()

    def distance() -> torch.Tensor:
        features = frontier.prefix.candidates(ROWS, order._proxy[ROWS, :1])[:, 0]
        standard = frontier.readout.standardize(features, frontier.positions(ROWS))
        target = frontier.readout.standardize(frontier.target_at(ROWS), frontier.positions(ROWS))
        return 1 - torch.cosine_similarity(standard, target)

    order.scores(frontier, ROWS)
    before = distance()
    frontier.rounds[:] = 2
    order.scores(frontier, ROWS)
    assert (distance() < before).all()


def test_the_corrected_guess_is_nearer_than_the_linear_one(instruments: Instruments) -> None:
    frontier = frontier_at(instruments, 2)
    right = frontier.transformer.embedding(IDS[:, 2])
    plain = (frontier.guess(ROWS) - right).norm(dim=-1)
    others = torch.randint(VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(2))
    others = torch.where(others == IDS[:, 2:3], (others + 1) % VOCABULARY, others)
    assert not frontier.try_out(ROWS, others).certified.any()
    assert ((frontier.guess(ROWS) - right).norm(dim=-1) < plain).all()


def test_proxies_start_together_where_candidates_came_close(instruments: Instruments) -> None:
    order = GradientProxy(steps=1, alone=1, proxies=4, learning_rate=1e-6)
    frontier = begun(order, instruments, 2)
    others = torch.stack([torch.arange(100, 140), torch.arange(20, 60)])
    trial = frontier.try_out(ROWS, others)
    assert not trial.certified.any()
    places = torch.full_like(others, 2)
    features = frontier.prefix.candidates(ROWS, frontier.transformer.embedding(others))
    distances = torch.linalg.vector_norm(
        frontier.readout.standardize(features, places)
        - frontier.readout.standardize(frontier.target_at(ROWS)[:, None], places[:, :1]),
        dim=-1,
    )
    nearest = others.gather(1, distances.topk(2, dim=1, largest=False).indices)
    frontier.rounds[:] = 2
    order.scores(frontier, ROWS)
    expected = frontier.transformer.embedding(nearest)
    torch.testing.assert_close(order._proxy[:, :2], expected, atol=1e-4, rtol=0)
    assert not torch.isclose(order._proxy[:, 2], expected[:, 0], atol=1e-3).all()


def test_before_any_candidate_the_guess_stands_in_for_the_closest(instruments: Instruments) -> None:
    frontier = frontier_at(instruments, 2)
    closest = frontier.closest(ROWS, 3)
    torch.testing.assert_close(closest, frontier.guess(ROWS)[:, None].expand_as(closest))
