"""Exact recovery on a tiny model: right, and verified where it can be."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from lightning_inversion.errors import InputError
from lightning_inversion.proposers.prior import LanguageModelPrior
from lightning_inversion.proposers.probe_proposer import ProbeProposer
from lightning_inversion.proposers.proposals import Exhaustive, Proposals, Proposer
from lightning_inversion.recovery.plausible import PlausibleTokens
from lightning_inversion.recovery.policy import RecoveredPrompt, Targets, recover_prompts
from lightning_inversion.recovery.search import PrefixSearch
from lightning_inversion.recovery.token_recovery import TokenRecovery
from lightning_inversion.verification.calibration import CLEARANCE
from lightning_inversion.verification.measurements import Measurements
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
    known: tuple[int, ...] = (),
) -> list[RecoveredPrompt]:
    target = measurements.transformer.features_of(ids)
    target = target + noise * torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    policy = policy or TokenRecovery(candidates=8, max_candidates=32)
    return recover_prompts(policy, measurements, Targets(target, lengths, known))


def test_prompts_of_several_lengths_come_back_with_certificates(
    measurements: Measurements, ids: torch.Tensor
) -> None:
    prompts = run(measurements, ids, LENGTHS)
    for prompt, row, length in zip(prompts, ids.tolist(), LENGTHS, strict=True):
        assert prompt.ids == row[:length]
        assert prompt.verified
        for token in prompt.tokens:
            assert token.residual <= token.threshold < 0.1
            assert token.margin is not None
            assert token.margin >= CLEARANCE
            assert 1 <= token.compared <= VOCABULARY
            assert not token.alternatives
        assert prompt.tokens[0].proposer == "FirstTokenScan"


def test_a_prompt_does_not_depend_on_its_batch(
    measurements: Measurements, ids: torch.Tensor
) -> None:
    together = run(measurements, ids, LENGTHS)
    alone = run(measurements, ids[2:, :6], LENGTHS[2:])
    assert alone[0].ids == together[2].ids


@pytest.mark.parametrize("proposer", [Exhaustive(), ProbeProposer(), LanguageModelPrior()])
def test_every_proposer_ends_at_the_same_prompt(
    measurements: Measurements, ids: torch.Tensor, proposer: Proposer
) -> None:
    prompts = run(measurements, ids[:2], [4, 4], TokenRecovery(proposer, candidates=64))
    assert [prompt.ids for prompt in prompts] == ids[:2, :4].tolist()
    assert prompts[0].tokens[1].proposer == proposer.name


def test_a_known_prefix_is_not_looked_for(measurements: Measurements, ids: torch.Tensor) -> None:
    same_start = ids.clone()
    same_start[:, :2] = ids[0, :2]
    prompts = run(measurements, same_start, LENGTHS, known=tuple(ids[0, :2].tolist()))
    assert [prompt.ids for prompt in prompts] == [
        row[:length] for row, length in zip(same_start.tolist(), LENGTHS, strict=True)
    ]
    assert [len(prompt.tokens) for prompt in prompts] == [7, 2, 4]


def test_a_spent_budget_is_unresolved_and_recovery_goes_on(
    measurements: Measurements, ids: torch.Tensor
) -> None:
    class Backwards(Proposer):
        """The right token last."""

        def begin(self, search: PrefixSearch) -> Proposals:
            return RightLast(search, self.name)

    class RightLast(Proposals):
        def scores(self, rows: Tensor) -> Tensor:
            right = ids[rows, self.search.positions(rows)]
            scores = torch.rand(len(rows), VOCABULARY, generator=torch.Generator().manual_seed(1))
            return scores.scatter(1, right[:, None], -1.0)

    policy = TokenRecovery(Backwards(), candidates=8, budget=16)
    (prompt,) = run(measurements, ids[:1, :3], [3], policy)
    assert len(prompt.ids) == 3
    assert prompt.tokens[0].verified
    assert not prompt.tokens[1].verified
    assert prompt.tokens[1].compared == 16
    assert prompt.tokens[1].alternatives[0] == prompt.ids[1] != ids[0, 1]
    assert len(set(prompt.tokens[1].alternatives)) == len(prompt.tokens[1].alternatives) > 1
    assert not prompt.verified


def test_nothing_is_verified_where_nothing_can_be_told_apart(
    measurements: Measurements, ids: torch.Tensor
) -> None:
    blind = torch.zeros_like(measurements.calibration.threshold)
    calibration = dataclasses.replace(measurements.calibration, threshold=blind)
    noisy = dataclasses.replace(measurements, calibration=calibration)
    policy = TokenRecovery(candidates=64, budget=128)
    prompts = run(noisy, ids[:2], [5, 3], policy, noise=0.001)
    assert not any(token.verified for prompt in prompts for token in prompt.tokens)


@pytest.mark.integration  # calibrates for itself
def test_tokens_with_the_same_embedding_are_named(
    measurements: Measurements, ids: torch.Tensor
) -> None:
    embedding = measurements.transformer.embedding
    original = embedding.matrix.clone()
    token = int(ids[0, 0])
    duplicate = (token + 1) % VOCABULARY
    try:
        with torch.no_grad():
            embedding.matrix[duplicate] = embedding.matrix[token]
        embedding._apply(lambda tensor: tensor)  # drops what was computed from the matrix
        again = Measurements.measure(measurements.transformer, measurements.language_model)
        (prompt,) = run(again, ids[:1, :3], [3], TokenRecovery(candidates=16))
        assert prompt.tokens[0].id in {token, duplicate}
        assert set(prompt.tokens[0].alternatives) == {token, duplicate}
        assert [token.state for token in prompt.tokens] == ["group", "conditional", "conditional"]
        assert prompt.ids[1:] == ids[0, 1:3].tolist()
    finally:
        with torch.no_grad():
            embedding.matrix.copy_(original)
        embedding._apply(lambda tensor: tensor)


def test_without_candidates_there_is_no_recovery() -> None:
    with pytest.raises(InputError, match="candidates, max_candidates and budget must be at least"):
        TokenRecovery(candidates=0)


def test_the_token_that_something_came_closest_behind_stays() -> None:
    plausible = PlausibleTokens(1)
    row, many = torch.tensor([0]), torch.tensor([1000])
    plausible.settle(0, [(5, 0.1), (6, 0.2), (7, 0.3)])
    assert plausible.in_doubt(row, many).all()
    assert not plausible.in_doubt(row, torch.tensor([10])).any()
    assert plausible.next(0, nearest=3.0) == 6
    assert plausible.next(0, nearest=2.0) == 7
    assert plausible.next(0, nearest=4.0) == 6
    assert plausible.residual(0, 6) == 0.2
    assert not plausible.in_doubt(row, many).any()  # all were tried: recovery continues
    plausible.settle(0, [(5, 0.1)])
    assert not plausible.in_doubt(row, many).any()


class BothEarly(Proposer):
    """Two tokens first, so that they are compared; then the language model's."""

    needs_language_model = True

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def begin(self, search: PrefixSearch) -> Proposals:
        return _BothEarly(search, self)


