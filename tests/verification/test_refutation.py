"""Where two tokens reproduce a row, the next row decides, if no token reproduces it after one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lightning_inversion.proposers.probe_proposer import ProbeProposer
from lightning_inversion.recovery.policy import Targets, recover_prompts
from lightning_inversion.recovery.token_recovery import TokenRecovery
from lightning_inversion.verification.calibration import CLEARANCE
from lightning_inversion.verification.certificate import Certificate
from lightning_inversion.verification.judgement import Verdict
from lightning_inversion.verification.measurements import Measurements
from lightning_inversion.verification.verifier import Verifier
from tests.tiny import VOCABULARY

IDS = [9, 3, 5, 4]


@dataclasses.dataclass(frozen=True)
class Coarse:
    """A model whose errors at position 0 are as large as the distance of the nearest token.

    Attributes:
        measurements: with such a calibration.
        target: ``[1, T, F]`` of ``IDS``.
        rival: the nearest token at position 0.
        after_rival: ``[T]`` residuals after it, of the tokens of ``IDS``.
    """

    measurements: Measurements
    target: torch.Tensor
    rival: int
    after_rival: torch.Tensor

    def verdict(self, ids: list[int], measurements: Measurements | None = None) -> Verdict:
        measurements, found = measurements or self.measurements, torch.tensor([ids])
        return measurements.derived(Verifier).verify(
            found, self.target[:, : len(ids)], torch.ones_like(found, dtype=torch.bool),
            measurements.transformer.features_of,
        )  # fmt: skip

    def with_rounding(self, first: float, later: float) -> Measurements:
        kept = self.measurements.calibration
        rounding = torch.tensor([first, later])
        return dataclasses.replace(
            self.measurements,
            calibration=dataclasses.replace(
                kept, rounding=rounding, threshold=torch.maximum(kept.threshold, rounding)
            ),
        )


@pytest.fixture
def coarse(measurements: Measurements, monkeypatch: pytest.MonkeyPatch) -> Coarse:
    monkeypatch.setattr("lightning_inversion.verification.calibration._MANY_FEATURES", 32)
    features_of, calibration = measurements.transformer.features_of, measurements.calibration
    target = features_of(torch.tensor([IDS]))
    first = torch.zeros(VOCABULARY, dtype=torch.long)
    every = features_of(torch.arange(VOCABULARY)[:, None])[:, 0]
    residuals = calibration.residual(every, target[0, 0], first)
    order = residuals.argsort()
    assert int(order[0]) == IDS[0]
    rival = int(order[1])
    after = features_of(torch.tensor([[rival, *IDS[1:]]]))[0]
    limit = (residuals[rival] * residuals[order[2]]).sqrt()  # only the rival is so near
    own = dataclasses.replace(
        calibration,
        rounding=torch.stack([limit, calibration.rounding[1]]),
        threshold=torch.stack([limit, calibration.threshold[1]]),
    )
    return Coarse(
        dataclasses.replace(measurements, calibration=own),
        target,
        rival,
        calibration.residual(after, target[0], torch.arange(len(IDS))),
    )


def test_the_next_row_verifies_a_token_of_a_group(coarse: Coarse) -> None:
    verdict = coarse.verdict(IDS)
    assert verdict.verified.all()
    assert not verdict.group.any()
    assert list(verdict.decisions) == [(0, 0)]
    decision = verdict.decisions[0, 0]
    assert decision.refuted == (coarse.rival,)
    assert decision.rival not in (IDS[0], coarse.rival)
    calibration = coarse.measurements.calibration
    assert decision.rival_residual is not None
    assert decision.rival_residual > calibration.rounding[0]
    assert coarse.after_rival[1] > CLEARANCE * calibration.rounding[1]


def test_without_a_next_row_a_group_stays_one(coarse: Coarse) -> None:
    verdict = coarse.verdict(IDS[:1])
    assert verdict.group.tolist() == [[True]]
    assert not verdict.verified.any()
    wrong = coarse.verdict([IDS[0], IDS[1] + 1])
    assert wrong.group.tolist() == [[True, False]]
    assert not wrong.alone.any()


def test_the_rival_itself_is_not_verified(coarse: Coarse) -> None:
    verdict = coarse.verdict([coarse.rival, *IDS[1:]])
    assert not verdict.alone[0, 0]
    assert not verdict.verified.any()
    assert not verdict.decisions


def test_a_next_row_that_the_rival_reproduces_too_decides_nothing(coarse: Coarse) -> None:
    """Within what rounding may give a right token, the residual after the rival shows nothing."""
    limit = float(coarse.measurements.calibration.rounding[0])
    later = 1.1 * float(coarse.after_rival[1])
    verdict = coarse.verdict(IDS[:2], coarse.with_rounding(limit, later))
    assert not verdict.decisions
    assert not verdict.verified.any()


def test_tokens_near_the_next_one_are_run_after_the_rival(
    coarse: Coarse, monkeypatch: pytest.MonkeyPatch
) -> None:
    verifier, features_of = (
        coarse.measurements.derived(Verifier),
        coarse.measurements.transformer.features_of,
    )
    run: list[list[int]] = []
    monkeypatch.setattr(verifier.near, "up_to", lambda *_: torch.tensor([7, 8]))
    ids = torch.tensor([IDS])
    mask = torch.ones_like(ids, dtype=torch.bool)

    def kept(some: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        run.extend(some.tolist())
        found = features_of(some, own)
        if reproduced and some.shape[1] == 2:
            found[(some == torch.tensor([coarse.rival, 8])).all(1), 1] = coarse.target[0, 1]
        return found

    for reproduced in (False, True):
        verdict = verifier.verify(ids, coarse.target, mask, kept)
        assert [coarse.rival, 7] in run
        assert [coarse.rival, 8] in run
        assert verdict.verified[0, 0] != reproduced
        assert verdict.group[0, 0] == reproduced
    # Not all tokens near the next one are known: any of them could come after the rival.
    reproduced = False
    monkeypatch.setattr(verifier.near, "up_to", lambda *_: None)
    assert not verifier.verify(ids, coarse.target, mask, kept).decisions


def test_a_duplicate_is_never_refuted(coarse: Coarse) -> None:
    transformer = coarse.measurements.transformer
    embedding = transformer.embedding
    original = embedding.matrix.clone()
    try:
        with torch.no_grad():
            embedding.matrix[coarse.rival] = embedding.matrix[IDS[0]]
        embedding._apply(lambda tensor: tensor)  # drops what was computed from the matrix
        fresh = dataclasses.replace(coarse.measurements)
        verdict = coarse.verdict(IDS, fresh)
        assert verdict.group[0, 0]
        assert not verdict.verified.any()
    finally:
        with torch.no_grad():
            embedding.matrix.copy_(original)
        embedding._apply(lambda tensor: tensor)


def test_a_recovered_group_is_decided_and_checked_again(coarse: Coarse) -> None:
    measurements = coarse.measurements
    policy = TokenRecovery(ProbeProposer(), candidates=32)
    (found,) = recover_prompts(policy, measurements, Targets(coarse.target, [len(IDS)]))
    assert found.ids == IDS
    assert found.verified
    first = found.tokens[0]
    assert first.refuted == (coarse.rival,)
    assert not first.alternatives
    assert first.margin is not None
    assert first.margin >= CLEARANCE
    assert not any(token.refuted for token in found.tokens[1:])
    written = Certificate.of((), found.tokens, measurements, {})
    certificate = Certificate.from_json(written.to_json())
    assert certificate.tokens == written.tokens
    check = certificate.check(measurements.transformer, coarse.target[0])
    assert check.holds
    assert all(check.reproduced)
    other = dataclasses.replace(first, id=coarse.rival, refuted=(IDS[0],))
    swapped = dataclasses.replace(certificate, tokens=(other, *certificate.tokens[1:]))
    assert not swapped.check(measurements.transformer, coarse.target[0])
    # The last token of a prompt has no next row.
    (short,) = recover_prompts(policy, measurements, Targets(coarse.target[:, :1], [1]))
    assert [token.state for token in short.tokens] == ["group"]


def test_errors_towards_the_rival_verify_no_wrong_token(coarse: Coarse) -> None:
    """Where the first row is nearer to the rival's, the next row lets neither of the two pass."""
    measurements, transformer = coarse.measurements, coarse.measurements.transformer
    generator = torch.Generator().manual_seed(0)
    right = torch.randint(VOCABULARY, (60, 3), generator=generator)
    right[:, 0] = IDS[0]
    wrong = right.clone()
    wrong[:, 0] = coarse.rival
    target, other = transformer.features_of(right), transformer.features_of(wrong)
    share = torch.rand(60, 1, generator=generator)
    target[:, 0] += share * (other[:, 0] - target[:, 0])
    limit = measurements.calibration.rounding[1] * measurements.calibration.std[1]
    target[:, 1:] += 0.3 * limit * torch.randn(60, 2, limit.shape[0], generator=generator)
    mask, verifier = torch.ones_like(right, dtype=torch.bool), measurements.derived(Verifier)
    shown = [
        verifier.verify(ids, target, mask, transformer.features_of).alone[:, 0].tolist()
        for ids in (right, wrong)
    ]
    assert not any(shown[1])
    # The right one is verified where it is the nearest one.
    assert shown[0] == (share[:, 0] < 0.5).tolist()
