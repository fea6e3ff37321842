"""Layer-wise relevance propagation: rules for the backward pass, as gradients.

A relevance that is passed from the logits down to the token vectors is, at every layer, an
activation times a gradient. So gradient x input under other rules for the backward pass gives the
relevance of each token. The rules are those of Achtibat et al. 2024 (AttnLRP,
https://arxiv.org/abs/2402.05602), derived here from the paper:

- a sum or a linear layer passes relevance on in proportion to what each input contributes, which
  its own gradient does already;
- a product of two values that depend on the input shares its relevance equally: each factor gets
  half of the gradient. Attention has two such products, queries with keys and weights with values;
- an elementwise function f is taken as the factor f(x) / x, and a norm as division by a constant;
- softmax keeps its own gradient.

Activations times gradients then add up to the logit in every layer without biases and softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_ELEMENTWISE = {
    "silu", "gelu", "relu", "relu6", "leaky_relu", "elu", "mish", "hardswish", "softplus", "tanh",
    "sigmoid",
}  # fmt: skip
_PRODUCTS = {"mul": 0, "__mul__": 0, "__rmul__": 0, "matmul": 0, "__matmul__": 0, "bmm": 0,
             "baddbmm": 1}  # fmt: skip
"""Products, and which of their arguments is the first factor."""
_QUOTIENTS = {"div", "__truediv__", "true_divide"}
_ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")
_SOFTMAX = (nn.Softmax, nn.LogSoftmax, nn.Softmax2d, nn.Softmin, nn.MultiheadAttention)


@contextmanager
def relevance_rules(model: nn.Module) -> Iterator[None]:
    """Within, a backward pass through the model follows the rules; a forward is what it was.

    Args:
        model: with frozen parameters, because a value with a gradient is taken to depend on the
            input. Its activations that are modules get the rule of an elementwise function: some
            are written as products, which would otherwise be shared equally.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if type(module).__module__ in _ACTIVATIONS and not isinstance(module, _SOFTMAX):
                handle = module.register_forward_hook(lambda _, x, y: _as_factor(x[0], y))
                stack.callback(handle.remove)
        stack.enter_context(_Rules())
        yield


class _Rules(TorchFunctionMode):
    """Calls of torch with the rules in place of their gradients; linear ones are as they were."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if name in _PRODUCTS:
            first = _PRODUCTS[name]
            if len(args) > first + 1 and all(map(_depends, args[first : first + 2])):
                halved = [_scaled(factor, 1 / 2) for factor in args[first : first + 2]]
                args = (*args[:first], *halved, *args[first + 2 :])
        elif name == "scaled_dot_product_attention" and len(args) >= 3:
            query, key, value, *more = args
            args = (_scaled(query, 1 / 4), _scaled(key, 1 / 4), _scaled(value, 1 / 2), *more)
        elif name in _QUOTIENTS and len(args) > 1 and _depends(args[1]):
            args = (args[0], args[1].detach(), *args[2:])
        elif name == "rsqrt":
            return func(*args, **kwargs).detach()
        elif name == "layer_norm":
            return _layer_norm(*args, **kwargs)
        elif name == "rms_norm":
            return _rms_norm(*args, **kwargs)
        elif name in _ELEMENTWISE:
            return _as_factor(args[0], func(*args, **kwargs))
        return func(*args, **kwargs)


def _depends(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _scaled(value: Tensor, factor: float) -> Tensor:
    """The value itself, with a part of its gradient."""
    return value.detach() + factor * (value - value.detach())


def _as_factor(x: Tensor, y: Tensor) -> Tensor:
    """y = f(x) as x times a constant; where x is 0, nothing is passed on."""
    factor = torch.where(x == 0, 0, y / x).detach()
    return y.detach() + factor * (x - x.detach())


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    exact = functional.layer_norm(x, shape, weight, bias, eps).detach()
    dims = tuple(range(-len(shape), 0))
    inverse = torch.rsqrt(x.var(dims, correction=0, keepdim=True) + eps).detach()
    change = x - x.detach()
    linear = (change - change.mean(dims, keepdim=True)) * inverse
    return exact + (linear if weight is None else linear * weight)


def _rms_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    exact = functional.rms_norm(x, list(shape), weight, eps).detach()
    dims = tuple(range(-len(shape), 0))
    small = torch.finfo(x.dtype).eps if eps is None else eps
    linear = (x - x.detach()) * torch.rsqrt(x.square().mean(dims, keepdim=True) + small).detach()
    return exact + (linear if weight is None else linear * weight)
