"""What the readout tells of tokens, and what the linear map makes of it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_inversion.recovery.instruments import Instruments
from lightning_inversion.recovery.linear_map import LinearMap, _Measured
from lightning_inversion.recovery.search import Frontier
from lightning_inversion.transformer.embedding import TokenEmbedding
from lightning_inversion.transformer.linear_probe import Readout
from tests.tiny import VOCABULARY


def told(signal: list[float]) -> Readout:
    """A readout whose directions are the axes of the embedding, about a mean of 0."""
    D = len(signal)
    nothing, axes = torch.zeros(2, D), torch.eye(D).expand(2, D, D)
    variances = torch.tensor([signal, signal])
    heard = torch.diag_embed(1 - 1 / variances)
    return Readout(nothing, nothing + 1, axes, nothing, axes, variances, heard)


def scores(readout: Readout, tokens: Tensor, guess: Tensor) -> Tensor:
    return _Measured.of(readout, 1, TokenEmbedding(tokens)).scores(guess[None])[0]


def test_a_token_is_not_blamed_for_what_the_guess_cannot_tell() -> None:
    # The second direction tells nothing (variance of tokens = of errors): the guess is 0 there.
    readout = told([100.0, 1.0])
    tokens = torch.tensor([[10.0, 8.0], [9.0, 0.0], [0.0, 0.0]])
    guess = readout.expected(tokens[0], torch.ones(()))
    torch.testing.assert_close(guess, torch.tensor([9.9, 0.0]))
    # Compared with the guess itself, the second token would be by far the nearest.
    assert (guess - tokens).norm(dim=1).argmin() == 1
    assert scores(readout, tokens, guess).argmax() == 0


def test_scores_are_the_likelihood_of_the_guess() -> None:
    readout = told([9.0, 4.0, 2.0])
    tokens = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)) * 2
    guess = torch.tensor([1.0, -0.5, 0.3])
    heard = 1 - 1 / readout.signal[1]
    # A regression's guess of a token a is heard * a and an error of variance `heard`.
    gaussian = -((guess - heard * tokens).square() / heard).sum(1) / 2
    differences = scores(readout, tokens, guess) - gaussian
    torch.testing.assert_close(differences, differences[:1].expand(6), atol=1e-5, rtol=1e-5)


def test_tokens_need_no_places_where_nearly_all_directions_are_used() -> None:
    tokens = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    readout = told([4.0] * 6)
    shifted = replace(readout, bias=readout.bias + 0.3)
    all_used = _Measured.of(shifted, 1, TokenEmbedding(tokens))
    assert all_used.tokens is None
    places = (tokens - all_used.mean) @ all_used.directions
    columns = torch.cat([places, -all_used.half_squares[:, None]], dim=1)
    placed = replace(all_used, tokens=columns)
    guess = torch.tensor([[0.4, 1.0, -2.0, 0.3, 0.0, -0.5]])
    one, other = all_used.scores(guess)[0], placed.scores(guess)[0]
    torch.testing.assert_close(one - one[0], other - other[0], atol=1e-5, rtol=1e-5)
    assert _Measured.of(told([1e9] * 6), 1, TokenEmbedding(tokens)).tokens is not None


def test_directions_tell_tokens_and_errors_apart(instruments: Instruments) -> None:
    readout = instruments.readout
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(VOCABULARY, (512, 16), generator=generator)
    vectors = instruments.transformer.embedding(ids)[:, 1:].flatten(0, 1)
    features = instruments.transformer.features_of(ids)[:, 1:].flatten(0, 1)
    later = torch.ones(len(vectors), dtype=torch.long)
    errors = (readout(features, later) - vectors) @ readout.directions[1]
    variances = errors.var(0)
    assert 0.5 < float(variances.median()) < 2
    assert (readout.signal[1].diff() <= 1e-4).all()
    missed = readout(features, later) - readout.expected(vectors, later)
    assert float(missed.norm() / (readout(features, later) - vectors).norm()) < 1.05
    # On average over a token's contexts the guess is what is expected of it.
    token = int(ids[0, 3])
    same = ids[:, 1:].flatten() == token
    mean = readout(features[same], later[same]).mean(0)
    expected = readout.expected(instruments.transformer.embedding(torch.tensor(token)), later[0])
    plain = instruments.transformer.embedding(torch.tensor(token))
    assert (mean - expected).norm() < (mean - plain).norm()


def test_another_token_says_nothing_of_a_first_one(instruments: Instruments) -> None:
    ids, row = torch.tensor([[7, 40]]), torch.tensor([0])
    frontier = Frontier(instruments, instruments.transformer.features_of(ids))
    guess = frontier.guess(row)
    assert not frontier.try_out(row, torch.tensor([[9, 10, 11]])).certified.any()
    assert torch.equal(frontier.guess(row), guess)


def test_no_token_is_ruled_out_by_the_map(instruments: Instruments) -> None:
    ids, row = torch.tensor([[7, 40]]), torch.tensor([0])
    frontier = Frontier(instruments, instruments.transformer.features_of(ids) * 50)  # far off
    vectors = instruments.transformer.embedding(ids)
    frontier.prefix.begin(row, vectors, torch.tensor([1]))
    order = LinearMap()
    order.begin(frontier)
    chances = order.scores(frontier, row).exp()
    torch.testing.assert_close(chances.sum(), torch.tensor(1.0))
    assert float(chances.min()) >= 0.04 / VOCABULARY
