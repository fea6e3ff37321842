"""``HiddenTokens``: the tokens that strong told noise could hide behind another one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_inversion.progress import counted
from lightning_inversion.transformer.prefix import FixedPrefix
from lightning_inversion.verification.calibration import RISK, Calibration
from lightning_inversion.verification.held_out import held_out_prompts
from lightning_inversion.verification.measurements import Measurements
from lightning_inversion.verification.rivals import NearTokens

_log = logging.getLogger(__name__)
_LENGTH = 6
"""Tokens of a context after which every token is run."""
_AT_A_TIME = 256
_MOST = 16384
"""Tokens that are compared at most; a token that noise could confuse with more is not verified."""
_ODD = 1.7
"""Of the usual distance to the median features; a token that is farther is odd in this context."""
_NEAREST, _RANDOM = 32, 16
"""Of the tokens of held-out contexts the nearest ones, and random ones."""


@dataclass(frozen=True)
class VocabularyFeatures:
    """Features of every token as the first of a prompt, and after two contexts, in float16.

    Attributes:
        features: ``[3, V, F]``; a context of text, where there is some, and one of random tokens.
    """

    features: Tensor

    @classmethod
    def of(cls, measurements: Measurements) -> VocabularyFeatures:
        """Read them from the cache folder, or compute them once for a model and depth."""
        return measurements.kept(cls, lambda: cls._scan(measurements), measurements.text)

    @classmethod
    @torch.no_grad()
    def _scan(cls, measurements: Measurements) -> VocabularyFeatures:
        transformer = measurements.transformer
        _log.info("scanning the vocabulary for what noise may hide, once for a model and depth ...")
        prompts = held_out_prompts(transformer, measurements.text, seed=3)[[0, -1], :_LENGTH]
        ids = torch.arange(transformer.embedding.vocabulary_size, device=prompts.device)
        row = torch.zeros(1, dtype=torch.long, device=prompts.device)
        prefixes = [FixedPrefix(transformer, 1)]
        for context in prompts:
            prefixes.append(FixedPrefix(transformer, 1))
            vectors = transformer.embedding(context[None])
            prefixes[-1].begin(row, vectors, row + len(context))
        parts = [
            [prefix.candidates(row, transformer.embedding(some[None]))[0].half()
             for prefix in prefixes]
            for some in counted(torch.split(ids, _AT_A_TIME), "scanning the vocabulary")
        ]  # fmt: skip
        return cls(torch.stack([torch.cat(own) for own in zip(*parts, strict=True)]))


@dataclass(frozen=True)
class KeptShare:
    """How much of the separation of two tokens another context keeps at least.

    Attributes:
        share: ``[]``, the smallest ratio over held-out contexts.
    """

    share: Tensor


class HiddenTokens:
    """The tokens that strong told noise could hide behind another one.

    Two tokens are confused where their features differ by little, in std of the noise: see
    ``NoiseKind.separation``. As the first of a prompt a token's features are known. After other
    tokens they depend on these, but the difference of two tokens' features mostly does not:
    held-out contexts show by how much a separation shrinks at most. Tokens that are so far apart
    after each of two contexts that they would be far enough after any other are not confused. A
    token whose features are far from all others' in some contexts and not in others is odd, and is
    compared wherever it is.

    Args:
        calibration: with told noise.
        table: of the model.
        share: see ``KeptShare``.
    """

    def __init__(self, calibration: Calibration, table: VocabularyFeatures, share: float) -> None:
        self.calibration, self.table, self.share = calibration, table, share
        self.kind = calibration.noise_kind
        middles, usual, odd = [], [], []
        for kind, features in enumerate(table.features):
            std = calibration.std[min(kind, 1)]
            middle = features.float().median(0).values
            sizes = _distances(features, middle, std)
            middles.append(middle)
            usual.append(sizes.median())
            odd.append(~(sizes <= _ODD * usual[-1]))
        self._middle = torch.stack(middles[1:])
        shift = _distances(self._middle[:1], self._middle[1], calibration.std[1])
        self._usual = (torch.stack(usual[1:]).square() + shift.square()).sqrt()
        self._odd = torch.stack(odd)
        self._found: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}

    @classmethod
    def of(cls, measurements: Measurements) -> HiddenTokens:
        """The hidden tokens of a model at the noise that its calibration was told."""
        table = measurements.derived(VocabularyFeatures)
        calibration = measurements.calibration
        unmeasured = cls(calibration, table, 1.0)
        measured = measurements.kept(
            KeptShare, lambda: unmeasured.measured(measurements),
            calibration.std, torch.tensor(calibration.power), measurements.text,
        )  # fmt: skip
        return cls(calibration, table, float(measured.share))

    def near(self, token: int, residual: float, target: Tensor, first: bool) -> tuple[Tensor, bool]:
        """Tokens ``[N]`` that may be hidden behind a token; and whether these are all, else none.

        That any other one is right has a chance of one in a million for all of them together.

        Args:
            token: fits the target.
            residual: of the token.
            target: ``[F]``.
            first: whether it is the first of its prompt.
        """
        own = self.table.features[0, token]
        if not (own.isfinite().all() if first else not self._is_odd(target)):
            return torch.empty(0, dtype=torch.long, device=target.device), False
        if (token, first) not in self._found:
            apart = self._apart(token, first)
            apart[token] = torch.inf
            nearest = apart.topk(min(_MOST + 1, len(apart)), largest=False)
            self._found[token, first] = nearest.indices, nearest.values
        ids, apart = self._found[token, first]
        chances = self.chance(residual, apart, first)
        beyond = self.table.features.shape[1] - len(ids)  # at least as far as the last
        left = chances.flip(0).cumsum(0).flip(0) + beyond * chances[-1]
        count = int((left > RISK).sum())
        return (ids[:count], True) if count <= _MOST else (ids[:0], False)

    def chance(self, residual: float, separations: Tensor, first: bool) -> Tensor:
        """The chance ``[N]`` that right tokens leave another one such a residual, at most.

        Their noise would have taken them towards it. A residual below 1 counts as 1: the noise then
        was told too large.

        Args:
            residual: of the other token.
            separations: ``[N]`` in the contexts that were scanned, of which others keep a share.
            first: whether it is the first of its prompt.
        """
        features, kept = self.table.features.shape[2], 1.0 if first else self.share
        logs = self.kind.chance(features, max(residual, 1.0), separations * kept / 1.02)
        return (logs + self.calibration.flattened[int(not first)]).exp()

    def _is_odd(self, target: Tensor) -> bool:
        """Whether a target ``[F]`` after other tokens is far from all usual features."""
        distances = _distances(self._middle, target, self.calibration.std[1])
        return bool((distances.square() > (_ODD * self._usual).square() + len(target)).any())

    def _apart(self, token: int, first: bool) -> Tensor:
        """The smallest separation ``[V]`` of other tokens in the contexts where neither is odd.

        It is 0 where there is no such context.
        """
        if first:
            return self._separations(0, token)
        nearest = torch.full((self.table.features.shape[1],), torch.inf, device=self._odd.device)
        for number, odd in enumerate(self._odd[1:], start=1):
            if not odd[token]:
                own = self._separations(number, token)
                nearest = torch.where(odd, nearest, nearest.minimum(own))
        return nearest.masked_fill(nearest.isinf(), 0.0)

    def _separations(self, number: int, token: int) -> Tensor:
        features, std = self.table.features[number], self.calibration.std[min(number, 1)]
        return _in_parts(self.kind.separation, features, features[token].float(), std)

    @torch.no_grad()
    def measured(self, measurements: Measurements) -> KeptShare:
        """The smallest share of the separation that tokens of held-out contexts keep."""
        transformer, std = measurements.transformer, self.calibration.std[1]
        ids = held_out_prompts(transformer, measurements.text, seed=5)
        rows = torch.arange(len(ids), device=ids.device)
        generator = torch.Generator().manual_seed(5)
        near = NearTokens.at(self.calibration, transformer.embedding)
        near.prepare(ids)
        prefix = FixedPrefix(transformer, len(ids))
        shares = [torch.ones(1, device=ids.device)]
        for position in counted(range(ids.shape[1]), "comparing contexts"):
            right = ids[:, position].tolist()
            before = torch.stack([self._apart(token, first=False) for token in right])
            for own, token in zip(before, right, strict=True):
                own[near.of_token(token)[0]] = 0.0  # always compared, whatever their distance
            drawn = torch.randint(before.shape[1], (len(ids), _RANDOM), generator=generator)
            nearest = before.masked_fill(before <= 0, torch.inf).topk(_NEAREST, largest=False)
            tried = torch.cat([ids[:, position, None], nearest.indices, drawn.to(ids.device)], 1)
            found = prefix.candidates(rows, transformer.embedding(tried))
            prefix.keep(rows, torch.zeros_like(rows))
            usual = [bool(position) and not self._is_odd(own) for own in found[:, 0]]
            apart = self.kind.separation((found - found[:, :1]) / std)[usual]
            before = before.gather(1, tried)[usual]
            some = (before > 0) & before.isfinite() & apart.isfinite()
            shares.append(apart[some] / before[some])
        return KeptShare(torch.cat(shares).min())


def _distances(features: Tensor, own: Tensor, std: Tensor) -> Tensor:
    """Distances ``[V]`` of features ``[V, F]`` to one token's, in std; infinite ones overflow."""
    return _in_parts(lambda standard: standard.norm(dim=1), features, own, std)


def _in_parts(
    measure: Callable[[Tensor], Tensor], features: Tensor, own: Tensor, std: Tensor
) -> Tensor:
    parts = [measure((some.float() - own) / std) for some in torch.split(features, 8192)]
    return torch.cat(parts).nan_to_num(nan=torch.inf)
