"""When is a target reproduced? The threshold, measured for a model, a depth and a channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_inversion.transformer.embedding import best_tokens
from lightning_inversion.transformer.linear_probe import LinearProbe
from lightning_inversion.transformer.prefix import KnownPrefix
from lightning_inversion.transformer.truncated import TruncatedTransformer

Channel = Callable[[Tensor], Tensor]
"""What happens to features on their way: rounding, noise. ``[..., F] -> [..., F]``."""

_TEXTS = 16
_LENGTH = 12
_NEIGHBOURS = 15
_STRANGERS = 16
_CLEARANCE = 1.5
"""How many times as far as the right tokens the nearest wrong one must be to certify anything."""


@dataclass(frozen=True)
class Calibration:
    """How far right and wrong tokens come to lie from the target, on held-back texts.

    A residual is the root mean square over the features of their difference in units of each
    feature's spread over random tokens: 1 is about as far as another token's. Unlike a difference
    relative to the norm it does not drown where a few activations are massive.

    Each value has two entries: for position 0, which sees no other token, and for later ones.

    Attributes:
        scale: ``[2, F]`` spread of each feature.
        threshold: ``[2]`` the residual up to which a token is verified; 0 where right and wrong
            tokens cannot be told apart.
        plausible: ``[2]`` the residual up to which a token may be right.
        right: ``[2]`` the largest residual of a right token.
        wrong: ``[2]`` the smallest of a wrong one, its 15 nearest neighbours in the embedding
            among them.
    """

    scale: Tensor
    threshold: Tensor
    plausible: Tensor
    right: Tensor
    wrong: Tensor

    def residual(self, features: Tensor, target: Tensor, positions: Tensor) -> Tensor:
        """Of features ``[..., F]`` to a target ``[..., F]`` at ``positions`` [...]."""
        scale = self.scale[positions.clamp(max=1)]
        return ((features - target) / scale).square().mean(-1).sqrt()

    @classmethod
    @torch.no_grad()
    def measure(
        cls,
        transformer: TruncatedTransformer,
        probe: LinearProbe,
        channel: Channel | None = None,
        text: Tensor | None = None,
        seed: int = 1,
    ) -> Calibration:
        """Run held-back texts both ways, whole and token by token behind kept keys.

        A model that is not causal runs them whole, alone and beside others.

        Args:
            transformer: the frozen model.
            probe: for the features' spread.
            channel: what has happened to the targets.
            text: ``[N, T]`` ids of text to use beside random tokens.
            seed: of the random tokens.
        """
        ids = _texts(transformer, text, seed)
        target = transformer.features_of(ids)
        if channel is not None:
            target = channel(target)
        right = torch.zeros(2, device=target.device)
        wrong = torch.full((2,), torch.inf, device=target.device)
        rows = torch.arange(len(ids), device=ids.device)
        prefix = KnownPrefix(transformer, len(ids))
        nowhere = torch.zeros(2, device=target.device)
        measure = cls(probe.std, nowhere, nowhere, right, wrong)
        first_duplicate = transformer.embedding.first_duplicate.to(ids.device)
        # A token that sees the whole text takes a forward of its own: fewer places must do.
        for position in range(0, ids.shape[1], 1 if transformer.causal else _LENGTH // 2):
            kind = min(position, 1)
            candidates = _candidates(transformer, ids[:, position], seed + position)
            if transformer.causal:
                features = prefix.candidates(rows, transformer.embedding(candidates))
            else:
                features = _in_place(transformer, ids, position, candidates)
            places = torch.full(candidates.shape, position, device=ids.device)
            residuals = measure.residual(features, target[:, position, None], places)
            right[kind] = torch.maximum(right[kind], residuals[:, 0].max())
            # A token with the same embedding is not wrong: nothing can tell the two apart.
            same = first_duplicate[candidates[:, 1:]] == first_duplicate[candidates[:, :1]]
            nearest = residuals[:, 1:].masked_fill(same, torch.inf).min()
            wrong[kind] = torch.minimum(wrong[kind], nearest)
            if transformer.causal:
                prefix.keep(rows, torch.zeros_like(rows))
        apart = wrong > _CLEARANCE * right
        between = (right.clamp_min(1e-9) * wrong).sqrt()
        threshold = torch.where(apart, between, 0.0)
        return cls(probe.std, threshold, torch.maximum(threshold, 1.2 * right), right, wrong)


def _texts(transformer: TruncatedTransformer, text: Tensor | None, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = transformer.embedding.vocabulary_size
    ids = torch.randint(vocabulary, (_TEXTS, _LENGTH), generator=generator)
    if text is not None and text.shape[1] >= _LENGTH:
        half = min(_TEXTS // 2, len(text))
        ids[:half] = text[-half:, -_LENGTH:].cpu()
    return ids.to(transformer.device)


def _in_place(
    transformer: TruncatedTransformer, ids: Tensor, position: int, candidates: Tensor
) -> Tensor:
    """Features ``[N, K, F]`` at a position with each of ``candidates`` [N, K] in the whole text."""
    texts = ids[:, None].repeat(1, candidates.shape[1], 1)
    texts[:, :, position] = candidates
    return torch.stack([transformer.features_of(some)[:, position] for some in texts])


def _candidates(transformer: TruncatedTransformer, right: Tensor, seed: int) -> Tensor:
    """The right token, its nearest neighbours, and random ones, ``[R, 1 + 15 + 16]``."""
    embedding = transformer.embedding
    near = embedding.dot(embedding(right)) - embedding.norms.square() / 2
    count = min(_NEIGHBOURS, embedding.vocabulary_size - 1)
    near.scatter_(1, right[:, None], -torch.inf)
    neighbours = best_tokens(near, count).indices
    generator = torch.Generator().manual_seed(seed)
    size = (len(right), _STRANGERS)
    strangers = torch.randint(embedding.vocabulary_size, size, generator=generator)
    return torch.cat([right[:, None], neighbours, strangers.to(right.device)], dim=1)
