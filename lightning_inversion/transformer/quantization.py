"""8-bit and 4-bit weights by bitsandbytes, and what has to be done for right gradients."""

from __future__ import annotations

import logging

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from lightning_inversion.errors import InputError

OPTION = "--model.transformer.quantization"


def check_quantization(quantization: str | None, dtype: str, weights: str) -> None:
    """Raise InputError for what bitsandbytes cannot do, or does wrongly."""
    if quantization is None:
        return
    if weights == "untrained":
        raise InputError(
            f"{OPTION}: {quantization} is for trained weights; leave it out, "
            "or set --model.transformer.weights to trained."
        )
    if quantization == "int8" and dtype == "float16":
        # Found by running: from 12 blocks on.
        raise InputError(
            f"{OPTION}: int8 within float16 gives gradients that are not numbers; "
            "set --model.transformer.dtype to float32 or bfloat16."
        )


def quantization_config(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """How transformers is to quantise while it loads."""
    bits = (
        # Threshold 0: every activation is quantised by its own row. bitsandbytes' default computes
        # a channel in float16 for all rows if any row is large there, and rows would depend on
        # their neighbours (by 2 at depth 12 of SmolLM2).
        {"load_in_8bit": True, "llm_int8_threshold": 0.0}
        if quantization == "int8"
        else {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": dtype,
        }
    )
    return BitsAndBytesConfig(**bits)  # type: ignore[no-untyped-call]


def prepare_quantized_(model: PreTrainedModel) -> None:
    """Make the quantised layers of a loaded model keep their gradients right, in place; check it.

    Without gradients and in evaluation mode a `Linear4bit` on a CPU repacks its weights for a
    faster kernel, and every backward after that is wrong, silently. So it may not repack.

    Raises:
        InputError: the gradient of a layer is wrong on this machine all the same.
    """
    # Slow to import, and seldom needed.
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    # It warns at each call of each layer that activations are cast to float16, which is its method.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
        if isinstance(layer, Linear4bit | Linear8bitLt):
            agreement = adjoint_agreement(layer, layer.in_features)
            if not abs(agreement - 1) < 0.1:
                raise InputError(
                    f"{OPTION}: the gradient of the quantised layer {name} is wrong on this "
                    f"machine ({agreement:.2f} of what it should be); leave quantization out."
                )


def adjoint_agreement(layer: nn.Module, width: int) -> float:
    """<L'Lx, x> / <Lx, Lx> for a linear layer L, with its backward as L': 1 if that is right.

    The forward before the one with a gradient is what makes a layer repack.
    """
    device = next(layer.parameters()).device
    x = torch.randn(1, width, generator=torch.Generator().manual_seed(0)).to(device)
    layer.train(False)
    with torch.no_grad():
        offset = layer(torch.zeros_like(x))
        output = layer(x) - offset
    leaf = x.clone().requires_grad_()
    (pulled,) = torch.autograd.grad(layer(leaf), leaf, grad_outputs=output)
    return float((pulled * x).sum() / output.square().sum())