class _BothEarly(Proposals):
    def __init__(self, search: PrefixSearch, proposer: BothEarly) -> None:
        super().__init__(search, proposer.name)
        self.tokens = proposer.tokens
        self.prior = LanguageModelPrior().begin(search)

    def accept(self, rows: Tensor, ids: Tensor) -> None:
        self.prior.accept(rows, ids)

    def take_back(self, rows: Tensor) -> None:
        self.prior.take_back(rows)

    def scores(self, rows: Tensor) -> Tensor:
        scores = self.prior.scores(rows).clone()
        scores[:, self.tokens] += 100.0
        return scores


def test_what_follows_decides_between_plausible_tokens(
    measurements: Measurements, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target is blurred so that a wrong token looks best at position 1, as by much noise."""
    monkeypatch.setattr("lightning_inversion.recovery.plausible._ENOUGH_TO_DOUBT", VOCABULARY)
    transformer, calibration = measurements.transformer, measurements.calibration
    ids = torch.tensor([[7, 40, 3, 250, 9]])
    target = transformer.features_of(ids)
    prompts = ids.repeat(VOCABULARY, 1)
    prompts[:, 1] = torch.arange(VOCABULARY)
    others = transformer.features_of(prompts)[:, 1]
    position = torch.ones(VOCABULARY, dtype=torch.long)
    distances = calibration.residual(others, target[0, 1], position)
    wrong = int(distances.topk(2, largest=False).indices[1])  # the right one's nearest
    target[0, 1] = 0.4 * target[0, 1] + 0.6 * others[wrong]
    distances = calibration.residual(others, target[0, 1], position)
    assert distances.argmin() == wrong
    right = float(distances[40])
    plausible = torch.full_like(calibration.plausible, 1.01 * right)
    blurred = dataclasses.replace(
        measurements, calibration=dataclasses.replace(calibration, plausible=plausible)
    )
    policy = TokenRecovery(BothEarly([40, wrong]), candidates=16, max_candidates=64)
    (prompt,) = recover_prompts(policy, blurred, Targets(target, [5]))
    assert prompt.ids == ids[0].tolist()
    assert [token.verified for token in prompt.tokens] == [True, False, False, False, False]
    assert [token.state for token in prompt.tokens[2:]] == ["conditional"] * 3
    assert prompt.tokens[1].alternatives[:2] == (40, wrong)
    assert prompt.tokens[1].residual == pytest.approx(right, rel=1e-3)
    assert len(prompt.tokens) == 5
    assert prompt.tokens[2].compared <= VOCABULARY
