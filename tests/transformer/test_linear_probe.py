"""The linear probe: what it guesses, and what its directions separate."""

from __future__ import annotations

import pytest
import torch

from lightning_inversion.transformer.linear_probe import LinearProbe
from lightning_inversion.transformer.truncated import TruncatedTransformer
from tests.tiny import VOCABULARY


@pytest.fixture(scope="module")
def probe(tiny_transformer: TruncatedTransformer) -> LinearProbe:
    return LinearProbe.fit(tiny_transformer)


def test_it_standardizes_and_guesses(
    tiny_transformer: TruncatedTransformer, probe: LinearProbe
) -> None:
    ids = torch.randint(VOCABULARY, (64, 8), generator=torch.Generator().manual_seed(5))
    features = tiny_transformer.features_of(ids)
    positions = torch.arange(8).expand(64, 8)
    standard = probe.standardize(features, positions)
    for kind in (standard[:, :1], standard[:, 1:]):
        assert kind.mean().item() == pytest.approx(0, abs=0.1)
        assert kind.std().item() == pytest.approx(1, abs=0.25)  # it was fitted on frequent ones too
    truth = tiny_transformer.embedding(ids)
    error = (probe(features, positions) - truth).square().mean()
    plain = (tiny_transformer.embedding.mean - truth).square().mean()
    assert error < 0.8 * plain


def test_it_leaves_the_global_random_numbers_alone(
    tiny_transformer: TruncatedTransformer, probe: LinearProbe
) -> None:
    state = torch.get_rng_state()
    again = LinearProbe.fit(tiny_transformer)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again.matrix, probe.matrix)


def test_directions_separate_tokens_from_errors(
    tiny_transformer: TruncatedTransformer, probe: LinearProbe
) -> None:
    embedding, generator = tiny_transformer.embedding, torch.Generator().manual_seed(5)
    ids = torch.randint(VOCABULARY, (512, 16), generator=generator)
    vectors = embedding(ids)[:, 1:].flatten(0, 1)
    features = tiny_transformer.features_of(ids)[:, 1:].flatten(0, 1)
    later = torch.ones(len(vectors), dtype=torch.long)
    guess = probe(features, later)
    variances = ((guess - vectors) @ probe.directions[1]).var(0)
    assert 0.5 < float(variances.median()) < 2
    assert (probe.signal[1].diff() <= 1e-4).all()
    missed = guess - probe.expected(vectors, later)
    assert float(missed.norm() / (guess - vectors).norm()) < 1.05
    # On average over a token's contexts the guess is what is expected of it.
    token = int(ids[0, 3])
    mean = guess[ids[:, 1:].flatten() == token].mean(0)
    plain = embedding(torch.tensor(token))
    assert (mean - probe.expected(plain, later[0])).norm() < (mean - plain).norm()
