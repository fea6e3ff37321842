"""What held-out prompts show: residuals of right and wrong tokens, and how rounding errs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_inversion.progress import counted
from lightning_inversion.transformer.blocks import most_positions
from lightning_inversion.transformer.embedding import best_tokens
from lightning_inversion.transformer.linear_probe import LinearProbe
from lightning_inversion.transformer.prefix import FixedPrefix
from lightning_inversion.transformer.rounding import rounded_differently
from lightning_inversion.transformer.sparse import where_kept
from lightning_inversion.transformer.truncated import TruncatedTransformer

_PROMPTS = 16
_LENGTH = 12
_FIRST = 128
"""More first tokens, for the errors of rounding there."""
_LEFT_OUT = 16
"""Directions that residuals leave out at most, of those in which a low precision errs."""
_COARSE = 1e-5
"""Types whose epsilon is larger are of low precision."""
_NEIGHBOURS = 15
_RANDOM = 16
_ROUNDINGS = 2
"""Draws of another rounding."""


@dataclass(frozen=True)
class HeldOutRuns:
    """What a model makes of held-out prompts, before anything happens to the features.

    Attributes:
        first: ``[1 + roundings, M, 1, F]`` features of first tokens, as the model rounds, then as
            others might.
        prompts: ``[1 + roundings, N, T, F]`` the same of the prompts.
        positions: ``[P]`` at which candidates were run in the prompts.
        candidates: ``[P, N, K]`` the right token, its nearest neighbours and random tokens.
        features: ``[P, N, K, F]`` of the candidates.
    """

    first: Tensor
    prompts: Tensor
    positions: Tensor
    candidates: Tensor
    features: Tensor

    @classmethod
    @torch.no_grad()
    def measure(
        cls,
        transformer: TruncatedTransformer,
        text: Tensor | None = None,
        seed: int = 1,
        first_alone: bool = False,
    ) -> HeldOutRuns:
        """Run prompts whole, with other roundings, and token by token.

        Args:
            transformer: the frozen model; one that is not causal runs candidates in whole prompts.
            text: ``[N, T]`` ids of text to use beside random tokens.
            seed: of the random tokens and roundings.
            first_alone: run prompts of one token.
        """
        ids = held_out_prompts(transformer, text, seed)[:, : 1 if first_alone else None]
        first = _roundings(transformer, _first_tokens(transformer, seed), seed)
        prompts = _roundings(transformer, ids, seed)
        positions, *parts = zip(*_runs(transformer, ids, seed), strict=True)
        return cls(first, prompts, ids.new_tensor(positions), *map(torch.stack, parts))

    def of_slice(self, features: slice) -> HeldOutRuns:
        """The runs with a slice of the features."""
        return replace(
            self,
            first=self.first[..., features],
            prompts=self.prompts[..., features],
            features=self.features[..., features],
        )


@dataclass(frozen=True)
class HeldOut:
    """Residuals of held-out tokens at one kind of position: the first one, or a later one.

    Attributes:
        errors: ``[N, F]`` of other roundings, in std of each feature.
        left_out: ``[F, K]`` orthonormal directions in which they err most.
        right: ``[R]`` residuals of right tokens.
        wrong: ``[N]`` the smallest residual of a wrong token beside each right one.
        drawn: ``[N, 16]`` residuals of random tokens, a row a target; infinite for near ones.
        gains: ``[G]`` residuals of wrong tokens divided by the distance of their embeddings.
    """

    errors: Tensor
    left_out: Tensor
    right: Tensor
    wrong: Tensor
    drawn: Tensor
    gains: Tensor

    @classmethod
    @torch.no_grad()
    def measure(
        cls,
        transformer: TruncatedTransformer,
        probe: LinearProbe,
        stored: Callable[[Tensor], Tensor],
        runs: HeldOutRuns,
        kept: int,
    ) -> list[HeldOut]:
        """Compare what held-out prompts gave, for each kind of position that they have.

        ``stored`` is what has happened to features ``[..., F]`` of targets, of which ``kept`` are
        compared at each position.
        """

        def size(features: Tensor, target: Tensor, kind: int) -> Tensor:
            difference = (features - target) / probe.std[kind]
            if kept < difference.shape[-1]:
                difference = where_kept(difference, target, kept)
            return size_of(difference, left_out[kind])

        whole = (runs.first, runs.prompts)
        errors = [
            ((run[1:] - run[:1])[:, :, kind:] / probe.std[kind]).flatten(0, 2).nan_to_num(0, 0, 0)
            for kind, run in enumerate(whole)
        ]
        left_out = [_most_erring(some, transformer.dtype) for some in errors]
        first, targets = map(stored, whole)
        found: list[tuple[list[Tensor], ...]] = [([], [], [], []), ([], [], [], [])]
        found[0][0].append(size(runs.first[:1], first, 0).flatten())
        first_duplicate = transformer.embedding.first_duplicate.to(transformer.device)
        for position, candidates, features in zip(
            runs.positions.tolist(), runs.candidates, runs.features, strict=True
        ):
            kind = min(position, 1)
            right, wrong, drawn, gains = found[kind]
            residuals = size(features, targets[:, :, position, None], kind)
            right.append(residuals[:, :, 0].flatten())
            others = residuals[0, :, 1:]
            # A duplicate of the right token is not wrong: nothing distinguishes the two.
            same = first_duplicate[candidates[:, 1:]] == first_duplicate[candidates[:, :1]]
            known = ~same & others.isfinite()
            vectors = transformer.embedding(candidates)
            distances = (vectors[:, 1:] - vectors[:, :1]).norm(dim=-1)
            wrong.append(others.masked_fill(~known, torch.inf).amin(1))
            # Tokens that are nearly alike are always compared; rounding decides their residuals.
            usual = transformer.embedding.std * transformer.embedding.width**0.5
            apart = known & (distances > 0.05 * usual)
            drawn.append(others[:, -_RANDOM:].masked_fill(~apart[:, -_RANDOM:], torch.inf))
            gains.append((others / distances)[apart])
        return [
            cls(errors[kind], left_out[kind], *map(torch.cat, parts))
            for kind, parts in enumerate(found)
            if parts[0]
        ]

    @property
    def freedom(self) -> Tensor:
        """Half the participation ratio of the directions of errors, at least 1."""
        errors = self.errors - (self.errors @ self.left_out) @ self.left_out.T
        directions = errors / errors.norm(dim=1, keepdim=True).clamp_min(1e-30)
        products = directions @ directions.T
        ratio: Tensor = products.trace().square() / products.square().sum().clamp_min(1e-30)
        return (ratio / 2).clamp_min(1.0)


def size_of(standard: Tensor, left_out: Tensor | None = None) -> Tensor:
    """Root mean square ``[...]`` of differences ``[..., F]``, without directions ``[F, K]``."""
    squares = standard.square().mean(-1)
    if left_out is not None and left_out.shape[1]:
        along = (standard @ left_out).square().sum(-1) / standard.shape[-1]
        squares = (squares - along).clamp_min(0)
    size: Tensor = squares.sqrt()
    return size


def _most_erring(errors: Tensor, dtype: torch.dtype) -> Tensor:
    """The directions ``[F, K]`` of most of the errors ``[N, F]`` of a low precision, else none.

    A massive activation that is rounded errs far more in a few directions than in the others.
    """
    F = errors.shape[1]
    count = min(_LEFT_OUT, F // 32) if torch.finfo(dtype).eps > _COARSE else 0
    if not count:
        return errors.new_zeros(F, 0)
    axes: Tensor = torch.linalg.eigh((errors.T @ errors).double()).eigenvectors
    return axes[:, -count:].to(errors.dtype)


def _roundings(transformer: TruncatedTransformer, ids: Tensor, seed: int) -> Tensor:
    """Features ``[1 + roundings, N, T, F]``: as the model rounds, then as others might."""
    runs = [transformer.features_of(ids)]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(_ROUNDINGS):
        with rounded_differently(transformer, generator):
            runs.append(transformer.features_of(ids))
    return torch.stack(runs)


def _runs(
    transformer: TruncatedTransformer, ids: Tensor, seed: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each position, candidates ``[N, K]``, the right one first, and features ``[N, K, F]``."""
    rows = torch.arange(len(ids), device=ids.device)
    prefix = FixedPrefix(transformer, len(ids))
    # Without a causal mask each candidate takes a forward of its own: fewer positions must do.
    positions = range(0, ids.shape[1], 1 if transformer.causal else _LENGTH // 2)
    for position in counted(positions, "calibrating thresholds"):
        candidates = _right_and_wrong(transformer, ids[:, position], seed + position)
        if transformer.causal:
            features = prefix.candidates(rows, transformer.embedding(candidates))
            prefix.keep(rows, torch.zeros_like(rows))
        else:
            features = _in_context(transformer, ids, position, candidates)
        yield position, candidates, features


def held_out_prompts(transformer: TruncatedTransformer, text: Tensor | None, seed: int) -> Tensor:
    """Prompts ``[N, T]`` of random tokens, half of them of text ``[M, S]`` where there is some."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = transformer.embedding.vocabulary_size
    length = min(_LENGTH, most_positions(transformer.model.config) or _LENGTH)
    ids = torch.randint(vocabulary, (_PROMPTS, length), generator=generator)
    if text is not None and text.shape[1] >= length:
        half = min(_PROMPTS // 2, len(text))
        ids[:half] = text[-half:, -length:].cpu()
    return ids.to(transformer.device)


def _first_tokens(transformer: TruncatedTransformer, seed: int) -> Tensor:
    """Prompts ``[N, 1]`` of a random token each: position 0 has one token in each other prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(transformer.embedding.vocabulary_size, (_FIRST, 1), generator=generator)
    return ids.to(transformer.device)


def _in_context(
    transformer: TruncatedTransformer, ids: Tensor, position: int, candidates: Tensor
) -> Tensor:
    """Features ``[N, K, F]`` at a position with each of ``candidates`` [N, K] in the prompt."""
    prompts = ids[:, None].repeat(1, candidates.shape[1], 1)
    prompts[:, :, position] = candidates
    return torch.stack([transformer.features_of(some)[:, position] for some in prompts])


def _right_and_wrong(transformer: TruncatedTransformer, right: Tensor, seed: int) -> Tensor:
    """The right token, its nearest neighbours, and random tokens, ``[R, 1 + 15 + 16]``."""
    embedding = transformer.embedding
    near = embedding.nearness(embedding(right))
    count = min(_NEIGHBOURS, embedding.vocabulary_size - 1)
    near.scatter_(1, right[:, None], -torch.inf)
    neighbours = best_tokens(near, count).indices
    generator = torch.Generator().manual_seed(seed)
    size = (len(right), _RANDOM)
    random = torch.randint(embedding.vocabulary_size, size, generator=generator)
    return torch.cat([right[:, None], neighbours, random.to(right.device)], dim=1)
