"""Measures: model outputs to a scalar or a distance, and gradients to one score per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_inversion.attribution.config import Distance, Reduce, Scalar


def scalar_of(logits: Tensor, tokens: Tensor, scalar: Scalar) -> Tensor:
    """The scalar that is attributed.

    Args:
        logits: [..., V].
        tokens: [...] target tokens, broadcast to the logits.
        scalar: 'logprob', 'logit', 'prob' of the token, or 'sum_logits' (the source), which ignores
            it: adding a constant to all logits changes it and no probability.

    Returns:
        [...].
    """
    if scalar == "sum_logits":
        return logits.sum(-1)
    logit = logits.gather(-1, tokens.expand(logits.shape[:-1])[..., None]).squeeze(-1)
    if scalar == "logit":
        return logit
    logprob = logit - logits.logsumexp(-1)
    return logprob if scalar == "logprob" else logprob.exp()


def reduce_embedding(products: Tensor, reduce: Reduce) -> Tensor:
    """Gradient * embedding [..., D] -> one score per token [...].

    Args:
        products: the element-wise product.
        reduce: 'l1' sum of absolute values (the source's code), 'abs_sum' absolute value of the
            sum, 'l2' Euclidean norm (inseq, ecco), 'sum' (Captum; the only signed one).
    """
    if reduce == "l1":
        return products.abs().sum(-1)
    if reduce == "l2":
        norm: Tensor = torch.linalg.vector_norm(products, dim=-1)
        return norm
    total = products.sum(-1)
    return total if reduce == "sum" else total.abs()


def combine(occlusion: Tensor, gradient: Tensor, weight: float) -> Tensor:
    """weight * occlusion + (1 - weight) * gradient, each by its largest absolute value in a row.

    Both [R, T]; NaN where a token is after the position, and in the result too. The linear
    combination of the source's section 'Model Interpretability'.
    """
    return weight * _by_largest(occlusion) + (1 - weight) * _by_largest(gradient)


def _by_largest(scores: Tensor) -> Tensor:
    size = scores.abs()
    largest = size.nan_to_num(0.0).amax(-1, keepdim=True)
    return size / largest.where(largest > 0, torch.ones_like(largest))


class Measure(Protocol):
    """A scalar and a distance of the outputs at a position, for each of R queries."""

    @property
    def repeats(self) -> int:
        """Scalars of one position; a gradient is taken of each."""
        ...

    def value(self, outputs: Tensor, query: Tensor, repeat: int = 0) -> Tensor:
        """Outputs [..., K] at the positions of `query` [...] -> scalar `repeat` [...]."""
        ...

    def change(self, clean: Tensor, changed: Tensor, query: Tensor) -> Tensor:
        """Outputs [Q, K] and [B, Q, K] at the positions of `query` [Q] -> [B, Q]."""
        ...


@dataclass(frozen=True)
class TokenMeasure:
    """The scalar and distance of a token's prediction.

    Args:
        tokens: [R], the target of each query.
        against: [R] tokens whose scalar is subtracted, or None.
        scalar: see `scalar_of`.
        distance: of occlusion: 'drop' of the scalar (of the log-probability: Captum's ablation),
            'l1_logits' (the source), 'l1_probs'.
    """

    tokens: Tensor
    against: Tensor | None
    scalar: Scalar
    distance: Distance

    @property
    def repeats(self) -> int:
        return 1

    def value(self, outputs: Tensor, query: Tensor, repeat: int = 0) -> Tensor:
        value = scalar_of(outputs, self.tokens[query], self.scalar)
        if self.against is None:
            return value
        return value - scalar_of(outputs, self.against[query], self.scalar)

    def change(self, clean: Tensor, changed: Tensor, query: Tensor) -> Tensor:
        if self.distance == "drop":
            return self.value(clean, query) - self.value(changed, query)
        if self.distance == "l1_logits":
            return (changed - clean).abs().sum(-1)
        return (changed.softmax(-1) - clean.softmax(-1)).abs().sum(-1)


@dataclass(frozen=True)
class FeatureMeasure:
    """Projections and distance of the features [F] at a position of a hidden layer.

    The gradient of a vector is a matrix J_i [F, D] for each input token; gradient x input becomes
    the vector J_i a_i, and its L2 norm the score. For directions v of independent random signs the
    mean of (v' J_i a_i)^2 is that norm squared, so a few backward passes suffice (Hutchinson's
    estimator; relative error about sqrt(1 / (2 probes))).

    Args:
        probes: [P, F], the directions.
        distance: of occlusion: 'l1_features', or 'relative_features', L2 over the clean norm.
    """

    probes: Tensor
    distance: Distance

    @classmethod
    def seeded(cls, probes: int, size: int, seed: int, distance: Distance) -> FeatureMeasure:
        """A measure with random signs as directions; exact if there are `size` or more."""
        if probes >= size:
            return cls(torch.eye(size) * size**0.5, distance)
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (probes, size), generator=generator) * 2 - 1
        return cls(signs.float(), distance)

    @property
    def repeats(self) -> int:
        return self.probes.shape[0]

    def value(self, outputs: Tensor, query: Tensor, repeat: int = 0) -> Tensor:
        return outputs @ self.probes[repeat].to(outputs.device)

    def change(self, clean: Tensor, changed: Tensor, query: Tensor) -> Tensor:
        order = 1 if self.distance == "l1_features" else 2
        distance: Tensor = torch.linalg.vector_norm(changed - clean, ord=order, dim=-1)
        if self.distance == "l1_features":
            return distance
        size: Tensor = torch.linalg.vector_norm(clean, dim=-1)
        return distance / size.clamp_min(1e-12)
