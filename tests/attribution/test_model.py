"""The model is left as it was, and refused where its gradients are wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_inversion.attribution.measures import TokenMeasure
from lightning_inversion.attribution.methods import Task, gradient_times_input
from lightning_inversion.attribution.model import LogitReader, check_gradients, undisturbed
from lightning_inversion.errors import InputError
from tests.tiny import tiny_model


def test_the_model_is_left_as_it_was(ids: Tensor) -> None:
    model = tiny_model("llama")
    model.train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    before = state_of(model)
    reader = LogitReader(model)
    measure = TokenMeasure(torch.tensor([4]), None, "logprob", "drop")
    with torch.inference_mode(), undisturbed(model):
        task = Task(reader, reader.embed(ids), torch.tensor([23]), measure)
        scores = gradient_times_input(task)
    assert scores.isfinite().all()
    assert state_of(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


def state_of(model: nn.Module) -> list[object]:
    return [
        *(
            (name, module.training, len(module._forward_hooks))
            for name, module in model.named_modules()
        ),
        *(
            (name, p.requires_grad, p._version, float(p.detach().sum()))
            for name, p in model.named_parameters()
        ),
    ]


def test_4_bit_layers_that_repack_their_weights_are_refused() -> None:
    layer = nn.Linear(2, 2)
    check_gradients(layer)
    layer.support_avx512bf16_for_cpu = True  # as bitsandbytes marks its Linear4bit
    with pytest.raises(InputError, match="--method occlusion"):
        check_gradients(nn.Sequential(layer))
