"""Whether rows look like those of later positions, by how such rows of a model lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_inversion.proposers.probe_proposer import ProbeRanking
from lightning_inversion.transformer.blocks import most_positions
from lightning_inversion.transformer.linear_probe import as_frequent_as_in_text
from lightning_inversion.verification.measurements import Measurements

_SEQUENCES, _LENGTH = 80, 24
"""Sequences of random tokens, and of tokens as frequent as in text, whose later rows are run."""
_HELD_OUT = 0.2
"""Share of the sequences that the covariance is not of."""
_MOST_ROWS = 16
"""Rows of a prompt that are looked at."""
_MARGIN = 2.0
"""How much farther rows of other text may lie than those that are known."""
_MINOR = 0.125
"""Share of the directions that counts as those of least variance."""


@dataclass(frozen=True)
class LaterRows:
    """How rows of later positions lie, and rows that are none but are made of them.

    Three measures of the rows of a prompt: their size after whitening, how far the linear probe's
    guesses are from those of tokens, and how much rows differ from each other in the directions in
    which rows vary least: projected ones do not.

    Attributes:
        mean: ``[F]`` of later rows.
        whitening: ``[F, F]``, the directions in which they vary least first.
        known: ``[S, L, 2 + M]`` of rows that the covariance is not of: the squared size, the misfit
            and the coordinates along the M directions of least variance.
        others: ``[N, L, 2 + M]`` those of differences, projections, rows with their features
            shuffled, and noise.
        ranking: reads the probe's guesses.
        measurements: of the model.
    """

    mean: Tensor
    whitening: Tensor
    known: Tensor
    others: Tensor
    ranking: ProbeRanking
    measurements: Measurements

    @classmethod
    @torch.no_grad()
    def of(cls, measurements: Measurements) -> LaterRows:
        """Run random tokens; the model writes no text for it."""
        measurements = replace(measurements, probe=measurements.probe_of(None))
        sequences = list(_sequences(measurements))
        fitted = torch.cat([rows[_held_out(rows) :].flatten(0, 1) for rows in sequences])
        mean = fitted.mean(0)
        variances, axes = torch.linalg.eigh((fitted - mean).T @ (fitted - mean) / len(fitted))
        whitening = axes / variances.clamp_min(1e-6 * float(variances.mean())).sqrt()
        rows = torch.cat([rows[: _held_out(rows)] for rows in sequences])
        empty = rows.new_zeros(0, 0, 0)
        ranking = measurements.derived(ProbeRanking)
        made = cls(mean, whitening, empty, empty, ranking, measurements)
        others = torch.cat([made._measures(some) for some in _no_rows(rows, mean, axes)])
        return cls(mean, whitening, made._measures(rows), others, ranking, measurements)

    @torch.no_grad()
    def include(self, rows: Tensor) -> bool | None:
        """Whether rows ``[T, F]`` of a prompt look like later ones.

        Returns:
            None where so many rows of this model do not tell: others look alike.
        """
        count = min(len(rows), _MOST_ROWS, self.known.shape[1])
        if count < 2:
            return None
        known, others = (_of_prompts(part[:, :count]) for part in (self.known, self.others))
        largest = known.amax(0) * known.new_tensor([_MARGIN**2, _MARGIN, torch.inf])
        smallest = known.amin(0) / known.new_tensor([_MARGIN**2, torch.inf, _MARGIN**2])

        def inside(measures: Tensor) -> Tensor:
            return ((measures >= smallest) & (measures <= largest)).all(-1)

        if bool(inside(others).any()):
            return None
        own = _of_prompts(self._measures(rows[None, :count].double()))
        return bool(inside(own)[0])

    def _measures(self, rows: Tensor) -> Tensor:
        """``[S, L, 2 + M]`` of rows ``[S, L, F]``, float64."""
        white = (rows - self.mean) @ self.whitening
        minor = white[..., : max(1, round(_MINOR * white.shape[-1]))]
        later = torch.ones(rows.shape[:2], dtype=torch.long, device=rows.device)
        guesses = self.measurements.probe(rows.float(), later).flatten(0, 1)
        at_a_time = self.measurements.transformer.embedding.at_a_time
        misfits = [self.ranking.misfit(some) for some in torch.split(guesses, at_a_time)]
        misfit = torch.cat(misfits).view(*rows.shape[:2], 1).double()
        return torch.cat([white.square().mean(-1, keepdim=True), misfit, minor], dim=-1)


def _of_prompts(rows: Tensor) -> Tensor:
    """The three measures ``[S, 3]`` of the rows ``[S, L, 2 + M]`` of prompts."""
    differ = rows[..., 2:].var(dim=1, correction=0).mean(-1, keepdim=True)
    return torch.cat([rows[..., :2].mean(1), differ], dim=-1)


def _held_out(rows: Tensor) -> int:
    return max(1, round(_HELD_OUT * len(rows)))


def _sequences(measurements: Measurements) -> Iterator[Tensor]:
    """Later rows ``[S, L, F]`` of random tokens, drawn evenly and as in text, float64."""
    transformer = measurements.transformer
    vocabulary = transformer.embedding.vocabulary_size
    generator = torch.Generator().manual_seed(3)
    length = min(_LENGTH, most_positions(transformer.model.config) or _LENGTH)
    size = (_SEQUENCES, length)
    evenly = torch.randint(vocabulary, size, generator=generator)
    for some in (evenly, as_frequent_as_in_text(vocabulary, size, generator)):
        yield transformer.features_of(some.to(transformer.device))[:, 1:].double()


def _no_rows(rows: Tensor, mean: Tensor, axes: Tensor) -> Iterator[Tensor]:
    """What is made of rows ``[S, L, F]``, and is no row of any text; in the same shape."""
    generator = torch.Generator().manual_seed(4)
    F = rows.shape[-1]
    yield rows - rows.flip(1)
    yield rows - rows.roll(1, 0)
    for share in (0.125, 0.5, 0.75):
        kept = axes[:, F - round(share * F) :]
        yield (rows - mean) @ kept @ kept.T + mean
        yield rows @ kept @ kept.T
    yield rows[..., torch.randperm(F, generator=generator).to(rows.device)]
    drawn = torch.randn(rows.shape, generator=generator, dtype=rows.dtype).to(rows.device)
    yield mean + rows.std((0, 1)) * drawn
