"""Residuals of Gaussian and of Laplace noise, against draws and integrals."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_inversion.verification.noise import NOISE, NoiseKind

kinds = pytest.mark.parametrize("kind", NOISE.values(), ids=NOISE)


@kinds
def test_noise_has_a_std_of_1_and_a_residual_of_1(kind: NoiseKind) -> None:
    drawn = kind.draw((4000, 48), torch.Generator().manual_seed(0))
    assert float(drawn.std()) == pytest.approx(1, abs=0.01)
    residuals = kind.residual(drawn)
    assert float(residuals.mean()) == pytest.approx(1, abs=0.01)
    assert float((residuals > kind.largest(48)).float().mean()) < 1e-3
    assert float((residuals > 0.9 * kind.largest(48)).float().mean()) > 1e-3


@kinds
def test_residuals_hold_the_likelihood(kind: NoiseKind) -> None:
    own, rival = kind.draw((2, 48), torch.Generator().manual_seed(1)) * torch.tensor([[0.7], [2.0]])
    density = (
        torch.distributions.Normal(0.0, 1.0)
        if kind.power == 2
        else torch.distributions.Laplace(0.0, 0.5**0.5)
    )
    expected = (density.log_prob(own) - density.log_prob(rival)).sum()
    found = 48 * kind.likelier(kind.residual(own), kind.residual(rival))
    torch.testing.assert_close(found, expected)


@kinds
def test_a_wrong_token_out_of_reach_rarely_has_so_small_a_residual(kind: NoiseKind) -> None:
    """Where features differ by as much each, and where one differs by all of it."""
    F, chance = 16, 1e-2
    drawn = kind.draw((100_000, F), torch.Generator().manual_seed(2))
    reach = kind.reach(F, 1.0, -math.log(chance))
    for pattern in (torch.ones(F), torch.eye(F)[0], torch.linspace(0.1, 2.0, F)):
        sizes = torch.linspace(0.0, 60.0, 2001)[:, None] * pattern
        moved = sizes[kind.separation(sizes) >= reach][0]
        share = float((kind.residual(drawn + moved) <= 1.0).float().mean())
        assert 0 < share < chance or pattern[1] == 0  # one feature alone is not tight


def test_the_terms_of_a_laplace_separation_are_bounds() -> None:
    v = torch.logspace(-3, 4, 2000, dtype=torch.float64)
    for s in (0.01, 0.1, 0.3, 0.5):
        # The mean of exp(-s |noise + v|), relative to that of exp(-s |noise|).
        mean = ((-s * v).exp() - s * (-v).exp()) / (1 - s)
        assert (mean <= (-s * v.square() / (2 + v)).exp() * (1 + 1e-9)).all()


@pytest.mark.parametrize("rounding", [0.01, 0.1, 0.5, 1.0, 5.0])
@pytest.mark.parametrize("uniform", [True, False])
def test_rounded_laplace_noise_is_hardly_likelier(rounding: float, uniform: bool) -> None:
    """Than Laplace noise of the std of both together, by the bound at most."""
    laplace = NOISE["laplace"]
    errors = torch.linspace(-6, 6, 4001, dtype=torch.float64) * rounding
    weights = (-(errors / rounding).square() / 2).exp()
    if uniform:
        weights = (errors.abs() <= math.sqrt(3) * rounding).double()
    weights /= weights.sum()
    x = torch.linspace(0, 40 * (1 + rounding), 400, dtype=torch.float64)[:, None]
    density = torch.distributions.Laplace(torch.zeros((), dtype=torch.float64), laplace.unit)
    both = (density.log_prob(x - errors).exp() * weights).sum(1).log()
    wider = torch.distributions.Laplace(
        torch.zeros((), dtype=torch.float64), laplace.unit * math.sqrt(1 + rounding**2)
    )
    bound = laplace.flattened(1.0, torch.tensor([rounding], dtype=torch.float64))
    assert ((both - wider.log_prob(x[:, 0])) <= bound + 1e-6).all()
