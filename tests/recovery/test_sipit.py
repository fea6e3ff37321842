"""SIPIT as published, on a tiny model."""

from collections.abc import Iterator

import pytest
import torch

from lightning_inversion.errors import InputError
from lightning_inversion.recovery.calibration import Calibration
from lightning_inversion.recovery.measurements import Measurements
from lightning_inversion.recovery.policy import recovered
from lightning_inversion.recovery.sipit import SIPIT
from lightning_inversion.transformer.linear_probe import LinearProbe
from lightning_inversion.transformer.truncated import TruncatedTransformer

TEXTS = [[5, 270, 31, 144], [99, 12, 288]]
LENGTHS = [len(ids) for ids in TEXTS]


@pytest.fixture(scope="module")
def measurements(tiny_transformer: TruncatedTransformer) -> Measurements:
    probe = LinearProbe.fit(tiny_transformer)
    return Measurements(tiny_transformer, probe, Calibration.measure(tiny_transformer, probe))


@pytest.fixture(scope="module")
def target(tiny_transformer: TruncatedTransformer) -> torch.Tensor:
    return tiny_transformer.features_of(torch.tensor([TEXTS[0], [*TEXTS[1], 0]]))


@pytest.mark.parametrize("tolerance", [1e-5, None])
def test_short_texts_are_recovered(
    measurements: Measurements, target: torch.Tensor, tolerance: float | None
) -> None:
    texts = recovered(SIPIT(tolerance), measurements, target, LENGTHS)
    assert [text.ids for text in texts] == TEXTS
    for text in texts:
        assert text.verified
        tried = [token.candidates for token in text.tokens]
        assert text.forwards == 2 * sum(tried)  # the proxy's and the candidate's
        assert max(tried) <= 300
        for token in text.tokens:
            assert token.residual <= token.tolerance
            assert token.order == "SIPIT"
            assert not token.alternatives


def test_the_proxy_finds_tokens_sooner_than_chance(
    measurements: Measurements, target: torch.Tensor
) -> None:
    texts = recovered(SIPIT(), measurements, target, LENGTHS)
    tried = [token.candidates for text in texts for token in text.tokens]
    assert sum(tried) / len(tried) < 100  # 150 by chance


def test_no_token_is_tried_twice_and_the_vocabulary_ends_it(
    measurements: Measurements, target: torch.Tensor
) -> None:
    (text,) = recovered(SIPIT(), measurements, target[:1] + 1.0, [1])  # no token fits
    (token,) = text.tokens
    assert token.candidates == 300
    assert not token.verified


def test_a_budget_leaves_the_best_candidate_unresolved(
    measurements: Measurements, target: torch.Tensor
) -> None:
    (text,) = recovered(SIPIT(budget=4), measurements, target[:1] + 1.0, [3])
    assert len(text.tokens) == 3
    for token in text.tokens:
        assert token.candidates == 4
        assert not token.verified
        assert token.alternatives[0] == token.id
        assert len(set(token.alternatives)) == len(token.alternatives) == 4
        assert token.runner_up is not None
        assert token.runner_up >= token.residual
    assert not text.verified


def test_after_the_deadline_each_place_gets_one_try(
    measurements: Measurements, target: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ticks() -> Iterator[float]:
        now = 0.0
        while True:
            yield now
            now += 1.0

    clock = ticks()
    monkeypatch.setattr("lightning_inversion.recovery.sipit.time.monotonic", lambda: next(clock))
    texts = recovered(SIPIT(deadline=10.0), measurements, target + 1.0, LENGTHS)
    assert [len(text.tokens) for text in texts] == LENGTHS
    tried = [token.candidates for text in texts for token in text.tokens]
    assert 1 < tried[0] < 300
    assert tried[1:] == [1] * (sum(LENGTHS) - 1)
    assert not any(text.verified for text in texts)


def test_known_tokens_are_the_beginning_of_every_text(
    measurements: Measurements, target: torch.Tensor
) -> None:
    known = torch.tensor(TEXTS[0][:2])
    (text,) = recovered(SIPIT(), measurements, target[:1], [4], known)
    assert text.ids == TEXTS[0]
    assert len(text.tokens) == 2


def test_the_same_seed_tries_the_same_tokens(
    measurements: Measurements, target: torch.Tensor
) -> None:
    runs = [
        [token.candidates for token in recovered(policy, measurements, target[:1], [4])[0].tokens]
        for policy in (SIPIT(), SIPIT(), SIPIT(seed=1))
    ]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("options", [{"budget": 0}, {"deadline": -1.0}, {"tolerance": -1.0}])
def test_impossible_options_are_one_sentence(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"--model\.recovery: "):
        SIPIT(**options)  # type: ignore[arg-type]
