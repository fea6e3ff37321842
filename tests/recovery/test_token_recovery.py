"""Exact recovery on a tiny model: right, verified, honest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from lightning_inversion.callbacks.recovery_display import RecoveryDisplay
from lightning_inversion.errors import InputError
from lightning_inversion.recovery.certificate import RecoveredPrompt
from lightning_inversion.recovery.gradient_proxy import GradientProxy
from lightning_inversion.recovery.linear_map import ProbeProposer
from lightning_inversion.recovery.measurements import Measurements
from lightning_inversion.recovery.policy import recovered
from lightning_inversion.recovery.prior import LanguageModelPrior
from lightning_inversion.recovery.proposals import Exhaustive, Mixture, Proposer
from lightning_inversion.recovery.token_recovery import TokenRecovery
from tests.tiny import VOCABULARY

LENGTHS = [9, 4, 6]


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(4))


def run(
    measurements: Measurements,
    ids: torch.Tensor,
    lengths: list[int],
    policy: TokenRecovery | None = None,
    noise: float = 0.0,
    known: torch.Tensor | None = None,
) -> list[RecoveredPrompt]:
    target = measurements.transformer.features_of(ids)
    target = target + noise * torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    policy = policy or TokenRecovery(candidates=8, most=32)
    return recovered(policy, measurements, target, lengths, known)


def test_texts_of_several_lengths_come_back_with_certificates(
    measurements: Measurements, ids: torch.Tensor
) -> None:
    texts = run(measurements, ids, LENGTHS)
    for text, row, length in zip(texts, ids.tolist(), LENGTHS, strict=True):
        assert text.ids == row[:length]
        assert text.verified
        for token in text.tokens:
            assert token.residual <= token.threshold < 0.1
            assert token.margin is None or token.margin > 1
            assert 1 <= token.candidates <= VOCABULARY
            assert not token.alternatives
        assert text.tokens[0].order == "FirstTokenScan"


def test_a_text_does_not_depend_on_its_batch(measurements: Measurements, ids: torch.Tensor) -> None:
    together = run(measurements, ids, LENGTHS)
    alone = run(measurements, ids[2:, :6], LENGTHS[2:])
    assert alone[0].ids == together[2].ids


@pytest.mark.parametrize("order", [Exhaustive(), ProbeProposer(), LanguageModelPrior()])
def test_every_order_ends_at_the_same_text(
    measurements: Measurements, ids: torch.Tensor, order: Proposer
) -> None:
    texts = run(measurements, ids[:2], [4, 4], TokenRecovery(order, candidates=64))
    assert [text.ids for text in texts] == ids[:2, :4].tolist()
    assert texts[0].tokens[1].order == order.name


def test_a_known_prefix_is_not_looked_for(measurements: Measurements, ids: torch.Tensor) -> None:
    same_start = ids.clone()
    same_start[:, :2] = ids[0, :2]
    texts = run(measurements, same_start, LENGTHS, known=ids[0, :2])
    assert [text.ids for text in texts] == [
        row[:length] for row, length in zip(same_start.tolist(), LENGTHS, strict=True)
    ]
    assert [len(text.tokens) for text in texts] == [7, 2, 4]


def test_a_spent_budget_is_unresolved_and_recovery_goes_on(
    measurements: Measurements, ids: torch.Tensor
) -> None:
    class Backwards(Proposer):
        """The right token last."""

        def scores(self, search, rows):  # type: ignore[no-untyped-def]
            right = ids[rows, search.positions(rows)]
            scores = torch.rand(len(rows), VOCABULARY, generator=torch.Generator().manual_seed(1))
            return scores.scatter(1, right[:, None], -1.0)

    policy = TokenRecovery(Backwards(), candidates=8, budget=16)
    (text,) = run(measurements, ids[:1, :3], [3], policy)
    assert len(text.ids) == 3
    assert text.tokens[0].verified
    assert not text.tokens[1].verified
    assert text.tokens[1].candidates == 16
    assert text.tokens[1].alternatives[0] == text.ids[1] != ids[0, 1]
    assert len(set(text.tokens[1].alternatives)) == len(text.tokens[1].alternatives) > 1
    assert not text.verified


def test_nothing_is_certified_where_nothing_can_be_told_apart(
    measurements: Measurements, ids: torch.Tensor
) -> None:
    blind = torch.zeros_like(measurements.calibration.threshold)
    calibration = dataclasses.replace(measurements.calibration, threshold=blind)
    noisy = dataclasses.replace(measurements, calibration=calibration)
    policy = TokenRecovery(candidates=64, budget=128)
    texts = run(noisy, ids, LENGTHS, policy, noise=0.001)
    assert not any(token.verified for text in texts for token in text.tokens)


def test_tokens_with_the_same_embedding_are_named(
    measurements: Measurements, ids: torch.Tensor
) -> None:
    embedding = measurements.transformer.embedding
    original = embedding.matrix.clone()
    token = int(ids[0, 0])
    twin = (token + 1) % VOCABULARY
    try:
        with torch.no_grad():
            embedding.matrix[twin] = embedding.matrix[token]
        embedding._apply(lambda tensor: tensor)  # drops what was computed from the matrix
        again = Measurements.measure(measurements.transformer, measurements.language_model)
        (text,) = run(again, ids[:1, :3], [3], TokenRecovery(candidates=16))
        assert text.tokens[0].id in {token, twin}
        assert {text.tokens[0].id, *text.tokens[0].duplicates} == {token, twin}
        assert text.verified
        runner_up = text.tokens[0].runner_up
        assert runner_up is not None
        assert runner_up > text.tokens[0].threshold  # the twin is no runner-up
    finally:
        with torch.no_grad():
            embedding.matrix.copy_(original)
        embedding._apply(lambda tensor: tensor)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: TokenRecovery(candidates=0), "candidates, most and budget must be at least 1"),
        (lambda: LanguageModelPrior(surprise=0.0), "surprise must lie between 0 and 1"),
        (lambda: LanguageModelPrior(surprise=1.0), "surprise must lie between 0 and 1"),
        (lambda: GradientProxy(steps=0), "steps, alone, restart and proxies must be at least 1"),
        (lambda: GradientProxy(sharpness=0.0), "sharpness positive"),
        (lambda: Mixture([]), "a mixture needs one order or more"),
        (lambda: Mixture([Exhaustive()], alone=1.5), "alone between 0 and 1"),
        (lambda: RecoveryDisplay(prompts=0), "display.prompts must be at least 1"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(build: Callable[[], object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        build()
