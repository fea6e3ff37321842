"""Verification: whether tokens reproduce the target, and no rival does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_inversion.recovery.calibration import RISK
from lightning_inversion.recovery.measurements import Measurements
from lightning_inversion.recovery.rivals import NearTokens


@dataclass(frozen=True)
class Judgement:
    """What comparing candidates with a target has shown, for R positions.

    Attributes:
        best: ``[R]`` the column of the candidate that came closest.
        rivals: ``[R]`` the nearest other token that was compared; -1 without one.
        rival_residuals: ``[R]`` its residual; infinite without one.
        verified: ``[R]`` bool; the best candidate reproduces the target, and no rival does.
        group: ``[R]`` bool; others reproduce it as well, so that which is right stays open.
        missing: tokens near the best candidate that must be compared before it is judged, for each
            position; None where there is none. Such a position is neither verified nor a group.
    """

    best: Tensor
    rivals: Tensor
    rival_residuals: Tensor
    verified: Tensor
    group: Tensor
    missing: list[Tensor | None]


def judge(
    measurements: Measurements,
    ids: Tensor,
    residuals: Tensor,
    positions: Tensor,
    earlier: tuple[Tensor, Tensor] | None = None,
    compared: Tensor | None = None,
) -> Judgement:
    """Judge candidates by their residuals.

    Args:
        measurements: of the model.
        ids: ``[R, K]`` the candidates; an id may repeat.
        residuals: ``[R, K]`` of each; infinite where features overflow.
        positions: ``[R]``.
        earlier: the nearest token ``[R]`` of those that were run before, and its residual.
        compared: ``[R]`` how many tokens have been compared at each position, where the whole
            vocabulary is to be; None compares with the near tokens alone.
    """
    calibration = measurements.calibration
    vocabulary = measurements.transformer.embedding.vocabulary_size
    smallest, best = residuals.min(dim=1)
    tokens = ids.gather(1, best[:, None])
    others = residuals.masked_fill(ids == tokens, torch.inf)
    rival_residuals, columns = others.min(dim=1)
    rivals = ids.gather(1, columns[:, None])[:, 0]
    if earlier is not None:
        before = earlier[1] < rival_residuals
        rivals = torch.where(before, earlier[0], rivals)
        rival_residuals = torch.where(before, earlier[1], rival_residuals)
    rivals = torch.where(rival_residuals.isinf(), -1, rivals)

    passes = calibration.passes(smallest, positions)
    apart = calibration.apart(smallest, rival_residuals, positions, vocabulary)
    missing: list[Tensor | None] = [None] * len(ids)
    crowded = torch.zeros_like(passes)
    if compared is None:
        near = measurements.derived(NearTokens)
        for row in passes.nonzero()[:, 0].tolist():
            token = int(tokens[row])
            rest = near.of_token(token)
            if len(rest):
                rest = rest[torch.isin(rest, ids[row], invert=True)]
            crowded[row] = token in near.crowded
            missing[row] = rest if len(rest) else None
        rare = calibration.unseen(smallest, positions, vocabulary) <= RISK
    else:
        rare = compared >= vocabulary
    waiting = torch.tensor([some is not None for some in missing], device=ids.device)
    judged = passes & ~waiting
    return Judgement(
        best,
        rivals,
        rival_residuals,
        judged & apart & rare & ~crowded,
        judged & ~apart & (not calibration.has_noise),
        missing,
    )


@dataclass(frozen=True)
class Verdict:
    """What running decoded tokens has shown.

    Attributes:
        verified: ``[B, T]`` bool; True where the token and, in a causal model, all before it
            reproduce the target, and no rival does.
        conditional: ``[B, T]`` bool; the token and no rival reproduces the target, but one before
            it is not verified.
        group: ``[B, T]`` bool; the token reproduces the target, and so do others.
        residuals: ``[B, T]`` of each position, see ``Calibration``.
        thresholds: ``[B, T]`` the residual up to which a position counts as reproduced.
    """

    verified: Tensor
    conditional: Tensor
    group: Tensor
    residuals: Tensor
    thresholds: Tensor


def verify(
    ids: Tensor,
    target: Tensor,
    mask: Tensor,
    measurements: Measurements,
    features_of: Callable[[Tensor, Tensor], Tensor],
    features: Tensor | None = None,
) -> Verdict:
    """Compare decoded tokens, and the tokens near them, with the target.

    Args:
        ids: ``[B, T]`` the decoded tokens.
        target: ``[B, T, F]``.
        mask: ``[B, T]`` True at a token.
        measurements: of the transformer that made the target.
        features_of: the features of ids under a mask.
        features: ``[B, T, F]`` of ``ids``, where they are known.
    """
    calibration, near = measurements.calibration, measurements.derived(NearTokens)
    positions = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    if features is None:
        features = features_of(ids, mask)
    residuals = calibration.residual(features, target, positions).nan_to_num(nan=torch.inf)
    passes = calibration.passes(residuals, positions) & mask
    alone, group = torch.zeros_like(mask), torch.zeros_like(mask)
    near.prepare(ids[passes])
    for row, position in passes.nonzero().tolist():
        candidates = torch.cat([ids[row, position, None], near.of_token(int(ids[row, position]))])
        prompts = ids[row].repeat(len(candidates), 1)
        prompts[:, position] = candidates
        own = residuals[row, position, None]
        at = positions[row, position]
        if len(candidates) > 1:
            others = features_of(prompts[1:], mask[row].expand(len(candidates) - 1, -1))[
                :, position
            ]
            far = calibration.residual(others, target[row, position], at)
            own = torch.cat([own, far.nan_to_num(nan=torch.inf)])
        judged = judge(measurements, candidates[None], own[None], at[None])
        alone[row, position] = judged.verified[0] & (judged.best[0] == 0)
        group[row, position] = judged.group[0]
    thresholds = calibration.limit(positions)
    if measurements.transformer.causal:
        verified = (alone | ~mask).cummin(dim=1).values
    else:
        verified = (alone | ~mask).all(dim=1, keepdim=True).expand_as(mask)
    verified = verified & mask
    return Verdict(verified, alone & ~verified, group, residuals, thresholds)
