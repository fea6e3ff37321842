"""What a model is seen to do when it is run: read vectors alone, obey masks after a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lightning_inversion.errors import InputError, first_line
from lightning_inversion.transformer.embedding import TokenEmbedding
from lightning_inversion.transformer.kv_cache import RaggedCache, one_after_another
from lightning_inversion.transformer.limits import OPTION

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
def check_reads_vectors(
    kind: str,
    run: Callable[..., Tensor],
    embedding: nn.Module,
    blocks: Sequence[nn.Module] = (),
) -> None:
    """Check that outputs follow from token vectors, each from its own and those before it.

    A text of three tokens is run.

    Args:
        kind: the model's class, for messages.
        run: called with `input_ids` [1, T] or `inputs_embeds` [1, T, D] -> outputs [1, T, F].
        embedding: the model's own, ids -> vectors.
        blocks: of which each must be run.

    Raises:
        InputError: the model cannot be run or differentiated on vectors, reads more than vectors,
            is not causal, skips a block, or its outputs are not one vector for each token.
    """
    with torch.inference_mode(False), _all_run(kind, blocks):
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
def _all_run(kind: str, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Refuse a model of which the block runs some blocks and not others (Llama 3.2 Vision)."""
    run: set[nn.Module] = set()
    hooks = [block.register_forward_pre_hook(lambda block, _: run.add(block)) for block in blocks]
    refused: InputError | None = None
    try:
        yield
    except InputError as error:
        refused = error
    finally:
        for hook in hooks:
            hook.remove()
    if 0 < len(run) < len(blocks):
        raise InputError(
            f"--model.transformer.depth: {kind} runs {len(run)} of its first {len(blocks)} "
            "blocks on text alone; choose a smaller depth, or another model."
        ) from refused
    if refused is not None:
        raise refused


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


@dataclass(frozen=True)
class CacheCheck:
    """Whether a model obeys masks after kept keys and values."""

    works: bool


@torch.no_grad()
def check_caches(
    embedding: TokenEmbedding,
    layers: int,
    run: Callable[..., Tensor],
    candidates: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> CacheCheck:
    """Compare candidates after kept keys and values with plain forwards.

    Models that take positions from the order of the keys (the ALiBi of BLOOM and MPT) do not
    agree. The difference allowed is a hundredth of what the prefix does to the features, plus
    rounding.

    Args:
        embedding: ids -> vectors.
        layers: how many blocks keep keys and values.
        run: `TruncatedTransformer.run`.
        candidates: `TruncatedTransformer.candidates`, the plain forwards.
    """
    dtype, device = embedding.matrix.dtype, embedding.matrix.device
    ids = torch.arange(10, device=device)
    ids = ids * max(1, embedding.vocabulary_size // 10) % embedding.vocabulary_size
    prefix, tried = embedding(ids[:4].expand(2, 4)), embedding(ids[4:].reshape(2, 3))
    lengths = torch.tensor([4, 3], device=device)
    cache, rows = RaggedCache(2, layers, device), torch.arange(2, device=device)

    def after(embeds: Tensor, sees: Tensor) -> Tensor:
        return cache.run(partial(run, embeds), rows, sees)

    try:
        after(prefix, one_after_another(4, device))
        cache.begin(lengths)
        behind_kept = after(tried, torch.eye(3, dtype=torch.bool, device=device))
    except FAILURES:
        # Takes no such mask, or keeps something else than keys and values.
        return CacheCheck(False)
    plain = candidates(prefix, lengths, tried)
    without_prefix = candidates(prefix, torch.zeros_like(lengths), tried)
    rounding = (32 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps
    allowed = 0.01 * (plain - without_prefix).norm() + rounding * plain.norm()
    return CacheCheck(bool((behind_kept - plain).norm() <= allowed))
