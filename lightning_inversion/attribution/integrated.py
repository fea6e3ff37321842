"""Integrated gradients: gradient x input summed along the way from a baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_inversion.attribution.config import Reduce
from lightning_inversion.attribution.gradient import gradients
from lightning_inversion.attribution.model import Reader
from lightning_inversion.attribution.scores import Measure, reduce_embedding


def integrated_gradients(
    reader: Reader,
    embeds: Tensor,
    at: Tensor,
    measure: Measure,
    baseline: Tensor,
    steps: int = 32,
    reduce: Reduce = "sum",
    batch_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(a - b) * the mean gradient between the baseline b and the text a.

    Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365, by the Gauss-Legendre rule. The
    signed scores of a query add up to what the text measures more than the baseline; what is
    missing of that is returned, and falls with `steps`; not from a zero vector to a model that
    begins with a norm, where all of it happens in an instant.

    Args:
        reader: the model.
        embeds: [T, D], the text.
        at: [R], the position of each query.
        measure: what is read there.
        baseline: [D], what each token starts as.
        steps: points on the way.
        reduce: (a - b) * gradient -> one number.
        batch_size: rows in one forward.

    Returns:
        scores [R, T], NaN where a token is after the position, and the missing part [R].
    """
    points, weights = gauss_legendre(steps)
    difference = embeds - baseline
    total = torch.zeros(len(at), *embeds.shape)
    wanted = [(query, 0) for query in range(len(at)) for _ in range(steps)]
    rows = (
        baseline + float(point) * difference[: int(at[query]) + 1]
        for query in range(len(at))
        for point in points
    )
    found = gradients(reader, rows, wanted, measure, batch_size)
    for step, ((query, _), row, gradient) in enumerate(found):
        total[query, : len(row)] += weights[step % steps] * gradient.float().cpu()
    products = total * difference.float().cpu()
    visible = torch.arange(len(embeds)) <= at.cpu()[:, None]
    scores = reduce_embedding(products, reduce).masked_fill(~visible, torch.nan)
    missing = _rise(reader, embeds, at, measure, baseline) - products.sum((1, 2))
    return scores, missing


@torch.no_grad()
def _rise(reader: Reader, embeds: Tensor, at: Tensor, measure: Measure, baseline: Tensor) -> Tensor:
    """What the text measures more than the baseline at each position: [R]."""
    query = torch.arange(len(at), device=embeds.device)
    clean = measure.value(reader.read(embeds[None], at)[0], query)
    empty = baseline.expand_as(embeds)[None]
    return (clean - measure.value(reader.read(empty, at)[0], query)).cpu()


def gauss_legendre(steps: int) -> tuple[Tensor, Tensor]:
    """Points and weights [steps] of the rule on [0, 1]; exact for polynomials up to 2 steps - 1.

    By the eigenvalues of the Jacobi matrix (Golub and Welsch 1969).
    """
    k = torch.arange(1, steps, dtype=torch.float64)
    beside = k / (4 * k**2 - 1).sqrt()
    points, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return (points + 1) / 2, vectors[0] ** 2
