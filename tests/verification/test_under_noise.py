"""The tokens that strong told noise could hide are found by their features."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch

from lightning_inversion.data.storage import Storage
from lightning_inversion.proposers.probe_proposer import ProbeProposer
from lightning_inversion.recovery.policy import Targets, recover_prompts
from lightning_inversion.recovery.token_recovery import TokenRecovery
from lightning_inversion.verification import calibration, verifier
from lightning_inversion.verification.calibration import RISK, Calibration
from lightning_inversion.verification.certificate import Certificate
from lightning_inversion.verification.measurements import Measurements
from lightning_inversion.verification.noise import NoiseName
from lightning_inversion.verification.under_noise import HiddenTokens


def under(measurements: Measurements, storage: Storage) -> Measurements:
    of = Calibration.measure(measurements.transformer, measurements.probe, storage)
    return dataclasses.replace(measurements, calibration=of)


@pytest.fixture(scope="module", params=get_args(NoiseName))
def strong(
    measurements: Measurements, request: pytest.FixtureRequest
) -> tuple[Measurements, Storage]:
    """Noise in which a token that is not near by its embedding could pass for the target."""
    usual = measurements.calibration
    noise = float((usual.wrong * usual.std.median(dim=1).values).amax()) / 1.8
    storage = Storage(noise=noise, noise_kind=request.param)
    return under(measurements, storage), storage


@pytest.mark.parametrize("kind", get_args(NoiseName))
@pytest.mark.parametrize("position", [0, 4])
def test_all_tokens_that_noise_could_hide_are_found(
    measurements: Measurements, position: int, kind: NoiseName
) -> None:
    """In contexts that nothing was measured in."""
    weak = under(measurements, Storage(noise=0.02, noise_kind=kind))
    hidden = weak.derived(HiddenTokens)
    transformer, vocabulary = weak.transformer, weak.transformer.embedding.vocabulary_size
    generator = torch.Generator().manual_seed(9)
    found = 0
    for ids in torch.randint(vocabulary, (8, position + 1), generator=generator):
        texts = ids.repeat(vocabulary, 1)
        texts[:, position] = torch.arange(vocabulary)
        features = transformer.features_of(texts)[:, position]
        token = int(ids[position])
        std = weak.calibration.std[min(position, 1)]
        apart = hidden.kind.separation((features - features[token]) / std)
        near, whole = hidden.near(token, 1.0, features[token], first=position == 0)
        if whole:
            found += 1
            missed = apart <= hidden.reach(1.0, first=True)
            missed[near] = False
            assert missed.nonzero()[:, 0].tolist() in ([], [token])
    assert found >= 4


def test_tokens_are_verified_under_strong_noise(
    strong: tuple[Measurements, Storage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a large vocabulary; none falsely, and the certificate is checked without the scan."""
    measurements, storage = strong
    assert measurements.calibration.hidden.all()
    monkeypatch.setattr(verifier, "_SMALL_VOCABULARY", 0)
    monkeypatch.setattr(calibration, "_MANY_FEATURES", 0)
    ids = torch.randint(300, (6, 5), generator=torch.Generator().manual_seed(3))
    target = storage(measurements.transformer.features_of(ids), torch.Generator().manual_seed(4))
    found = recover_prompts(TokenRecovery(ProbeProposer()), measurements, Targets(target, [5] * 6))
    pairs = [
        (token, right)
        for prompt, row in zip(found, ids.tolist(), strict=True)
        for token, right in zip(prompt.tokens, row, strict=True)
    ]
    assert not any(token.verified and token.id != right for token, right in pairs)
    verified = [token for token, _ in pairs if token.verified]
    assert len(verified) >= 5
    assert all(token.risk is not None and token.risk <= RISK for token in verified)
    row = next(number for number, prompt in enumerate(found) if prompt.tokens[0].verified)
    tokens = found[row].tokens
    certificate = Certificate.of((), tokens, measurements, dataclasses.asdict(storage))
    check = certificate.check(measurements.transformer, target[row])
    assert check.holds
    assert check.reproduced[0]


def test_noise_told_too_small_is_not_believed(measurements: Measurements) -> None:
    """Few features let such noise pass; a residual above 1 then is its std."""
    noisy = under(measurements, Storage(noise=0.01)).calibration
    at = torch.ones(2, dtype=torch.long)
    own, rivals = torch.tensor([1.0, 1.4]), torch.tensor([2.0, 2.8])
    likelier = noisy.likelier(own, rivals, at)
    torch.testing.assert_close(likelier[0], likelier[1])
