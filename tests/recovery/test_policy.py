"""A policy is settings: one object serves several recoveries at once."""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest

import pytest
import torch

from lightning_inversion.recovery.policy import (
    RecoveredPrompt,
    RecoveryPolicy,
    Targets,
    recover_prompts,
)
from lightning_inversion.recovery.sipit import SIPIT
from lightning_inversion.recovery.token_recovery import TokenRecovery
from lightning_inversion.verification.certificate import TokenCertificate
from lightning_inversion.verification.measurements import Measurements

IDS = torch.tensor([[7, 40, 3, 250, 9], [12, 7, 88, 41, 230]])
OTHERS = torch.tensor([[99, 12, 288, 5], [31, 144, 270, 6], [1, 2, 3, 4]])


def comparable(prompts: list[RecoveredPrompt]) -> list[list[TokenCertificate]]:
    """The certificates, but for the seconds."""
    return [[replace(token, seconds=0.0) for token in prompt.tokens] for prompt in prompts]


@pytest.mark.parametrize(
    ("policy", "lengths"),
    [
        pytest.param(
            TokenRecovery(candidates=8, max_candidates=32), ([5, 3], [4, 2, 4]), id="TokenRecovery"
        ),
        pytest.param(SIPIT(), ([1, 2], [2, 1, 1]), id="SIPIT", marks=pytest.mark.integration),
    ],
)
def test_two_recoveries_round_by_round_with_one_policy(
    policy: RecoveryPolicy,
    lengths: tuple[list[int], list[int]],
    measurements: Measurements,
    other_measurements: Measurements,
) -> None:
    """Different prompts, models and numbers of rounds."""
    cases = [
        (measurements, Targets(measurements.transformer.features_of(IDS), lengths[0])),
        (
            other_measurements,
            Targets(other_measurements.transformer.features_of(OTHERS), lengths[1]),
        ),
    ]
    expected = [comparable(recover_prompts(policy, *case)) for case in cases]
    prompts: list[list[RecoveredPrompt]] = [[], []]
    rounds = [0, 0]
    with torch.no_grad():
        for both in zip_longest(*(policy.recover(*case) for case in cases)):
            for number, found in enumerate(both):
                if found is not None:
                    prompts[number] = found
                    rounds[number] += 1
    assert min(rounds) > 2
    assert [comparable(found) for found in prompts] == expected
    for found, ids, own in zip(prompts, (IDS, OTHERS), lengths, strict=True):
        assert all(prompt.verified for prompt in found)
        assert [prompt.ids for prompt in found] == [
            row[:length] for row, length in zip(ids.tolist(), own, strict=True)
        ]


def test_each_round_is_reported(measurements: Measurements) -> None:
    target = measurements.transformer.features_of(IDS[:1])
    found: list[int] = []
    (prompt,) = recover_prompts(
        TokenRecovery(candidates=8),
        measurements,
        Targets(target, [5], (7, 40)),
        lambda prompts: found.append(len(prompts[0].ids)),
    )
    assert prompt.known == (7, 40)
    assert found[-1] == 5
    assert found == sorted(found)


def certificate(**changes: object) -> TokenCertificate:
    values = {
        "id": 4, "state": "unresolved", "residual": 0.2, "threshold": 0.1, "rival": 5,
        "rival_residual": 0.3, "compared": 9, "proposer": "P", "seconds": 1.0,
        "alternatives": (4, 5, 6),
    }  # fmt: skip
    return TokenCertificate(**{**values, **changes})  # type: ignore[arg-type]


def test_a_token_gives_way_to_one_of_its_alternatives() -> None:
    other = certificate().replaced_by(6, 0.25)
    assert (other.id, other.residual, other.alternatives) == (6, 0.25, (6, 4, 5))
    assert other.replaced_by(4, 0.2).alternatives == (4, 6, 5)


def test_a_margin_is_the_rivals_residual_over_the_tokens_own() -> None:
    assert certificate().margin == pytest.approx(1.5)
    assert certificate(rival=None, rival_residual=None).margin is None


def test_behind_a_token_that_is_not_verified_the_next_is_conditional() -> None:
    verified = certificate(state="verified")
    assert verified.after(True).verified
    assert verified.after(False).state == "conditional"
    assert not verified.after(False).verified
    assert certificate(state="group").after(True).state == "group"


def test_known_tokens_need_no_certificate() -> None:
    prompt = RecoveredPrompt([certificate(state="verified")], known=(1, 2))
    assert prompt.ids == [1, 2, 4]
    assert prompt.verified
    prompt.tokens.append(certificate())
    assert not prompt.verified
