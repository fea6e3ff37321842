"""What the probe tells of tokens, and what the linear map makes of it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_inversion.recovery.linear_map import ProbeProposer, _Measured
from lightning_inversion.recovery.measurements import Measurements
from lightning_inversion.recovery.search import PrefixSearch
from lightning_inversion.transformer.embedding import TokenEmbedding
from lightning_inversion.transformer.linear_probe import LinearProbe
from tests.tiny import VOCABULARY


def told(signal: list[float]) -> LinearProbe:
    """A probe whose directions are the axes of the embedding, about a mean of 0."""
    D = len(signal)
    nothing, axes = torch.zeros(2, D), torch.eye(D).expand(2, D, D)
    variances = torch.tensor([signal, signal])
    heard = torch.diag_embed(1 - 1 / variances)
    return LinearProbe(nothing, nothing + 1, axes, nothing, axes, variances, heard)


def scores(probe: LinearProbe, tokens: Tensor, guess: Tensor) -> Tensor:
    return _Measured.of(probe, 1, TokenEmbedding(tokens)).scores(guess[None])[0]


def test_a_token_is_not_blamed_for_what_the_guess_cannot_tell() -> None:
    # The second direction tells nothing (variance of tokens = of errors): the guess is 0 there.
    probe = told([100.0, 1.0])
    tokens = torch.tensor([[10.0, 8.0], [9.0, 0.0], [0.0, 0.0]])
    guess = probe.expected(tokens[0], torch.ones(()))
    torch.testing.assert_close(guess, torch.tensor([9.9, 0.0]))
    # Compared with the guess itself, the second token would be by far the nearest.
    assert (guess - tokens).norm(dim=1).argmin() == 1
    assert scores(probe, tokens, guess).argmax() == 0


def test_scores_are_the_likelihood_of_the_guess() -> None:
    probe = told([9.0, 4.0, 2.0])
    tokens = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)) * 2
    guess = torch.tensor([1.0, -0.5, 0.3])
    heard = 1 - 1 / probe.signal[1]
    # A regression's guess of a token a is heard * a and an error of variance `heard`.
    gaussian = -((guess - heard * tokens).square() / heard).sum(1) / 2
    differences = scores(probe, tokens, guess) - gaussian
    torch.testing.assert_close(differences, differences[:1].expand(6), atol=1e-5, rtol=1e-5)


def test_tokens_need_no_places_where_nearly_all_directions_are_used() -> None:
    tokens = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    probe = told([4.0] * 6)
    shifted = replace(probe, bias=probe.bias + 0.3)
    all_used = _Measured.of(shifted, 1, TokenEmbedding(tokens))
    assert all_used.tokens is None
    places = (tokens - all_used.mean) @ all_used.directions
    columns = torch.cat([places, -all_used.half_squares[:, None]], dim=1)
    placed = replace(all_used, tokens=columns)
    guess = torch.tensor([[0.4, 1.0, -2.0, 0.3, 0.0, -0.5]])
    one, other = all_used.scores(guess)[0], placed.scores(guess)[0]
    torch.testing.assert_close(one - one[0], other - other[0], atol=1e-5, rtol=1e-5)
    assert _Measured.of(told([1e9] * 6), 1, TokenEmbedding(tokens)).tokens is not None


def test_directions_tell_tokens_and_errors_apart(measurements: Measurements) -> None:
    probe = measurements.probe
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(VOCABULARY, (512, 16), generator=generator)
    vectors = measurements.transformer.embedding(ids)[:, 1:].flatten(0, 1)
    features = measurements.transformer.features_of(ids)[:, 1:].flatten(0, 1)
    later = torch.ones(len(vectors), dtype=torch.long)
    errors = (probe(features, later) - vectors) @ probe.directions[1]
    variances = errors.var(0)
    assert 0.5 < float(variances.median()) < 2
    assert (probe.signal[1].diff() <= 1e-4).all()
    missed = probe(features, later) - probe.expected(vectors, later)
    assert float(missed.norm() / (probe(features, later) - vectors).norm()) < 1.05
    # On average over a token's contexts the guess is what is expected of it.
    token = int(ids[0, 3])
    same = ids[:, 1:].flatten() == token
    mean = probe(features[same], later[same]).mean(0)
    expected = probe.expected(measurements.transformer.embedding(torch.tensor(token)), later[0])
    plain = measurements.transformer.embedding(torch.tensor(token))
    assert (mean - expected).norm() < (mean - plain).norm()


def test_another_token_says_nothing_of_a_first_one(measurements: Measurements) -> None:
    ids, row = torch.tensor([[7, 40]]), torch.tensor([0])
    search = PrefixSearch(measurements, measurements.transformer.features_of(ids))
    guess = search.guess(row)
    assert not search.try_out(row, torch.tensor([[9, 10, 11]])).verified.any()
    assert torch.equal(search.guess(row), guess)


def test_no_token_is_ruled_out_by_the_map(measurements: Measurements) -> None:
    ids, row = torch.tensor([[7, 40]]), torch.tensor([0])
    search = PrefixSearch(measurements, measurements.transformer.features_of(ids) * 50)  # far off
    vectors = measurements.transformer.embedding(ids)
    search.prefix.begin(row, vectors, torch.tensor([1]))
    order = ProbeProposer()
    order.begin(search)
    chances = order.scores(search, row).exp()
    torch.testing.assert_close(chances.sum(), torch.tensor(1.0))
    assert float(chances.min()) >= 0.04 / VOCABULARY
