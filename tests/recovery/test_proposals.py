"""What orders propose, alone and together."""

from __future__ import annotations

import torch

from lightning_inversion.recovery.gradient_proxy import GradientProxy
from lightning_inversion.recovery.linear_map import ProbeProposer
from lightning_inversion.recovery.measurements import Measurements
from lightning_inversion.recovery.prior import LanguageModelPrior
from lightning_inversion.recovery.proposals import Exhaustive, Mixture, Proposer
from lightning_inversion.recovery.search import PrefixSearch
from lightning_inversion.transformer.language_model import Continuations
from tests.tiny import VOCABULARY

ROWS = torch.arange(2)
IDS = torch.tensor([[7, 40, 3, 250, 9], [12, 7, 88, 41, 230]])


def frontier_at(measurements: Measurements, place: int) -> PrefixSearch:
    search = PrefixSearch(measurements, measurements.transformer.features_of(IDS))
    vectors = measurements.transformer.embedding(IDS)
    search.prefix.begin(ROWS, vectors, torch.full_like(ROWS, place))
    return search


def begun(order: Proposer, measurements: Measurements, place: int) -> PrefixSearch:
    search = frontier_at(measurements, place)
    order.begin(search)
    for position in range(place):
        order.advance(ROWS, IDS[:, position])
    return search


def test_tried_tokens_are_not_proposed_again(measurements: Measurements) -> None:
    order = Exhaustive()
    search = begun(order, measurements, 1)
    first = order.propose(search, ROWS, 5)
    assert first.ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    search.try_out(ROWS, first.ids)
    assert order.propose(search, ROWS, 3).ids.tolist() == [[5, 6, 7]] * 2


def test_a_mixture_names_no_token_twice_and_says_who_named_it(measurements: Measurements) -> None:
    order = Mixture([ProbeProposer(), GradientProxy(steps=1), LanguageModelPrior()])
    search = begun(order, measurements, 2)
    first = order.propose(search, ROWS, 12)
    assert set(first.orders) == {"ProbeProposer+LanguageModelPrior"}
    wrong = torch.where(first.ids == IDS[:, 2:3], (IDS[:, 2:3] + 1) % VOCABULARY, first.ids)
    search.try_out(ROWS, wrong)
    later = order.propose(search, ROWS, 12)
    assert set(later.orders) == {
        "ProbeProposer+GradientProxy+LanguageModelPrior",
        "ProbeProposer", "GradientProxy", "LanguageModelPrior",
    }  # fmt: skip
    for row in range(2):
        assert len(set(first.ids[row].tolist())) == 12
        new = set(later.ids[row].tolist())
        assert len(new) == 12
        assert new.isdisjoint(wrong[row].tolist())


def test_the_prior_is_that_of_the_whole_text(measurements: Measurements) -> None:
    assert measurements.language_model is not None
    expected = measurements.language_model.log_probabilities(IDS)
    continuations = Continuations(measurements.language_model, 2)
    for position in range(4):
        continuations.append(ROWS[:1], IDS[:1, position])
        if position != 1:  # row 0 catches up two tokens at once, row 1 lags behind
            got = continuations.log_probabilities(ROWS[:1])
            torch.testing.assert_close(got[0], expected[0, position], atol=1e-4, rtol=1e-4)
    continuations.append(ROWS[1:], IDS[1:, 0])
    got = continuations.log_probabilities(ROWS)
    torch.testing.assert_close(got[1], expected[1, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[0], expected[0, 3], atol=1e-4, rtol=1e-4)


def test_surprise_keeps_every_token_possible(measurements: Measurements) -> None:
    order = LanguageModelPrior(surprise=0.5)
    search = begun(order, measurements, 2)
    scores = order.scores(search, ROWS)
    assert float(scores.min()) >= -torch.tensor(2.0 * VOCABULARY).log() - 1e-4
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(2))


def test_the_gradient_comes_nearer_to_the_target(measurements: Measurements) -> None:
    order = GradientProxy(steps=10)
    search = begun(order, measurements, 3)
    wrong = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert not search.try_out(ROWS, wrong).verified.any()

    def distance() -> torch.Tensor:
        features = search.prefix.candidates(ROWS, order._proxy[ROWS, :1])[:, 0]
        standard = search.probe.standardize(features, search.positions(ROWS))
        target = search.probe.standardize(search.target_at(ROWS), search.positions(ROWS))
        return 1 - torch.cosine_similarity(standard, target)

    order.scores(search, ROWS)
    before = distance()
    search.rounds[:] = 2
    order.scores(search, ROWS)
    assert (distance() < before).all()


def test_the_corrected_guess_is_nearer_than_the_linear_one(measurements: Measurements) -> None:
    search = frontier_at(measurements, 2)
    right = search.transformer.embedding(IDS[:, 2])
    plain = (search.guess(ROWS) - right).norm(dim=-1)
    others = torch.randint(VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(2))
    others = torch.where(others == IDS[:, 2:3], (others + 1) % VOCABULARY, others)
    assert not search.try_out(ROWS, others).verified.any()
    assert ((search.guess(ROWS) - right).norm(dim=-1) < plain).all()


def test_proxies_start_together_where_candidates_came_close(measurements: Measurements) -> None:
    order = GradientProxy(steps=1, alone=1, proxies=4, learning_rate=1e-6)
    search = begun(order, measurements, 2)
    others = torch.stack([torch.arange(100, 140), torch.arange(20, 60)])
    trial = search.try_out(ROWS, others)
    assert not trial.verified.any()
    places = torch.full_like(others, 2)
    features = search.prefix.candidates(ROWS, search.transformer.embedding(others))
    distances = torch.linalg.vector_norm(
        search.probe.standardize(features, places)
        - search.probe.standardize(search.target_at(ROWS)[:, None], places[:, :1]),
        dim=-1,
    )
    nearest = others.gather(1, distances.topk(2, dim=1, largest=False).indices)
    search.rounds[:] = 2
    order.scores(search, ROWS)
    expected = search.transformer.embedding(nearest)
    torch.testing.assert_close(order._proxy[:, :2], expected, atol=1e-4, rtol=0)
    assert not torch.isclose(order._proxy[:, 2], expected[:, 0], atol=1e-3).all()


def test_before_any_candidate_the_guess_stands_in_for_the_closest(
    measurements: Measurements,
) -> None:
    search = frontier_at(measurements, 2)
    closest = search.closest(ROWS, 3)
    torch.testing.assert_close(closest, search.guess(ROWS)[:, None].expand_as(closest))
