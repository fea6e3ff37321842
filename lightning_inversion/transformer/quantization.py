"""8-bit and 4-bit weights by bitsandbytes, and what has to be done for right gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from lightning_inversion.errors import InputError

if TYPE_CHECKING:
    from lightning_inversion.transformer.truncated import TruncatedTransformer

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
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def prepare_quantized_(model: PreTrainedModel) -> None:
    """Make 4-bit layers keep their gradients right on a CPU, in place.

    Without gradients and in evaluation mode a `Linear4bit` repacks its weights for a faster
    kernel, and every backward after that is wrong, silently. So it may not repack.
    """
    from bitsandbytes.nn import Linear4bit  # slow to import, and seldom needed

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def check_gradient(transformer: TruncatedTransformer) -> None:
    """Compare the gradient with a finite difference along it, once.

    Raises:
        InputError: they differ by more than what quantisation explains.
    """
    embedding = transformer.embedding
    ids = torch.arange(1, 5, device=transformer.device)[None] % embedding.vocabulary_size
    point = embedding(ids)
    transformer(point)  # a forward without gradients first: where 4-bit layers went wrong
    target = transformer(embedding.mean.expand_as(point))

    def loss(inputs: torch.Tensor) -> torch.Tensor:
        return (transformer(inputs) - target).abs().sum()

    leaf = point.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    size = gradient.norm()
    step = 0.5 * embedding.spread * gradient.numel() ** 0.5 * gradient / size
    with torch.no_grad():
        change = (loss(point + step) - loss(point - step)) / (2 * step.norm())
    if not 0.3 < float(change / size) < 3:
        raise InputError(
            f"{OPTION}: the gradient of the quantised model is wrong here "
            f"({float(change / size):.2f} of the finite difference); leave it out."
        )
