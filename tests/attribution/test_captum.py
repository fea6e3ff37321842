"""Parity first: the same numbers as an independent implementation, to 1e-5 in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_inversion.attribution.config import Reduce
from lightning_inversion.attribution.gradient import gradient_times_input
from lightning_inversion.attribution.integrated import integrated_gradients
from lightning_inversion.attribution.model import LogitReader
from lightning_inversion.attribution.occlusion import occlusion
from lightning_inversion.attribution.scores import TokenMeasure
from tests.attribution import captum_reference as captum

TOLERANCE = 1e-5
REPLACEMENT = 5


def setting(
    model: PreTrainedModel, ids: Tensor
) -> tuple[LogitReader, Tensor, Tensor, TokenMeasure]:
    reader = LogitReader(model)
    with torch.no_grad():
        target = model(input_ids=ids[None]).logits[0, -1].argmax()[None]
    return reader, reader.embed(ids), torch.tensor([len(ids) - 1]), measure(target)


def measure(target: Tensor) -> TokenMeasure:
    return TokenMeasure(target, None, "logprob", "drop")


@pytest.mark.parametrize("reduce", ["sum", "l1", "l2"])
def test_gradient_times_input(model: PreTrainedModel, ids: Tensor, reduce: Reduce) -> None:
    reader, embeds, at, measured = setting(model, ids)
    ours = gradient_times_input(reader, embeds, at, measured, reduce)[0]

    products = captum.gradient_times_embedding(model, ids, int(measured.tokens))
    theirs = {
        "sum": products.sum(-1),
        "l1": products.abs().sum(-1),
        "l2": products.norm(dim=-1),
    }[reduce]
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def test_occlusion(model: PreTrainedModel, ids: Tensor) -> None:
    reader, embeds, at, measured = setting(model, ids)
    ours = occlusion(reader, embeds, at, measured, reader.embed(torch.tensor([REPLACEMENT]))[0])[0]
    theirs = captum.ablation(model, ids, int(measured.tokens), REPLACEMENT)
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def test_integrated_gradients(model: PreTrainedModel, ids: Tensor) -> None:
    reader, embeds, at, measured = setting(model, ids)
    baseline = reader.embed(torch.tensor([REPLACEMENT]))[0]
    ours, _ = integrated_gradients(reader, embeds, at, measured, baseline, steps=20)
    theirs = captum.integrated(model, ids, int(measured.tokens), REPLACEMENT, steps=20)
    torch.testing.assert_close(ours[0], theirs, rtol=TOLERANCE, atol=TOLERANCE)
