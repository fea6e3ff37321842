"""Another machine's rounding, simulated: a model's features where its sums round otherwise.

Other hardware, kernels, batch shapes and types add in another order and round elsewhere. Monte
Carlo arithmetic (Parker 1997, 'Monte Carlo Arithmetic') shows how far results move with that: each
intermediate result gets a random error of the size of its rounding error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_inversion.transformer.truncated import TruncatedTransformer

_OF_EPSILON = 0.5
"""The largest error in units of the type's epsilon: after rounding, none or one unit in the last
place."""
_COARSE, _OF_COARSE_EPSILON = 1e-5, 0.35
"""A larger epsilon, and the error then. Such a type's sums are wider, and each result is rounded
once: this and the rounding here are as much as two machines' roundings together."""

_OF_MEDIAN = 1.5
"""The root mean square of normal numbers, in units of the median of their sizes."""


@contextmanager
def rounded_differently(
    transformer: TruncatedTransformer, generator: torch.Generator
) -> Iterator[None]:
    """Within this context every module without children, and every block, rounds at random.

    Args:
        transformer: the frozen model; its weights stay as they are.
        generator: of the errors, on the CPU.
    """
    dtype = transformer.dtype if transformer.dtype.is_floating_point else torch.float32
    epsilon = max(torch.finfo(one).eps for one in (dtype, torch.float32))  # features are float32
    size = (_OF_COARSE_EPSILON if epsilon > _COARSE else _OF_EPSILON) * epsilon
    blocks = set(transformer.blocks)
    hooks = [
        module.register_forward_hook(_noisy(size, generator))
        for module in transformer.model.modules()
        if module in blocks or not any(module.children())
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _noisy(size: float, generator: torch.Generator) -> Any:
    def hook(module: Any, inputs: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return _perturbed(output, size, generator)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            return (_perturbed(output[0], size, generator), *output[1:])
        return output

    return hook


def _perturbed(values: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """Values ``[..., F]`` with errors in units of each value, at least of the usual one.

    A small sum of large terms has the terms' error. The median shows how large terms are: a few
    massive activations do not reach the other features' sums.
    """
    if not values.is_floating_point():
        return values
    wide = values.float()
    sizes = wide.abs()
    magnitude = torch.maximum(sizes, _OF_MEDIAN * sizes.median(-1, keepdim=True).values)
    drawn = torch.rand(values.shape, generator=generator).mul_(2).sub_(1).to(values.device)
    return (wide + size * magnitude * drawn).to(values.dtype)
