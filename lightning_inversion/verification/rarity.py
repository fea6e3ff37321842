"""How fast random tokens get rare towards a target: as a power of the residual."""

from __future__ import annotations

from torch import Tensor

NEAREST_SHARE = 0.05
"""Share of the random tokens, the nearest ones, whose residuals show how fast they get rare."""
_NEAREST = 4
"""Of a target's own random tokens the nearest ones, which show how fast tokens get rare there."""


def rarity(residuals: Tensor) -> tuple[Tensor, Tensor]:
    """By which power random tokens get rare near the target, and from which residual on.

    Hill's estimator of the lower tail (Hill 1975), the local intrinsic dimension.
    """
    finite = residuals[residuals.isfinite()]
    if not len(finite):
        return residuals.new_zeros(()), residuals.new_full((), 1e-30)
    nearest = finite.sort().values[: max(2, round(NEAREST_SHARE * len(finite)))].double()
    common = nearest[-1].clamp_min(1e-30)
    return rarity_power(common, nearest).to(residuals), common.to(residuals)


def rarity_around_each(residuals: Tensor) -> tuple[Tensor, Tensor]:
    """The same from the nearest random tokens of each target ``[N, K]`` alone.

    Where tokens of some targets lie closer together, as keys and values of positions that take
    the attention do, all residuals together look like those of few dimensions. The estimates of
    all targets are averaged (Levina and Bickel 2004, by MacKay and Ghahramani's mean), and the
    closest target gives the residual.
    """
    nearest = residuals.sort(dim=1).values[:, :_NEAREST].double()
    nearest = nearest[nearest[:, -1].isfinite()]
    if not nearest.numel():
        return residuals.new_zeros(()), residuals.new_full((), 1e-30)
    farthest = nearest[:, -1:].clamp_min(1e-30)
    power = rarity_power(farthest, nearest[:, :-1])
    share = (_NEAREST / residuals.shape[1] / NEAREST_SHARE) ** (-1 / float(power))
    return power.to(residuals), (farthest.min() * share).to(residuals)


def rarity_power(common: Tensor, nearest: Tensor) -> Tensor:
    """The power by which residuals get rare below ``common``, by the mean of their logs."""
    return 1 / (common / nearest.clamp_min(1e-30)).log().mean().clamp_min(1e-3)
