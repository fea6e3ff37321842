"""Features of which only the largest of each position arrive."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lightning_inversion.data.storage import Storage
from lightning_inversion.proposers.probe_proposer import ProbeProposer
from lightning_inversion.recovery.policy import Targets, recover_prompts
from lightning_inversion.recovery.token_recovery import TokenRecovery
from lightning_inversion.transformer.truncated import TruncatedTransformer
from lightning_inversion.verification import calibration
from lightning_inversion.verification.certificate import Certificate
from lightning_inversion.verification.measurements import Measurements

STORAGES = (
    Storage(largest=0.5),
    Storage("bfloat16", largest=0.6),
    Storage(largest=0.6, noise=0.005),
    Storage(largest=0.6, noise=0.005, noise_kind="laplace"),
)


@pytest.fixture
def few_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_MANY_FEATURES", 8)


@pytest.mark.usefixtures("few_features")
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_tokens_are_read_and_verified(
    tiny_transformer: TruncatedTransformer, storage: Storage
) -> None:
    measurements = Measurements.measure(tiny_transformer, None, storage)
    ids = torch.randint(300, (6, 5), generator=torch.Generator().manual_seed(3))
    target = storage(tiny_transformer.features_of(ids), torch.Generator().manual_seed(4))
    found = recover_prompts(TokenRecovery(ProbeProposer()), measurements, Targets(target, [5] * 6))
    pairs = [
        (token, right)
        for prompt, row in zip(found, ids.tolist(), strict=True)
        for token, right in zip(prompt.tokens, row, strict=True)
    ]
    assert all(token.id == right for token, right in pairs)
    assert sum(token.verified for token, _ in pairs) >= 28
    written = Certificate.of((), found[0].tokens, measurements, dataclasses.asdict(storage))
    certificate = Certificate.from_json(written.to_json())
    assert certificate.check(tiny_transformer, target[0]).holds
    assert not certificate.check(tiny_transformer, target[1]).holds


@pytest.mark.usefixtures("few_features")
def test_features_that_arrived_alone_are_compared(tiny_transformer: TruncatedTransformer) -> None:
    sparse = Measurements.measure(tiny_transformer, None, Storage(largest=0.5)).calibration
    F, at = tiny_transformer.feature_size, torch.tensor(1)
    target = torch.zeros(F)
    target[: F // 2] = 5.0
    others = target.clone()
    others[F // 2 :] = 100.0
    assert float(sparse.residual(others, target, at)) == 0
    one = target + torch.eye(F)[0] * sparse.std[1, 0]
    assert float(sparse.residual(one, target, at)) == pytest.approx((2 / F) ** 0.5)
    # Fewer features than were kept prove nothing, and none nothing at all.
    for fewer in (target.where(torch.arange(F) > 0, 0.0), torch.zeros(F)):
        assert float(sparse.residual(fewer, fewer, at)) == torch.inf


def test_too_few_features_verify_nothing_and_it_is_said(
    tiny_transformer: TruncatedTransformer, messages: list[str]
) -> None:
    storage = Storage(largest=0.25)
    measurements = Measurements.measure(tiny_transformer, None, storage)
    assert any("too few to verify a token" in message for message in messages)
    assert not measurements.calibration.verifies
    ids = torch.randint(300, (2, 3), generator=torch.Generator().manual_seed(3))
    target = storage(tiny_transformer.features_of(ids))
    for certify in ("near", "exhaustive"):
        policy = TokenRecovery(ProbeProposer(), certify=certify)
        found = recover_prompts(policy, measurements, Targets(target, [3, 3]))
        assert not any(token.verified for prompt in found for token in prompt.tokens)
