"""Refutation: a token that reproduces its row, but after which no token reproduces the next one.

At a low precision two tokens may both reproduce a row, where what follows distinguishes them: all
later rows depend on the token. The next row is enough, as it bounds every token after the wrong
one: those with embeddings near the next token's are run, and others have other features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_inversion.verification.calibration import CLEARANCE, RISK, Calibration
from lightning_inversion.verification.rivals import NearTokens

_MOST = 16
"""Tokens that are refuted together at most; of more the group is left as it is."""
_EFFORT = 8192
"""Tokens of all prompts that are run to refute others at most."""
_AT_A_TIME = 512
"""Prompts of one forward."""


@dataclass(frozen=True)
class Decision:
    """How the next row decides among the tokens that reproduce a row.

    Attributes:
        refuted: those after which no token reproduces the next row.
        rival: the nearest other token that was compared; None without one.
        rival_residual: its residual.
    """

    refuted: tuple[int, ...]
    rival: int | None
    rival_residual: float | None


@dataclass(frozen=True)
class Refutation:
    """Whether the next row refutes tokens of a group.

    Attributes:
        calibration: of the model.
        near: finds the tokens near the next one.
        vocabulary: how many tokens there are.
    """

    calibration: Calibration
    near: NearTokens
    vocabulary: int

    def of_all(
        self,
        tokens: Tensor,
        residuals: Tensor,
        ids: Tensor,
        target: Tensor,
        features_of: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Those of tokens ``[N]`` that are not apart from the first of them, if all are refuted.

        Else none. Duplicates are never refuted, as what follows is the same after both.

        Args:
            tokens: the best at a position, then others.
            residuals: ``[N]`` of the tokens at that position.
            ids: ``[T]`` the prompt up to the next position, the last token of which is verified if
                the best one is right.
            target: ``[F]`` the last row.
            features_of: the features ``[N, T, F]`` of ids ``[N, T]``.
        """
        calibration, at = self.calibration, torch.full_like(tokens[1:], len(ids) - 2)
        own = residuals[:1].expand(len(at))
        explained, _ = calibration.bar(own, at, self.vocabulary)
        apart = calibration.apart(own, residuals[1:], at, self.vocabulary)
        close = torch.unique(tokens[1:][~apart])
        close = close[close != tokens[0]]
        nearest = bool((residuals[1:] >= own).all()) and bool(explained.all())
        told = calibration.has_noise or calibration.is_sparse or not calibration.has_many_features
        if not nearest or told or not 0 < len(close) <= _MOST:
            return tokens[:0]
        return close if self._all_refuted(close, ids, target, features_of) else tokens[:0]

    @torch.no_grad()
    def _all_refuted(
        self,
        others: Tensor,
        ids: Tensor,
        target: Tensor,
        features_of: Callable[[Tensor], Tensor],
    ) -> bool:
        """Whether none of others ``[N]`` can stand in place of the last token but one.

        Rounding explains the last row's residual. After another token it must be beyond that of a
        right one, and 1.5 times as large, whatever comes last. The same last token is run, and
        those near it. The features of all others are farther from those of the run than its
        residual and the bound together, by the calibration's ``gain``.
        """
        calibration, at = self.calibration, torch.tensor([len(ids) - 1], device=ids.device)

        def residuals_of(prompts: Tensor) -> Tensor:
            parts = [features_of(some)[:, -1] for some in torch.split(prompts, _AT_A_TIME)]
            found = calibration.residual(torch.cat(parts), target, at.expand(len(prompts)))
            return found.nan_to_num(nan=torch.inf)

        prompts = ids.repeat(1 + len(others), 1)
        prompts[1:, -2] = others
        found = residuals_of(prompts)
        own, far = found[:1], found[1:]
        choices = self.vocabulary * (1 + len(others))  # each token after each of the others
        explained, bar = calibration.bar(own, at, choices)
        bar = bar.maximum(CLEARANCE * own)
        rare = calibration.unseen(own, at, choices) <= RISK
        if not bool((explained & rare & (far > bar).all()).all()):
            return False
        continued = []
        for prompt, reach in zip(prompts[1:], (far + bar) / calibration.gain[1], strict=True):
            last = self.near.up_to(int(ids[-1]), float(reach))
            if last is None or len(last) * len(ids) * len(others) > _EFFORT:
                return False
            continued.append(prompt.repeat(len(last), 1))
            continued[-1][:, -1] = last
        all_continued = torch.cat(continued)
        return not len(all_continued) or bool((residuals_of(all_continued) > bar).all())
