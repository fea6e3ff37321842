"""Verification: whether tokens reproduce the target, and no rival does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_inversion.verification.calibration import CLEARANCE, RISK, Calibration
from lightning_inversion.verification.judgement import Judgement, Verdict
from lightning_inversion.verification.measurements import Measurements
from lightning_inversion.verification.refutation import Decision, Refutation
from lightning_inversion.verification.rivals import NearFirstTokens, NearTokens
from lightning_inversion.verification.under_noise import HiddenTokens

_SMALL_VOCABULARY = 16384
"""Tokens that are all compared where the near ones do not suffice."""
_AT_A_TIME = 512
"""Prompts of one forward in which a token is replaced by one that is near it."""


def compares_all(calibration: Calibration, vocabulary: int) -> bool:
    """Whether all tokens are compared where the near ones do not suffice."""
    return vocabulary <= _SMALL_VOCABULARY and calibration.has_many_features


class Verifier:
    """Judges candidates, and decoded tokens, at the thresholds of a calibration.

    Args:
        calibration: of the model, the depth and the channel.
        near: the tokens that each token must be compared with.
        vocabulary: how many tokens there are.
        causal: whether a position sees only what is before it.
        first: asked for at position 0, where near embeddings leave open which other tokens may be
            right; None where the features of all first tokens would not tell either.
        hidden: asked for where told noise is strong; None where nothing is verified then, unless
            all tokens are compared.
    """

    def __init__(
        self,
        calibration: Calibration,
        near: NearTokens,
        vocabulary: int,
        causal: bool,
        first: NearFirstTokens | None = None,
        hidden: Callable[[], HiddenTokens] | None = None,
    ) -> None:
        self.calibration, self.near = calibration, near
        self.vocabulary, self.causal = vocabulary, causal
        self.first, self.hidden = first, hidden

    @classmethod
    def of(cls, measurements: Measurements) -> Verifier:
        """The verifier of a model at its measured thresholds."""
        transformer, calibration = measurements.transformer, measurements.calibration
        whole = transformer.causal and not calibration.is_sparse
        screens = whole and calibration.has_many_features
        scans = screens or (whole and bool(calibration.left_out.shape[2]))
        return cls(
            calibration,
            measurements.derived(NearTokens),
            transformer.embedding.vocabulary_size,
            transformer.causal,
            NearFirstTokens(measurements) if scans else None,
            (lambda: measurements.derived(HiddenTokens)) if screens else None,
        )

    def _rivals(
        self, tokens: Tensor, residuals: Tensor, positions: Tensor, target: Tensor
    ) -> Iterator[tuple[Tensor, bool, bool]]:
        """What tokens ``[R]`` must be compared with, whether this is all, and by all features.

        In a small vocabulary many tokens that were never trained may lie close together, so that
        tokens do not get rare near the target. All others are compared there.
        """
        calibration, vocabulary = self.calibration, self.vocabulary
        common = calibration.unseen(residuals, positions, vocabulary) > RISK
        small = compares_all(calibration, vocabulary)
        within = calibration.within(residuals, positions, vocabulary).tolist()
        bar = calibration.bar(residuals, positions, vocabulary)[1].maximum(CLEARANCE * residuals)
        for row, token in enumerate(tokens.tolist()):
            ids, whole = self.near.of_token(token, within[row])
            at = int(positions[row])
            if calibration.hidden[min(at, 1)] and not small:
                near, whole = self._hidden_behind(token, float(residuals[row]), target[row], at)
                yield torch.cat([ids, near[torch.isin(near, ids, invert=True)]]), whole, whole
                continue
            whole &= not bool(calibration.hidden[min(at, 1)])
            if small and (not whole or bool(common[row])):
                every = torch.arange(vocabulary, device=ids.device)
                yield every[every != token], True, True
                continue
            unsure = not whole or (calibration.has_many_features and bool(common[row]))
            scanned = unsure and self.first is not None and at == 0
            if scanned:
                assert self.first is not None
                near, whole = self.first.near(target[row], float(bar[row]))
                ids = torch.cat([ids, near[torch.isin(near, ids, invert=True) & (near != token)]])
            yield ids, whole, scanned and whole

    def _hidden_behind(
        self, token: int, residual: float, target: Tensor, at: int
    ) -> tuple[Tensor, bool]:
        """The tokens that strong noise may hide behind one that fits, and whether these are all."""
        if self.hidden is None:
            return torch.empty(0, dtype=torch.long, device=target.device), False
        return self.hidden().near(token, residual, target, first=at == 0)

    def judge(
        self,
        ids: Tensor,
        residuals: Tensor,
        positions: Tensor,
        target: Tensor,
        earlier: tuple[Tensor, Tensor] | None = None,
        compared: Tensor | None = None,
    ) -> Judgement:
        """Judge candidates by their residuals.

        Args:
            ids: ``[R, K]`` the candidates; an id may repeat.
            residuals: ``[R, K]`` of each; infinite where features overflow.
            positions: ``[R]``.
            target: ``[R, F]`` what they should reproduce.
            earlier: the nearest token ``[R]`` of those that were run before, and its residual.
            compared: ``[R]`` how many tokens have been compared at each position, where the whole
                vocabulary is to be; None compares with the near tokens alone.
        """
        calibration, vocabulary = self.calibration, self.vocabulary
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
        unrun = calibration.no_token(target, positions)
        nearest = torch.minimum(rival_residuals, unrun)
        if earlier is not None:
            unrun = unrun.minimum(earlier[1])
        apart = calibration.apart(smallest, nearest, positions, vocabulary)
        missing: list[Tensor | None] = [None] * len(ids)
        crowded, scanned = torch.zeros_like(passes), torch.zeros_like(passes)
        if compared is None:
            some = passes.nonzero()[:, 0]
            found = self._rivals(tokens[some, 0], smallest[some], positions[some], target[some])
            for row, (rest, whole, by_features) in zip(some.tolist(), found, strict=True):
                scanned[row] = by_features
                if len(rest):
                    rest = rest[torch.isin(rest, ids[row], invert=True)]
                crowded[row] = not whole
                missing[row] = rest if len(rest) else None
            # Where all tokens are compared, or all features looked through, none is left unseen.
            rare = calibration.unseen(smallest, positions, vocabulary) <= RISK
            if calibration.has_many_features:
                rare |= scanned
        else:
            rare = compared >= vocabulary
        risks = torch.full_like(smallest, torch.nan)
        if calibration.has_noise:
            # Where every token that may be right was compared, each counts by its own residual.
            risks = calibration.risk(smallest, nearest, positions, vocabulary)
            of_all = scanned if compared is None else rare
            summed = calibration.summed_risk(smallest, others, positions)
            summed += calibration.risk(smallest, unrun, positions, vocabulary)
            risks = torch.where(of_all, summed, risks)
            apart = risks <= RISK
        waiting = torch.tensor([some is not None for some in missing], device=ids.device)
        judged = passes & ~waiting
        return Judgement(
            best,
            rivals,
            rival_residuals,
            judged & apart & rare & ~crowded,
            judged & ~apart & (not calibration.has_noise),
            missing,
            scanned,
            risks,
        )

    @torch.no_grad()
    def verify(
        self,
        ids: Tensor,
        target: Tensor,
        mask: Tensor,
        features_of: Callable[[Tensor, Tensor], Tensor],
        features: Tensor | None = None,
        rivals: Mapping[tuple[int, int], Sequence[int]] | None = None,
        where: Tensor | None = None,
    ) -> Verdict:
        """Compare decoded tokens, and the tokens near them, with the target.

        Where several tokens reproduce it, the next row decides if all others are refuted by it.

        Args:
            ids: ``[B, T]`` the decoded tokens.
            target: ``[B, T, F]``.
            mask: ``[B, T]`` True at a token.
            features_of: the features of ids under a mask.
            features: ``[B, T, F]`` of ``ids``, where they are known.
            rivals: the nearest other tokens of the whole vocabulary, at rows and positions where
                they are known.
            where: ``[B, T]`` bool; the tokens to judge; default all.
        """
        calibration = self.calibration
        positions = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
        if features is None:
            features = features_of(ids, mask)
        residuals = calibration.residual(features, target, positions).nan_to_num(nan=torch.inf)
        passes = calibration.passes(residuals, positions) & mask
        if where is not None:
            passes &= where
        alone, group = torch.zeros_like(mask), torch.zeros_like(mask)
        self.near.prepare(ids[passes])
        at = [(row, position) for row, position in passes.nonzero().tolist()]
        known = rivals or {}
        near = self._rivals(ids[passes], residuals[passes], positions[passes], target[passes])
        others = [
            torch.cat([rest, ids.new_tensor(known.get(one, []))])
            for one, (rest, *_) in zip(at, near, strict=True)
        ]
        far = self._in_place(ids, target, mask, at, others, features_of)
        refutation = Refutation(calibration, self.near, self.vocabulary)
        decisions: dict[tuple[int, int], Decision] = {}
        # From the last one on: a token that is verified shows what cannot come before it.
        for one, rest, residual in reversed(list(zip(at, others, far, strict=True))):
            tokens = torch.cat([ids[one][None], rest])[None]
            shown = torch.cat([residuals[one][None], residual])[None]
            compared = ids.new_tensor([self.vocabulary]) if one in known else None
            judged = self.judge(
                tokens, shown, positions[one][None], target[one][None], compared=compared
            )
            row, following = one[0], one[1] + 1
            follows = self.causal and following < ids.shape[1] and bool(alone[row, following])
            if follows and judged.group[0]:
                refuted = refutation.of_all(
                    tokens[0], shown[0], ids[row, : following + 1], target[row, following],
                    lambda some: features_of(some, torch.ones_like(some, dtype=torch.bool)),
                )  # fmt: skip
                shown = shown.masked_fill(torch.isin(tokens, refuted), torch.inf)
                without = self.judge(
                    tokens, shown, positions[one][None], target[one][None], compared=compared
                )
                if without.verified[0]:
                    judged = without
                    decisions[one] = Decision(tuple(refuted.tolist()), *without.rival_of(0))
            alone[one] = judged.verified[0] & (judged.best[0] == 0)
            group[one] = judged.group[0]
        thresholds = calibration.limit(positions)
        if self.causal:
            verified = (alone | ~mask).cummin(dim=1).values
        else:
            verified = (alone | ~mask).all(dim=1, keepdim=True).expand_as(mask)
        verified = verified & mask
        return Verdict(verified, alone & ~verified, group, residuals, thresholds, decisions)

    def _in_place(
        self,
        ids: Tensor,
        target: Tensor,
        mask: Tensor,
        at: list[tuple[int, int]],
        others: list[Tensor],
        features_of: Callable[[Tensor, Tensor], Tensor],
    ) -> Iterable[Tensor]:
        """Residuals of other tokens ``[N]`` in place of those at rows and positions, together."""
        sizes = [len(some) for some in others]
        if not any(sizes):
            return [target.new_zeros(0)] * len(at)
        where = torch.tensor(at, device=ids.device).repeat_interleave(
            torch.tensor(sizes, device=ids.device), dim=0
        )
        tokens, found = torch.cat(others), []
        for some, own in zip(
            torch.split(where, _AT_A_TIME), torch.split(tokens, _AT_A_TIME), strict=True
        ):
            rows, positions = some.unbind(1)
            prompts = ids[rows]
            each = torch.arange(len(rows), device=ids.device)
            prompts[each, positions] = own
            features = features_of(prompts, mask[rows])[each, positions]
            found.append(self.calibration.residual(features, target[rows, positions], positions))
        return torch.split(torch.cat(found).nan_to_num(nan=torch.inf), sizes)
