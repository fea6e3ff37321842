"""One text of three tokens, run when a model is loaded: whether vectors are all that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_inversion.errors import InputError
from lightning_inversion.transformer.sources import OPTION, first_line

_LENGTH = 3
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a model raises that cannot be run as it was asked to."""


@torch.no_grad()
def check_reads_vectors(kind: str, run: Callable[..., Tensor], embedding: nn.Module) -> None:
    """Check that outputs follow from token vectors, each from its own and those before it.

    Args:
        kind: the model's class, for messages.
        run: called with `input_ids` [1, T] or `inputs_embeds` [1, T, D] -> outputs [1, T, F].
        embedding: the model's own, ids -> vectors.

    Raises:
        InputError: the model cannot be run or differentiated on vectors, reads more than vectors,
            is not causal, or its outputs are not one vector for each token.
    """
    with torch.inference_mode(False):
        expected, found, other = _outputs(kind, run, embedding)
    if found.dim() != 3 or found.shape[:2] != (1, _LENGTH):
        shape = list(found.shape)
        raise _refused(
            kind,
            f"gives hidden states of shape {shape} for {_LENGTH} tokens, not one vector for each",
        )
    if not expected.isfinite().all():
        return  # reported where the numbers are used
    rounding = 32 * torch.finfo(found.dtype).eps * float(expected.abs().max())
    if not _within(found - expected, rounding):
        raise _refused(kind, "reads more of a token than its vector")
    effect = float((other - found)[:, -1].abs().max())
    if not _within((other - found)[:, :-1], rounding + 1e-4 * effect):
        raise _refused(kind, "is not causal: a later token changes earlier hidden states")


def _outputs(
    kind: str, run: Callable[..., Tensor], embedding: nn.Module
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of ids, of their vectors, and of these with another vector at the end."""
    weight = embedding.weight
    if not isinstance(weight, Tensor):
        raise _refused(kind, "has an embedding without a weight")
    ids = torch.arange(1, _LENGTH + 2, device=weight.device)
    ids *= len(weight) // (_LENGTH + 2)
    with _running(kind, "cannot be run on tokens ({reason})"):
        vectors = embedding(ids[None, :_LENGTH])
        changed = vectors.clone()
        # Between two tokens: a model that looks up the token of a vector does not find it.
        changed[:, -1] = embedding(ids[None])[:, -2:].mean(1)
        expected = run(input_ids=ids[None, :_LENGTH])
    with torch.enable_grad():
        leaf = vectors.clone().requires_grad_()
        with _running(kind, "needs token ids beside their vectors"):
            found = run(inputs_embeds=leaf.clone())  # some models write in their input
        with _running(kind, "passes no gradient to its token vectors"):
            torch.autograd.grad(found.float().sum(), leaf)
    with _running(kind, "needs token ids beside their vectors"):
        return expected, found.detach(), run(inputs_embeds=changed)


@contextmanager
def _running(kind: str, fault: str) -> Iterator[None]:
    """Refuse a model that cannot do what the block does."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        reason = f"{type(error).__name__}: {first_line(error)}".rstrip(".")
        raise _refused(kind, fault.format(reason=reason)) from error


def _within(difference: Tensor, bound: float) -> bool:
    return bool(difference.abs().max() <= bound)


def _refused(kind: str, reason: str) -> InputError:
    return InputError(f"{OPTION}: {kind} {reason}; choose another causal language model.")
