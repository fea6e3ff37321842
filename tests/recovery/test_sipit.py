"""SIPIT as published, on a tiny model."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from lightning_inversion.errors import InputError
from lightning_inversion.recovery.policy import RecoveredPrompt, Targets, recover_prompts
from lightning_inversion.recovery.sipit import SIPIT, _Position
from lightning_inversion.transformer.truncated import TruncatedTransformer
from lightning_inversion.verification.measurements import Measurements

PROMPTS = [[5, 270, 31, 144], [99, 12, 288]]
LENGTHS = [len(ids) for ids in PROMPTS]


@pytest.fixture(scope="module")
def target(tiny_transformer: TruncatedTransformer) -> torch.Tensor:
    return tiny_transformer.features_of(torch.tensor([PROMPTS[0], [*PROMPTS[1], 0]]))


@pytest.mark.parametrize("tolerance", [1e-5, pytest.param(None, marks=pytest.mark.integration)])
def test_short_prompts_are_recover_prompts(
    headless: Measurements, target: torch.Tensor, tolerance: float | None
) -> None:
    prompts = recover_prompts(SIPIT(tolerance), headless, Targets(target, LENGTHS))
    assert [prompt.ids for prompt in prompts] == PROMPTS
    for prompt in prompts:
        assert prompt.verified
        tried = [token.compared for token in prompt.tokens]
        assert prompt.forwards == 2 * sum(tried)  # the proxy's and the candidate's
        assert max(tried) <= 300
        for token in prompt.tokens:
            assert token.residual <= token.threshold
            assert token.proposer == "SIPIT"
            assert not token.alternatives


def test_the_proxy_finds_tokens_sooner_than_chance(
    headless: Measurements, target: torch.Tensor
) -> None:
    prompts = recover_prompts(SIPIT(), headless, Targets(target, LENGTHS))
    tried = [token.compared for prompt in prompts for token in prompt.tokens]
    assert sum(tried) / len(tried) < 100  # 150 by chance


@pytest.mark.integration  # 300 steps
def test_no_token_is_tried_twice_and_the_vocabulary_ends_it(
    headless: Measurements, target: torch.Tensor
) -> None:
    (prompt,) = recover_prompts(SIPIT(), headless, Targets(target[:1] + 1.0, [1]))  # no token fits
    (token,) = prompt.tokens
    assert token.compared == 300
    assert not token.verified


def test_a_budget_leaves_the_best_candidate_unresolved(
    headless: Measurements, target: torch.Tensor
) -> None:
    (prompt,) = recover_prompts(SIPIT(budget=4), headless, Targets(target[:1] + 1.0, [3]))
    assert len(prompt.tokens) == 3
    for token in prompt.tokens:
        assert token.compared == 4
        assert not token.verified
        assert token.alternatives[0] == token.id
        assert len(set(token.alternatives)) == len(token.alternatives) == 4
        assert token.rival_residual is not None
        assert token.rival_residual >= token.residual
    assert not prompt.verified


def test_after_the_deadline_each_position_gets_one_try(
    headless: Measurements, target: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ticks() -> Iterator[float]:
        now = 0.0
        while True:
            yield now
            now += 1.0

    clock = ticks()
    monkeypatch.setattr("lightning_inversion.recovery.sipit.time.monotonic", lambda: next(clock))
    prompts = recover_prompts(SIPIT(deadline=10.0), headless, Targets(target + 1.0, LENGTHS))
    assert [len(prompt.tokens) for prompt in prompts] == LENGTHS
    tried = [token.compared for prompt in prompts for token in prompt.tokens]
    assert 1 < tried[0] < 300
    assert tried[1:] == [1] * (sum(LENGTHS) - 1)
    assert not any(prompt.verified for prompt in prompts)


def test_known_tokens_are_the_beginning_of_every_prompt(
    headless: Measurements, target: torch.Tensor
) -> None:
    (prompt,) = recover_prompts(SIPIT(), headless, Targets(target[:1], [4], tuple(PROMPTS[0][:2])))
    assert prompt.ids == PROMPTS[0]
    assert len(prompt.tokens) == 2


def test_the_same_seed_tries_the_same_tokens(headless: Measurements, target: torch.Tensor) -> None:
    runs = [
        [
            token.compared
            for token in recover_prompts(policy, headless, Targets(target[:1], [2]))[0].tokens
        ]
        for policy in (SIPIT(), SIPIT(), SIPIT(seed=1))
    ]
    assert runs[0] == runs[1] != runs[2]


def test_where_the_threshold_is_0_the_calibrated_tolerance_accepts_nothing(
    headless: Measurements,
) -> None:
    zero = torch.zeros_like(headless.calibration.threshold)
    blind = dataclasses.replace(
        headless, calibration=dataclasses.replace(headless.calibration, threshold=zero)
    )
    transformer = headless.transformer
    target = transformer(transformer.embedding(torch.tensor([[5]])))[0, 0]
    for measurements, accepted in ((headless, True), (blind, False)):
        position = _Position(None, measurements, target, RecoveredPrompt(), torch.Generator())
        position.candidate = 5
        position.iterate()
        assert position.residual == 0
        assert position.accepted is accepted
        assert position.certificate().verified is accepted


@pytest.mark.parametrize("options", [{"budget": 0}, {"deadline": -1.0}, {"tolerance": -1.0}])
def test_impossible_options_are_one_sentence(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"--model\.recovery: "):
        SIPIT(**options)  # type: ignore[arg-type]
