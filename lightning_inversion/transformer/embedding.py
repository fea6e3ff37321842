"""Ids -> vectors, vocabulary vectors -> vectors and back, and the best of a vocabulary's scores."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_inversion.errors import module_property

# Rows handled at a time where a temporary copy in float64 would otherwise double the memory.
_ROWS = 8192
_SCORES = 2**24
"""Scores of whole vocabularies that exist at a time: 64 MiB in float32."""
_POSITIONS = 128
"""Vectors scored at a time at most: more are not scored any faster, and need more memory."""
_BLOCK = 64
"""Scores in a block; blocks are first compared by their highest score."""


def scored_at_a_time(vocabulary: int) -> int:
    """For how many vectors a whole vocabulary of this size is scored together."""
    return max(1, min(_POSITIONS, _SCORES // vocabulary))


class TokenEmbedding(nn.Module):
    """The frozen token embedding E of a model, as the one matrix W [V, D] that it amounts to.

    Where the model scales its embeddings (Gemma), the scale is in `matrix`.

    Args:
        matrix: W [V, D], row i the vector of token i. Shared, not copied.
    """

    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix.detach(), persistent=False)

    @classmethod
    @torch.no_grad()
    def from_module(cls, embedding: nn.Module) -> TokenEmbedding:
        """The embedding of a model's own module; W is copied only where the module changes it."""
        weight = embedding.weight
        assert isinstance(weight, Tensor)
        ids = torch.arange(weight.shape[0], device=weight.device)
        if type(embedding) is nn.Embedding:
            return cls(weight)
        if torch.equal(embedding(ids[:64]), weight[:64]):
            # The class does something, but perhaps not to the numbers: look at every row, a
            # few at a time.
            parts = torch.split(ids, _ROWS)
            if all(torch.equal(embedding(part), weight[part]) for part in parts):
                return cls(weight)
        return cls(embedding(ids))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TokenEmbedding:
        # What was computed from the matrix does not move with it to another device.
        for cached in (
            "_inverse_gram",
            "mean",
            "std",
            "norms",
            "_duplicates",
            "first_duplicate",
        ):
            self.__dict__.pop(cached, None)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's is unannotated
        return self

    @property
    def vocabulary_size(self) -> int:
        """V, the number of rows. May be more than the tokenizer's tokens."""
        return self.matrix.shape[0]

    @property
    def width(self) -> int:
        """D, the size of one token's vector."""
        return self.matrix.shape[1]

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [B, T] -> vectors [B, T, D], in float32 whatever the model computes in."""
        return nn.functional.embedding(ids, self.matrix).float()

    def mix(self, vectors: Tensor) -> Tensor:
        """Vocabulary vectors [..., V] -> a W [..., D]: a one-hot vector gives its token's row.

        The source's 'Direct Input Representation'. Differentiable.
        """
        return (vectors.to(self.matrix.dtype) @ self.matrix).float()

    def unmix(self, embeds: Tensor) -> Tensor:
        """Vectors [..., D] -> W^+ e [..., V], by the Moore-Penrose pseudo-inverse of W.

        Computed as (e (W'W)^-1) W', so that W^+, as large as W, is never stored; the Gram matrix
        W'W is built and inverted once, in float64 (relative error 3e-6 against 3e-5 in float32).
        """
        whitened = embeds.double() @ self._inverse_gram.to(embeds.device)
        return self.dot(whitened.float())

    def dot(self, vectors: Tensor) -> Tensor:
        """Vectors [..., D] -> their products with every token's vector [..., V], in float32."""
        if self.matrix.dtype == torch.float32:
            return vectors @ self.matrix.T
        parts = [vectors @ rows.float().T for rows in torch.split(self.matrix, _ROWS)]
        return torch.cat(parts, dim=-1)

    def nearness(self, vectors: Tensor) -> Tensor:
        """Vectors [..., D] -> scores of every token [..., V]; the nearest has the highest.

        It is half of a vector's square minus half of the squared distance to each token.
        """
        # Computed in place: a second tensor of scores would take as much memory again.
        return self.dot(vectors).sub_(self.norms.square() / 2)

    @property
    def at_a_time(self) -> int:
        """How many vectors `dot` should score together, so that the scores stay small."""
        return scored_at_a_time(self.vocabulary_size)

    @module_property
    @torch.no_grad()
    def _inverse_gram(self) -> Tensor:
        D = self.width
        gram = torch.zeros(D, D, dtype=torch.float64, device=self.matrix.device)
        for rows in torch.split(self.matrix, _ROWS):
            rows = rows.double()
            gram.addmm_(rows.T, rows)
        factor, failed = torch.linalg.cholesky_ex(gram)
        pivots = factor.diagonal()
        # Fewer tokens than dimensions, or dimensions no token uses: not invertible, and Cholesky
        # may not notice. The pseudo-inverse of the Gram matrix gives W^+ all the same.
        if failed.any() or pivots.min() < 1e-6 * pivots.max():
            inverse: Tensor = torch.linalg.pinv(gram, hermitian=True)
            return inverse
        return torch.cholesky_inverse(factor)

    @module_property
    @torch.no_grad()
    def mean(self) -> Tensor:
        """The mean token vector [D], float32."""
        return self.matrix.mean(dim=0, dtype=torch.float32)

    @module_property
    @torch.no_grad()
    def std(self) -> float:
        """The root mean square distance of an entry of W from its column's mean."""
        squares = 0.0
        for rows in torch.split(self.matrix, _ROWS):
            squares += (rows.float() - self.mean).square().sum().item()
        return float((squares / self.matrix.numel()) ** 0.5)

    @module_property
    @torch.no_grad()
    def norms(self) -> Tensor:
        """The Euclidean norm of each token's vector [V], float32."""
        wide = torch.promote_types(self.matrix.dtype, torch.float32)  # float64 may not be narrowed
        norms: Tensor = torch.linalg.vector_norm(self.matrix, dim=1, dtype=wide)
        return norms.float()

    def duplicates(self) -> tuple[tuple[int, ...], ...]:
        """Groups of token ids with identical rows, which no hidden state distinguishes."""
        return self._duplicates

    @module_property
    def first_duplicate(self) -> Tensor:
        """The first token ``[V]`` with the same row as each token: itself, for nearly all."""
        first = torch.arange(self.vocabulary_size, device=self.matrix.device)
        for group in self._duplicates:
            first[list(group)] = group[0]
        return first

    @module_property
    def _duplicates(self) -> tuple[tuple[int, ...], ...]:
        groups: dict[bytes, list[int]] = defaultdict(list)
        for start in range(0, self.vocabulary_size, _ROWS):
            # + 0.0 makes -0.0 and 0.0, which are equal, the same bytes.
            rows = (self.matrix[start : start + _ROWS].float() + 0.0).cpu().numpy()
            for offset, row in enumerate(rows):
                groups[hashlib.blake2b(row.tobytes(), digest_size=16).digest()].append(
                    start + offset
                )
        return tuple(tuple(group) for group in groups.values() if len(group) > 1)


class BestTokens(NamedTuple):
    """The k best tokens, best first, as ``torch.topk`` returns them.

    Attributes:
        values: ``[..., k]`` the scores.
        indices: ``[..., k]`` the tokens' ids.
    """

    values: Tensor
    indices: Tensor


def best_tokens(scores: Tensor, k: int) -> BestTokens:
    """What ``scores.topk(k)`` finds in scores ``[..., V]``, several times as fast on a CPU.

    The k best stand in the k blocks of 64 whose highest scores are best, so that the others need
    no sorting. Which of equal scores are found is undefined, as it is for ``topk``.
    """
    V = scores.shape[-1]
    whole = V // _BLOCK
    if whole < 2 * k:  # as many to sort as there were
        return BestTokens(*scores.topk(k, dim=-1))
    blocks = scores[..., : whole * _BLOCK].reshape(*scores.shape[:-1], whole, _BLOCK)
    chosen = blocks.amax(-1).topk(k, dim=-1).indices
    among = blocks.gather(-2, chosen[..., None].expand(*chosen.shape, _BLOCK)).flatten(-2)
    rest = scores[..., whole * _BLOCK :]  # of a vocabulary that is no multiple of 64
    values, slots = torch.cat([among, rest], dim=-1).topk(k, dim=-1)
    inside = chosen.gather(-1, (slots // _BLOCK).clamp(max=k - 1)) * _BLOCK + slots % _BLOCK
    after = whole * _BLOCK + slots - k * _BLOCK
    return BestTokens(values, torch.where(slots < k * _BLOCK, inside, after))
