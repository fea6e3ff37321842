"""The same tokens, run or stored otherwise: what features that fit no token may be instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lightning_inversion.recovery.likely_first import FirstTokens
from lightning_inversion.transformer.embedding import best_tokens
from lightning_inversion.transformer.truncated import TruncatedTransformer
from lightning_inversion.verification.measurements import Measurements

_NEAREST = 48
"""Tokens of each shortlist."""
_REFERENCE = 128
"""Random tokens whose features give the std."""
_TOLERANCE = 0.02
"""The residual up to which features fit otherwise, beside what their storage costs."""
CLEAR = 0.5
"""The share of another residual up to which one is clearly smaller."""


@dataclass(frozen=True)
class OtherCuts:
    """The same model, cut otherwise.

    Attributes:
        at: ``(depths, final_norm) -> model``, whose features of several depths lie side by side.
        blocks: of the whole model.
    """

    at: Callable[[tuple[int, ...], bool], TruncatedTransformer]
    blocks: int


@dataclass(frozen=True)
class _Variant:
    """Another way in which the features may have been made."""

    depth: int
    final_norm: bool
    centred: bool
    features: Tensor = field(repr=False)
    """``[C, F]`` of likely tokens as first ones."""
    reference: Tensor = field(repr=False)
    """``[N, F]`` of random tokens."""


class Variants:
    """Other depths, the final norm, centring and a factor, tried on first tokens.

    Args:
        measurements: of the model.
        tokens: finds tokens to run.
        cuts: the model at other depths; without it only centring and a factor are tried.
    """

    def __init__(
        self, measurements: Measurements, tokens: FirstTokens, cuts: OtherCuts | None
    ) -> None:
        self.transformer, self.tokens, self.cuts = measurements.transformer, tokens, cuts
        self.channel = measurements.channel
        self.selection = self.transformer.selection
        generator = torch.Generator().manual_seed(2)
        vocabulary = self.transformer.embedding.vocabulary_size
        random = torch.randint(vocabulary, (_REFERENCE,), generator=generator)
        self.reference = random.to(self.transformer.device)

    def explain(
        self, row: Tensor, own_residual: float, known: Tensor | None
    ) -> tuple[str, str] | None:
        """The variant in which a token reproduces a row, and the option that sets it.

        Args:
            row: ``[F]`` the features at position 0.
            own_residual: of the nearest token in the model as it is.
            known: ``[N]`` tokens with which the prompt begins.

        Returns:
            None where there is none.
        """
        best = None
        for variant in self._variants(row, known):
            features, reference = variant.features, variant.reference
            std = reference.std(0) + 1e-6
            loss = self._loss(reference, std)
            tolerance = min(_TOLERANCE + 3 * loss, CLEAR * own_residual)
            # A norm divides each position by its size, so that a factor would explain too much.
            same_norm = variant.final_norm == self.selection.final_norm
            for scaled in (False, True) if same_norm else (False,):
                factors = torch.ones(len(features), device=row.device)
                if scaled:
                    weighted = features / std
                    factors = weighted @ (row / std) / weighted.square().sum(-1).clamp_min(1e-12)
                    factors = factors.masked_fill(factors.log().abs() < 0.01, torch.nan)
                    factors = factors.masked_fill(factors <= 0, torch.nan)
                distance = (row / factors[:, None] - features) / std
                residuals = distance.square().mean(-1).sqrt().nan_to_num(torch.inf, torch.inf)
                residual, at = residuals.min(dim=0)
                same = self._is_own(variant) and not scaled
                # The fewer changes explain the features, the better.
                rank = float(residual) + 1e-3 * (self._changes(variant) + 2 * scaled)
                if float(residual) <= tolerance and not same and (best is None or rank < best[0]):
                    best = rank, variant, float(factors[at])
        if best is None:
            return self._embeddings(row) or self._values_alone(row)
        return self._sentence(best[1], best[2])

    def _loss(self, features: Tensor, std: Tensor) -> float:
        """The residual that the storage of features ``[N, F]`` costs at most."""
        if self.channel is None:
            return 0.0
        rounded = (self.channel.without_noise(features) - features) / std
        noise = (self.channel.noise / std).square().mean().sqrt()
        return float(rounded.square().mean(-1).sqrt().max() + noise)

    def _variants(self, row: Tensor, known: Tensor | None) -> Iterator[_Variant]:
        """Each variant with the features of a shortlist of tokens."""
        own = self.selection
        lists = [
            self.tokens.nearest(row[None], _NEAREST)[0],
            self.tokens.nearest_in_direction(row, _NEAREST),
        ]
        models = self._models
        if not models:
            features, reference = map(self._features, [torch.cat(lists), self.reference])
            yield _Variant(own.depth, own.final_norm, own.centred, features, reference)
            return
        lists.append(self.tokens.nearest_in_direction(self._norm_changed(row), _NEAREST))
        ids = torch.cat([*lists, *([] if known is None else [known[:1]])]).unique()  # type: ignore[no-untyped-call]
        for (depths, final_norm), model in models.items():
            run = self._features(ids, model), self._references[depths, final_norm]
            by_depth = zip(*(part.chunk(len(depths), dim=-1) for part in run), strict=True)
            for depth, (features, reference) in zip(depths, by_depth, strict=True):
                yield _Variant(depth, final_norm, False, features, reference)
                yield _Variant(
                    depth, final_norm, True,
                    features - features.mean(-1, keepdim=True),
                    reference - reference.mean(-1, keepdim=True),
                )  # fmt: skip

    def _features(self, ids: Tensor, model: TruncatedTransformer | None = None) -> Tensor:
        """``[N, F]`` of tokens ``[N]``, each a prompt of its own."""
        return (model or self.transformer).features_of(ids[:, None])[:, 0]

    @cached_property
    def _references(self) -> dict[tuple[tuple[int, ...], bool], Tensor]:
        return {kind: self._features(self.reference, model) for kind, model in self._models.items()}

    @cached_property
    def _models(self) -> dict[tuple[tuple[int, ...], bool], TruncatedTransformer]:
        """The model at other depths and norms; none where features are of depths side by side."""
        own = self.selection
        plain = own.layers == (own.depth,) and own.features is None and not own.of_cache
        if self.cuts is None or not plain:
            return {}
        around = (own.depth - 1, own.depth, own.depth + 1)
        depths = tuple(depth for depth in around if 1 <= depth <= self.cuts.blocks)
        kinds = [(depths, False), ((own.depth,), True)]
        if self.cuts.blocks == own.depth + 1:
            kinds.append(((self.cuts.blocks,), True))
        return {kind: self.cuts.at(*kind) for kind in kinds}

    def _norm_changed(self, row: Tensor) -> Tensor:
        """A row ``[F]`` with the final norm undone, or applied where it is expected.

        The norm is an affine map of each feature, after a position is divided by its size.
        """
        slope, offset = self._norm
        if self.selection.final_norm:
            return slope * row / row.square().mean().sqrt() + offset
        small = slope.abs() < 1e-4 * slope.abs().median()
        return ((row - offset) / slope.masked_fill(small, torch.inf)).nan_to_num()

    @cached_property
    def _norm(self) -> tuple[Tensor, Tensor]:
        """Slope and offset ``[F]`` of the final norm, from tokens that are run with and without."""
        depth = self.selection.depth
        (depths, _), together = next(iter(self._references.items()))
        plain = together.chunk(len(depths), dim=-1)[depths.index(depth)]
        normed = self._references[(depth,), True]
        plain = plain / plain.square().mean(-1, keepdim=True).sqrt()
        spread = plain - plain.mean(0)
        slope = (spread * (normed - normed.mean(0))).sum(0) / spread.square().sum(0).clamp_min(
            1e-12
        )
        return slope, normed.mean(0) - slope * plain.mean(0)

    def _is_own(self, variant: _Variant) -> bool:
        return self._changes(variant) == 0

    def _changes(self, variant: _Variant) -> int:
        own = self.selection
        return (
            (variant.depth != own.depth)
            + (variant.final_norm != own.final_norm)
            + 2 * (variant.centred != own.centred)
        )

    def _sentence(self, variant: _Variant, factor: float) -> tuple[str, str]:
        own = self.selection
        fits, options = f"the features fit depth {variant.depth}", []
        if variant.depth != own.depth:
            fits += f", not {own.depth}"
            options.append(f"--model.transformer.depth {variant.depth}")
        if variant.final_norm != own.final_norm:
            fits += f" {'after' if variant.final_norm else 'before'} the final norm"
            options.append(f"--model.transformer.final_norm {str(variant.final_norm).lower()}")
        if variant.centred != own.centred:
            fits += f", {'' if variant.centred else 'not '}centred"
            options.append(f"--data.centred {str(variant.centred).lower()}")
        if factor != 1:
            fits += f", scaled by {factor:.6g}"
            options.append(f"--data.scale {factor:.6g}")
        return fits, f"set {' '.join(options)}"

    def _values_alone(self, row: Tensor) -> tuple[str, str] | None:
        """Whether the values fit and the keys do not: keys tell the position they are of."""
        if self.selection.output != "keys_values" or len(self.selection.layers) > 1:
            return None
        values = slice(len(row) // 2, None)
        without_keys = row.clone()
        without_keys[: values.start] = self.tokens.mean[: values.start]
        features = self._features(self.tokens.nearest(without_keys[None], _NEAREST)[0])
        reference = self._features(self.reference)[:, values]
        std = reference.std(0) + 1e-6
        residuals = ((features[:, values] - row[values]) / std).square().mean(-1).sqrt()
        if float(residuals.min()) > _TOLERANCE + 3 * self._loss(reference, std):
            return None
        return (
            "the values fit and the keys do not, as where they were computed at later positions "
            "(after padding on the left, without position_ids)",
            "set --model.transformer.output values",
        )

    def _embeddings(self, row: Tensor) -> tuple[str, str] | None:
        """Whether the row is a token's embedding itself."""
        embedding = self.transformer.embedding
        if len(row) != embedding.width or self.selection.of_cache:
            return None
        near = embedding.nearness(row[None])
        closest = embedding(best_tokens(near, 1).indices[0])[0]
        if float((closest - row).square().mean().sqrt()) > _TOLERANCE * float(embedding.std):
            return None
        return (
            "the features are the embeddings of tokens, before any block",
            "save the output of a block",
        )
