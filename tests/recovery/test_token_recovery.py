"""Exact recovery on a tiny model: right, certified, honest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from lightning_inversion.callbacks.recovery_display import RecoveryDisplay
from lightning_inversion.errors import InputError
from lightning_inversion.recovery.certificate import RecoveredText
from lightning_inversion.recovery.gradient_proxy import GradientProxy
from lightning_inversion.recovery.instruments import Instruments
from lightning_inversion.recovery.linear_map import LinearMap
from lightning_inversion.recovery.policy import recovered
from lightning_inversion.recovery.prior import LanguageModelPrior
from lightning_inversion.recovery.proposals import CandidateOrder, Exhaustive, Mixture
from lightning_inversion.recovery.token_recovery import TokenRecovery
from tests.tiny import VOCABULARY

LENGTHS = [9, 4, 6]


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(4))


def run(
    instruments: Instruments,
    ids: torch.Tensor,
    lengths: list[int],
    policy: TokenRecovery | None = None,
    noise: float = 0.0,
    known: torch.Tensor | None = None,
) -> list[RecoveredText]:
    target = instruments.transformer.features_of(ids)
    target = target + noise * torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    policy = policy or TokenRecovery(candidates=8, most=32)
    return recovered(policy, instruments, target, lengths, known)


def test_texts_of_several_lengths_come_back_with_certificates(
    instruments: Instruments, ids: torch.Tensor
) -> None:
    texts = run(instruments, ids, LENGTHS)
    for text, row, length in zip(texts, ids.tolist(), LENGTHS, strict=True):
        assert text.ids == row[:length]
        assert text.certified
        for token in text.tokens:
            assert token.residual <= token.tolerance < 0.1
            assert token.margin is None or token.margin > 1
            assert 1 <= token.candidates <= VOCABULARY
            assert not token.alternatives
        assert text.tokens[0].order == "FirstToken"


def test_a_text_does_not_depend_on_its_batch(instruments: Instruments, ids: torch.Tensor) -> None:
    together = run(instruments, ids, LENGTHS)
    alone = run(instruments, ids[2:, :6], LENGTHS[2:])
    assert alone[0].ids == together[2].ids


@pytest.mark.parametrize("order", [Exhaustive(), LinearMap(), LanguageModelPrior()])
def test_every_order_ends_at_the_same_text(
    instruments: Instruments, ids: torch.Tensor, order: CandidateOrder
) -> None:
    texts = run(instruments, ids[:2], [4, 4], TokenRecovery(order, candidates=64))
    assert [text.ids for text in texts] == ids[:2, :4].tolist()
    assert texts[0].tokens[1].order == order.name


def test_a_known_prefix_is_not_looked_for(instruments: Instruments, ids: torch.Tensor) -> None:
    same_start = ids.clone()
    same_start[:, :2] = ids[0, :2]
    texts = run(instruments, same_start, LENGTHS, known=ids[0, :2])
    assert [text.ids for text in texts] == [
        row[:length] for row, length in zip(same_start.tolist(), LENGTHS, strict=True)
    ]
    assert [len(text.tokens) for text in texts] == [7, 2, 4]


def test_a_spent_budget_is_unresolved_and_recovery_goes_on(
    instruments: Instruments, ids: torch.Tensor
) -> None:
    class Backwards(CandidateOrder):
        """The right token last."""

        def scores(self, frontier, rows):  # type: ignore[no-untyped-def]
            right = ids[rows, frontier.positions(rows)]
            scores = torch.rand(len(rows), VOCABULARY, generator=torch.Generator().manual_seed(1))
            return scores.scatter(1, right[:, None], -1.0)

    policy = TokenRecovery(Backwards(), candidates=8, budget=16)
    (text,) = run(instruments, ids[:1, :3], [3], policy)
    assert len(text.ids) == 3
    assert text.tokens[0].certified
    assert not text.tokens[1].certified
    assert text.tokens[1].candidates == 16
    assert text.tokens[1].alternatives[0] == text.ids[1] != ids[0, 1]
    assert len(set(text.tokens[1].alternatives)) == len(text.tokens[1].alternatives) > 1
    assert not text.certified


def test_nothing_is_certified_where_nothing_can_be_told_apart(
    instruments: Instruments, ids: torch.Tensor
) -> None:
    blind = torch.zeros_like(instruments.calibration.tolerance)
    calibration = dataclasses.replace(instruments.calibration, tolerance=blind)
    noisy = dataclasses.replace(instruments, calibration=calibration)
    policy = TokenRecovery(candidates=64, budget=128)
    texts = run(noisy, ids, LENGTHS, policy, noise=0.001)
    assert not any(token.certified for text in texts for token in text.tokens)


def test_tokens_with_the_same_embedding_are_named(
    instruments: Instruments, ids: torch.Tensor
) -> None:
    embedding = instruments.transformer.embedding
    original = embedding.matrix.clone()
    token = int(ids[0, 0])
    twin = (token + 1) % VOCABULARY
    try:
        with torch.no_grad():
            embedding.matrix[twin] = embedding.matrix[token]
        embedding._apply(lambda tensor: tensor)  # drops what was computed from the matrix
        again = Instruments.measure(instruments.transformer, instruments.language_model)
        (text,) = run(again, ids[:1, :3], [3], TokenRecovery(candidates=16))
        assert text.tokens[0].id in {token, twin}
        assert {text.tokens[0].id, *text.tokens[0].indistinguishable} == {token, twin}
        assert text.certified
        runner_up = text.tokens[0].runner_up
        assert runner_up is not None
        assert runner_up > text.tokens[0].tolerance  # the twin is no runner-up
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
