"""The same scores by Captum, written the way its own documentation writes them."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from captum.attr import FeatureAblation, LayerGradientXActivation, LayerIntegratedGradients
from torch import Tensor
from transformers import PreTrainedModel


def logprob_of(model: PreTrainedModel, target: int, **options: int) -> Callable[[Tensor], Tensor]:
    """Ids [B, T] -> the log-probability [B] of the target after the last one."""

    def forward(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids, use_cache=False, **options).logits[:, -1]
        return torch.log_softmax(logits, -1)[:, target]

    return forward


def gradient_times_embedding(model: PreTrainedModel, ids: Tensor, target: int) -> Tensor:
    """[T, D], before any reduction."""
    method = LayerGradientXActivation(logprob_of(model, target), model.get_input_embeddings())
    return _quiet(lambda: method.attribute(ids[None]))[0].detach()


def ablation(
    model: PreTrainedModel,
    ids: Tensor,
    target: int,
    replacement: int,
    rows: int = 8,
    **options: int,
) -> Tensor:
    """[T], in batches of `rows`."""
    method = FeatureAblation(logprob_of(model, target, **options))
    scores = _quiet(
        lambda: method.attribute(ids[None], baselines=replacement, perturbations_per_eval=rows)
    )
    return scores[0]


def integrated(
    model: PreTrainedModel, ids: Tensor, target: int, replacement: int, steps: int
) -> Tensor:
    """[T], summed over the embedding."""
    method = LayerIntegratedGradients(logprob_of(model, target), model.get_input_embeddings())
    scores = _quiet(
        lambda: method.attribute(
            ids[None],
            baselines=torch.full_like(ids[None], replacement),
            n_steps=steps,
            method="gausslegendre",
        )
    )
    return scores[0].sum(-1).detach()


def _quiet(call: Callable[[], Tensor]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Captum's own
        return call()
