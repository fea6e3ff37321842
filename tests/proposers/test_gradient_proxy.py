"""Proxies descend towards the target, start again, and move only in a new round."""

from __future__ import annotations

import torch

from lightning_inversion.proposers.gradient_proxy import DescendingProxies, GradientProxy
from lightning_inversion.recovery.search import PrefixSearch
from lightning_inversion.verification.measurements import Measurements

ROWS = torch.arange(2)
IDS = torch.tensor([[7, 40, 3, 250, 9], [12, 7, 88, 41, 230]])


def begun(
    settings: GradientProxy, measurements: Measurements, position: int
) -> tuple[PrefixSearch, DescendingProxies]:
    search = PrefixSearch(measurements, measurements.transformer.features_of(IDS))
    vectors = measurements.transformer.embedding(IDS)
    search.prefix.begin(ROWS, vectors, torch.full_like(ROWS, position))
    proposals = settings.begin(search)
    assert isinstance(proposals, DescendingProxies)
    return search, proposals


def test_the_gradient_comes_nearer_to_the_target(measurements: Measurements) -> None:
    search, proposals = begun(GradientProxy(waits=1, steps=10), measurements, 3)
    assert not search.run(ROWS, torch.tensor([[1, 2, 3], [4, 5, 6]]))[0].verified.any()

    def distance() -> torch.Tensor:
        features = search.prefix.candidates(ROWS, proposals.proxies[ROWS, :1])[:, 0]
        standard = search.probe.standardize(features, search.positions(ROWS))
        target = search.probe.standardize(search.target_at(ROWS), search.positions(ROWS))
        return 1 - torch.cosine_similarity(standard, target)

    proposals.update(ROWS)
    before = distance()
    search.rounds[:] = 2
    proposals.update(ROWS)
    assert (distance() < before).all()


def test_proxies_start_together_where_candidates_came_close(measurements: Measurements) -> None:
    settings = GradientProxy(waits=1, steps=1, rounds_alone=1, proxies=4, learning_rate=1e-6)
    search, proposals = begun(settings, measurements, 2)
    others = torch.stack([torch.arange(100, 140), torch.arange(20, 60)])
    assert not search.run(ROWS, others)[0].verified.any()
    positions = torch.full_like(others, 2)
    features = search.prefix.candidates(ROWS, search.transformer.embedding(others))
    distances = torch.linalg.vector_norm(
        search.probe.standardize(features, positions)
        - search.probe.standardize(search.target_at(ROWS)[:, None], positions[:, :1]),
        dim=-1,
    )
    nearest = others.gather(1, distances.topk(2, dim=1, largest=False).indices)
    search.rounds[:] = 2
    proposals.update(ROWS)
    expected = search.transformer.embedding(nearest)
    torch.testing.assert_close(proposals.proxies[:, :2], expected, atol=1e-4, rtol=0)
    assert not torch.isclose(proposals.proxies[:, 2], expected[:, 0], atol=1e-3).all()


def test_to_be_asked_for_scores_moves_no_proxy(measurements: Measurements) -> None:
    search, proposals = begun(GradientProxy(waits=1, rounds_alone=1, proxies=3), measurements, 2)
    for number in range(3):
        assert not search.run(ROWS, torch.full((2, 1), 200 + number))[0].verified.any()
        proposals.update(ROWS)
        proxies = proposals.proxies.clone()
        assert torch.equal(proposals.scores(ROWS), proposals.scores(ROWS))
        assert torch.equal(proposals.proxies, proxies)
    proposals.update(ROWS)
    assert not torch.equal(proposals.proxies, proxies)


def test_one_rows_round_leaves_the_other_row_where_it_is(measurements: Measurements) -> None:
    search, proposals = begun(GradientProxy(), measurements, 2)
    assert not search.run(ROWS, torch.tensor([[1], [4]]))[0].verified.any()
    proposals.update(ROWS)
    before = proposals.proxies.clone()
    proposals.update(ROWS[:1])
    assert not torch.equal(proposals.proxies[0], before[0])
    assert torch.equal(proposals.proxies[1], before[1])
