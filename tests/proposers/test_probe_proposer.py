"""How the probe ranks tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_inversion.proposers.probe_proposer import (
    ProbeProposer,
    ProbeRanking,
    _ProjectedVocabulary,
)
from lightning_inversion.recovery.search import PrefixSearch
from lightning_inversion.transformer.embedding import TokenEmbedding
from lightning_inversion.transformer.linear_probe import LinearProbe
from lightning_inversion.verification.measurements import Measurements
from tests.tiny import VOCABULARY


def probe_of(signal: list[float]) -> LinearProbe:
    """A probe whose directions are the axes of the embedding, about a mean of 0."""
    D = len(signal)
    nothing, axes = torch.zeros(2, D), torch.eye(D).expand(2, D, D)
    variances = torch.tensor([signal, signal])
    heard = torch.diag_embed(1 - 1 / variances)
    return LinearProbe(nothing, nothing + 1, axes, nothing, axes, variances, heard)


def scores(probe: LinearProbe, tokens: Tensor, guess: Tensor) -> Tensor:
    return _ProjectedVocabulary.of(probe, 1, TokenEmbedding(tokens)).scores(guess[None])[0]


def test_a_token_is_not_blamed_for_what_the_guess_cannot_tell() -> None:
    # The second direction has no information (variance of tokens = of errors): the guess is 0.
    probe = probe_of([100.0, 1.0])
    tokens = torch.tensor([[10.0, 8.0], [9.0, 0.0], [0.0, 0.0]])
    guess = probe.expected(tokens[0], torch.ones(()))
    torch.testing.assert_close(guess, torch.tensor([9.9, 0.0]))
    # Compared with the guess itself, the second token would be by far the nearest.
    assert (guess - tokens).norm(dim=1).argmin() == 1
    assert scores(probe, tokens, guess).argmax() == 0


def test_scores_are_the_likelihood_of_the_guess() -> None:
    probe = probe_of([9.0, 4.0, 2.0])
    tokens = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)) * 2
    guess = torch.tensor([1.0, -0.5, 0.3])
    kept = 1 - 1 / probe.signal[1]
    # A regression's guess of a token a is kept * a and an error of variance `kept`.
    gaussian = -((guess - kept * tokens).square() / kept).sum(1) / 2
    differences = scores(probe, tokens, guess) - gaussian
    torch.testing.assert_close(differences, differences[:1].expand(6), atol=1e-5, rtol=1e-5)


def test_tokens_need_no_coordinates_where_nearly_all_directions_are_used() -> None:
    tokens = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    probe = probe_of([4.0] * 6)
    shifted = replace(probe, bias=probe.bias + 0.3)
    all_used = _ProjectedVocabulary.of(shifted, 1, TokenEmbedding(tokens))
    assert all_used.tokens is None
    coordinates = (tokens - all_used.mean) @ all_used.directions
    columns = torch.cat([coordinates, -all_used.half_squares[:, None]], dim=1)
    projected = replace(all_used, tokens=columns)
    guess = torch.tensor([[0.4, 1.0, -2.0, 0.3, 0.0, -0.5]])
    one, other = all_used.scores(guess)[0], projected.scores(guess)[0]
    torch.testing.assert_close(one - one[0], other - other[0], atol=1e-5, rtol=1e-5)
    few = _ProjectedVocabulary.of(probe_of([1e9] * 6), 1, TokenEmbedding(tokens))
    assert few.tokens is not None


def test_no_token_is_ruled_out_by_the_probe(measurements: Measurements) -> None:
    ids, row = torch.tensor([[7, 40]]), torch.tensor([0])
    search = PrefixSearch(measurements, measurements.transformer.features_of(ids) * 50)  # far off
    vectors = measurements.transformer.embedding(ids)
    search.prefix.begin(row, vectors, torch.tensor([1]))
    chances = ProbeProposer().begin(search).scores(row).exp()
    torch.testing.assert_close(chances.sum(), torch.tensor(1.0))
    assert float(chances.min()) >= 0.04 / VOCABULARY


def test_positions_ahead_have_the_tokens_they_have_one_by_one(measurements: Measurements) -> None:
    ids, rows = torch.tensor([[7, 40, 3], [12, 7, 88]]), torch.arange(2)
    search = PrefixSearch(measurements, measurements.transformer.features_of(ids))
    proposals, ranking = ProbeProposer().begin(search), measurements.derived(ProbeRanking)
    ahead = proposals.ahead(rows, 4, 3)
    assert ahead is not None
    assert ahead.ids.shape == (2, 4, 3)
    assert ahead.proposers == ("ProbeProposer",) * 3
    for offset in range(3):
        likelihood = ranking.likelihood(search.linear_guess(rows), search.positions(rows))
        assert torch.equal(ahead.ids[:, offset], likelihood.topk(3).indices)
        assert torch.equal(ahead.ids[:, offset, :1], proposals.propose(rows, 1).ids)
        search.accept(rows, ids[:, offset])
