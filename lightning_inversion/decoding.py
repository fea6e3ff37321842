"""Reading a learnable input back as tokens: decoders, the allowed-token mask and top-k."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_inversion.errors import InputError
from lightning_inversion.inputs import EmbeddingInput, LearnableInput
from lightning_inversion.transformer.embedding import TokenEmbedding, best_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Decoder(ABC):
    """Vectors ``[..., D]`` -> a score for each token ``[..., V]``, the best token highest.

    Any subclass can be selected by its ``class_path``.

    Example:
        >>> class DotProduct(Decoder):
        ...     def __call__(self, vectors, embedding):
        ...         return embedding.dot(vectors)
        >>> DotProduct()(torch.tensor([1.0, 0.0]), TokenEmbedding(torch.eye(2)))
        tensor([1., 0.])
    """

    @abstractmethod
    def __call__(self, vectors: Tensor, embedding: TokenEmbedding) -> Tensor:
        """Score every token of the vocabulary."""


class PinvDecoder(Decoder):
    """W+ e, the source's decoder. It favours tokens with unusual embeddings."""

    def __call__(self, vectors: Tensor, embedding: TokenEmbedding) -> Tensor:
        return embedding.unmix(vectors)


class CosineDecoder(Decoder):
    """Cosine of the angle to each embedding."""

    def __call__(self, vectors: Tensor, embedding: TokenEmbedding) -> Tensor:
        scores = embedding.dot(normalize(vectors, dim=-1))
        return scores / embedding.norms.clamp_min(1e-12)


class L2Decoder(Decoder):
    """Minus half the squared distance to each embedding, up to a constant of the vector.

    Example:
        >>> embedding = TokenEmbedding(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
        >>> L2Decoder()(torch.tensor([2.0, 2.0]), embedding).argmax()
        tensor(1)
    """

    def __call__(self, vectors: Tensor, embedding: TokenEmbedding) -> Tensor:
        return embedding.nearness(vectors)


@dataclass(frozen=True)
class TopTokens:
    """The k best tokens of every position, best first.

    Attributes:
        ids: ``[B, T, k]`` token ids.
        scores: ``[B, T, k]`` the decoder's scores.
    """

    ids: Tensor
    scores: Tensor

    @property
    def best(self) -> Tensor:
        """``[B, T]``, the best token of each position."""
        return self.ids[..., 0]


@torch.no_grad()
def decode(
    values: Tensor,
    learnable: LearnableInput,
    embedding: TokenEmbedding,
    decoder: Decoder | None,
    k: int = 5,
    disallowed: Tensor | None = None,
    masked_score: float = -torch.inf,
    first: int | None = None,
    mask: Tensor | None = None,
) -> TopTokens:
    """The k best tokens of each position of an optimised input.

    Where fewer are allowed, the best one is repeated.

    Args:
        values: ``[B, T, C]`` of the learnable input.
        learnable: how values become vectors.
        embedding: the model's token embedding.
        decoder: how vectors become scores; None reads vocabulary vectors as the scores they are.
        k: how many tokens.
        disallowed: ``[V]`` or ``[B, V]`` bool, True for tokens that must not be chosen.
        masked_score: the score of a disallowed token. The source's code multiplies by 0, so that
            a disallowed token beats an allowed one with a negative score; 0 reproduces that.
        first: decode only this many rows; scoring a whole vocabulary costs as much as iterations.
        mask: ``[B, T]`` True at a token; the padding is not decoded, and its tokens are 0.
    """
    values = values.detach()[:first]
    rows, length, size = values.shape
    wanted = torch.arange(rows * length, device=values.device)
    if mask is not None:
        wanted = wanted[mask[:first].flatten()]
    values = values.reshape(-1, size)
    if disallowed is not None:
        disallowed = disallowed.to(values.device)
    # Made beforehand: pieces kept from each round would lie between the freed scores of earlier
    # ones, whose memory an allocator could then neither reuse nor return.
    k = min(k, embedding.vocabulary_size)
    ids = torch.zeros(rows * length, k, dtype=torch.long, device=values.device)
    scores = torch.zeros(rows * length, k, device=values.device)
    scored, which = wanted, torch.arange(len(wanted), device=values.device)
    if size == embedding.width and (disallowed is None or disallowed.dim() == 1):
        # A verified token has one vector, at whatever position.
        which = first_of_equals(values[wanted])
        scored = wanted[torch.unique(which)]
    for some in torch.split(scored, embedding.at_a_time):
        chunk = values[some]
        all_scores = chunk
        if decoder is not None:
            all_scores = decoder(learnable.embed(chunk, embedding), embedding)
        if disallowed is not None:
            hidden = disallowed if disallowed.dim() == 1 else disallowed[some // length]
            all_scores.masked_fill_(hidden, masked_score)
        best = best_tokens(all_scores, k)
        allowed = best.values > -torch.inf
        ids[some] = torch.where(allowed, best.indices, best.indices[:, :1])
        scores[some] = best.values
    ids[wanted], scores[wanted] = ids[wanted[which]], scores[wanted[which]]
    shape = (rows, length, k)
    return TopTokens(ids.view(shape), scores.view(shape))


def first_of_equals(vectors: Tensor) -> Tensor:
    """For each of vectors ``[N, D]`` the number ``[N]`` of the first that equals it.

    Example:
        >>> first_of_equals(torch.tensor([[1.0], [2.0], [1.0]]))
        tensor([0, 1, 0])
    """
    _, which = torch.unique(vectors, dim=0, return_inverse=True)
    numbers = torch.arange(len(vectors), device=vectors.device)
    first = torch.full_like(numbers, len(vectors)).scatter_reduce(0, which, numbers, "amin")
    return first[which]


def natural_decoder(learnable: LearnableInput) -> Decoder | None:
    """The decoder that fits an input: nearest embedding, or a vocabulary vector's own values."""
    return L2Decoder() if isinstance(learnable, EmbeddingInput) else None


def allowed_ids(
    allowed: list[int] | str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    embedding: TokenEmbedding,
) -> list[int]:
    """The tokens that may be decoded: ids, the tokens of a text, or none.

    Raises:
        InputError: a text without a tokenizer, an id outside the vocabulary, or no token.
    """
    if allowed is None:
        return []
    if not isinstance(allowed, str):
        ids = list(allowed)
    elif tokenizer is None:
        raise InputError("--model.allowed_tokens is a text, and the model has no tokenizer.")
    else:
        ids = tokenizer(allowed, add_special_tokens=False)["input_ids"]
    vocabulary = embedding.vocabulary_size
    if not ids or min(ids) < 0 or max(ids) >= vocabulary:
        raise InputError(
            f"--model.allowed_tokens must name tokens between 0 and {vocabulary - 1}, "
            f"and at least one; it gives {ids[:10]}."
        )
    return ids


def disallowed_tokens(allowed: list[int], vocabulary_size: int) -> Tensor:
    """``[V]`` bool, True for every token that is not in ``allowed``."""
    mask = torch.ones(vocabulary_size, dtype=torch.bool)
    mask[allowed] = False
    return mask
