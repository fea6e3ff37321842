"""What proposers propose, alone and together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_inversion.errors import InputError
from lightning_inversion.proposers.first_position import _ROUNDS_BY_PROBE, FirstTokenScan
from lightning_inversion.proposers.gradient_proxy import GradientProxy
from lightning_inversion.proposers.mixture import Mixture
from lightning_inversion.proposers.nearest_to_input import NearestToInput
from lightning_inversion.proposers.prior import LanguageModelPrior
from lightning_inversion.proposers.probe_proposer import ProbeProposer
from lightning_inversion.proposers.proposals import Exhaustive, Proposals, Proposer
from lightning_inversion.recovery.search import PrefixSearch
from lightning_inversion.transformer.language_model import Continuations
from lightning_inversion.verification.first_tokens import FirstTokenFeatures
from lightning_inversion.verification.measurements import Measurements
from tests.measured import measured
from tests.tiny import VOCABULARY

ROWS = torch.arange(2)
IDS = torch.tensor([[7, 40, 3, 250, 9], [12, 7, 88, 41, 230]])
PROXY = GradientProxy(waits=1, rounds_alone=1, proxies=3)


def begun(
    proposer: Proposer, measurements: Measurements, position: int, ids: Tensor = IDS
) -> tuple[PrefixSearch, Proposals]:
    """Proposals for the token at ``position``, after the right tokens before it."""
    search = PrefixSearch(measurements, measurements.transformer.features_of(ids))
    vectors, rows = measurements.transformer.embedding(ids), torch.arange(len(ids))
    search.prefix.begin(rows, vectors, torch.full_like(rows, position))
    proposals = proposer.begin(search)
    for earlier in range(position):
        proposals.accept(rows, ids[:, earlier])
    return search, proposals


def wrong(ids: Tensor, position: int) -> Tensor:
    """The candidates ``[R, K]`` without the right token at a position."""
    right = IDS[:, position, None]
    return torch.where(ids == right, (right + 1) % VOCABULARY, ids)


class Fitted(Proposer):
    """The vectors of a fit."""

    def begin(self, search: PrefixSearch) -> Proposals:
        noise = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
        return NearestToInput(search, search.transformer.embedding(IDS) + 0.1 * noise)


@pytest.mark.parametrize(
    "proposer",
    [
        Exhaustive(), LanguageModelPrior(), FirstTokenScan(), ProbeProposer(), Fitted(),
        PROXY, Mixture([ProbeProposer(), PROXY, LanguageModelPrior()]),
    ],
    ids=lambda proposer: proposer.name,
)  # fmt: skip
def test_asked_twice_proposals_give_one_answer(
    proposer: Proposer, measurements: Measurements
) -> None:
    first_tokens = isinstance(proposer, FirstTokenScan)
    position = 0 if first_tokens else 2
    search, proposals = begun(proposer, measurements, position)
    if not proposer.waits:
        first = proposals.scores(ROWS)
        assert torch.equal(proposals.scores(ROWS), first)
    for step in range(3):  # of the proxy: started, moved alone, joined by others
        tried = torch.arange(10 * step, 10 * step + 8).expand(2, 8)
        assert not search.run(ROWS, wrong(tried, position))[0].verified.any()
        proposals.update(ROWS)
        scores, candidates = proposals.scores(ROWS), proposals.propose(ROWS, 12)
        assert torch.equal(proposals.scores(ROWS), scores)
        assert torch.equal(proposals.propose(ROWS, 12).ids, candidates.ids)
        one = proposals.scores(ROWS[1:])  # of one row, as of both
        torch.testing.assert_close(one[0], scores[1], atol=1e-3, rtol=1e-4)


def test_tried_tokens_are_not_proposed_again(measurements: Measurements) -> None:
    search, proposals = begun(Exhaustive(), measurements, 1)
    first = proposals.propose(ROWS, 5)
    assert first.ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    search.run(ROWS, first.ids)
    assert proposals.propose(ROWS, 3).ids.tolist() == [[5, 6, 7]] * 2


def test_a_mixture_names_no_token_twice_and_names_the_proposer(measurements: Measurements) -> None:
    mixture = Mixture([ProbeProposer(), GradientProxy(waits=1, steps=1), LanguageModelPrior()])
    search, proposals = begun(mixture, measurements, 2)
    proposals.update(ROWS)
    first = proposals.propose(ROWS, 12)
    assert set(first.proposers) == {"ProbeProposer+LanguageModelPrior"}
    tried = wrong(first.ids, 2)
    search.run(ROWS, tried)
    proposals.update(ROWS)
    later = proposals.propose(ROWS, 12)
    assert set(later.proposers) == {
        "ProbeProposer+LanguageModelPrior", "ProbeProposer", "LanguageModelPrior", "GradientProxy",
    }  # fmt: skip
    assert len(later.proposers) == 12
    for row in range(2):
        assert len(set(first.ids[row].tolist())) == 12
        new = set(later.ids[row].tolist())
        assert len(new) == 12
        assert new.isdisjoint(tried[row].tolist())


def test_a_prior_of_many_more_blocks_waits_for_the_probes_first_candidates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shallow = measured("llama", 2)
    search, proposals = begun(Mixture([ProbeProposer(), LanguageModelPrior()]), shallow, 2)
    with monkeypatch.context() as patch:
        patch.setattr(Continuations, "log_probabilities", lambda *_: pytest.fail("asked"))
        first = proposals.propose(ROWS, 4)
    assert set(first.proposers) == {"ProbeProposer"}
    search.run(ROWS, wrong(first.ids, 2))
    later = proposals.propose(ROWS, 4)
    assert set(later.proposers) == {
        "ProbeProposer+LanguageModelPrior", "ProbeProposer", "LanguageModelPrior",
    }  # fmt: skip
    _, alone = begun(Mixture([LanguageModelPrior()]), shallow, 2)
    assert set(alone.propose(ROWS, 4).proposers) == {"LanguageModelPrior"}


def test_the_prior_is_that_of_the_whole_prompt(measurements: Measurements) -> None:
    assert measurements.language_model is not None
    expected = measurements.language_model.log_probabilities(IDS)
    continuations = Continuations(measurements.language_model, 2)
    for position in range(4):
        continuations.append(ROWS[:1], IDS[:1, position])
        if position != 1:  # row 0 catches up two tokens at once, row 1 lags behind
            got = continuations.log_probabilities(ROWS[:1])
            torch.testing.assert_close(got[0], expected[0, position], atol=1e-4, rtol=1e-4)
    continuations.append(ROWS[1:], IDS[1:, 0])
    got = continuations.log_probabilities(ROWS)
    torch.testing.assert_close(got[1], expected[1, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[0], expected[0, 3], atol=1e-4, rtol=1e-4)


def test_a_prior_takes_back_what_was_accepted(measurements: Measurements) -> None:
    _, proposals = begun(LanguageModelPrior(), measurements, 2)
    before = proposals.scores(ROWS)
    proposals.take_back(ROWS[:1])
    proposals.accept(ROWS[:1], torch.tensor([99]))
    assert not torch.allclose(proposals.scores(ROWS)[0], before[0], atol=1e-2)
    proposals.take_back(ROWS[:1])
    proposals.accept(ROWS[:1], IDS[:1, 1])
    torch.testing.assert_close(proposals.scores(ROWS), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("found", "even"), [(-30.0, True), (-0.1, False)])
def test_the_prior_ranks_evenly_behind_tokens_that_it_did_not_expect(
    measurements: Measurements, monkeypatch: pytest.MonkeyPatch, found: float, even: bool
) -> None:
    _, proposals = begun(LanguageModelPrior(), measurements, 2)
    other, expected = proposals.scores(ROWS).clone()
    monkeypatch.setattr(Continuations, "log_probability", lambda *_: found)
    proposals.accept(ROWS[:1], IDS[:1, 2])
    scores = proposals.scores(ROWS)
    torch.testing.assert_close(scores[1], expected)  # another prompt's
    wide = float(other.max() - other.min())
    assert (float(scores[0].max() - scores[0].min()) < 0.1 * wide) == even


def test_a_uniform_share_keeps_every_token_possible(measurements: Measurements) -> None:
    _, proposals = begun(LanguageModelPrior(uniform_share=0.5), measurements, 2)
    scores = proposals.scores(ROWS)
    assert float(scores.min()) >= -torch.tensor(2.0 * VOCABULARY).log() - 1e-4
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(2))


def test_the_scan_ranks_the_first_token_first_and_is_read_again(
    measurements: Measurements, monkeypatch: pytest.MonkeyPatch
) -> None:
    search, proposals = begun(FirstTokenScan(), measurements, 0)
    search.rounds[ROWS] = _ROUNDS_BY_PROBE
    assert proposals.scores(ROWS).argmax(1).tolist() == IDS[:, 0].tolist()
    first = measurements.derived(FirstTokenFeatures)
    monkeypatch.setattr(FirstTokenFeatures, "_scan", lambda *_: pytest.fail("scanned again"))
    again = FirstTokenFeatures.of(measurements)
    assert torch.equal(again.projected, first.projected)
    assert torch.equal(again.directions, first.directions)


def test_first_candidates_need_no_scan_and_are_the_strongest_rivals(
    measurements: Measurements, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rivals that a certificate of position 0 names are about as near as those of a scan.

    A random model carries a token's embedding along less well than a trained one.
    """
    scan = measurements.derived(FirstTokenFeatures)
    monkeypatch.setattr(Measurements, "derived", without(Measurements.derived, FirstTokenFeatures))
    ids = torch.arange(VOCABULARY)[:, None]
    target = measurements.transformer.features_of(ids)
    search = PrefixSearch(measurements, target)
    rows = ids[:, 0]
    proposed = FirstTokenScan().begin(search).propose(rows, 8).ids
    assert proposed.shape == (VOCABULARY, 8)
    assert all(len(set(some)) == 8 for some in proposed.tolist())
    assert (proposed == ids).any(1).float().mean() > 0.95

    first = torch.zeros_like(ids)
    projected = search.probe.standardize(target, first)[:, 0] @ scan.directions
    nearest = (-torch.cdist(projected, scan.projected)).topk(4).indices

    def rival(candidates: Tensor) -> Tensor:
        residuals = measurements.calibration.residual(
            target[candidates, 0], target, torch.zeros_like(candidates)
        )
        return residuals.masked_fill(candidates == ids, torch.inf).amin(1)

    ratio = rival(proposed) / rival(nearest)
    assert ratio.mean() < 1.1
    assert ratio.max() < 1.7


def without(derived: Callable[..., Any], kind: type) -> Callable[..., Any]:
    """``Measurements.derived`` that must not be asked for one kind."""

    def checked(self: Measurements, asked: type) -> Any:
        assert asked is not kind
        return derived(self, asked)

    return checked


def test_a_fit_that_has_no_vector_of_a_token_prefers_none(headless: Measurements) -> None:
    ids, row = torch.tensor([[3, 4]]), torch.tensor([0])
    vectors = headless.transformer.embedding(ids)
    vectors[0, 1] = torch.nan
    search = PrefixSearch(headless, headless.transformer.features_of(ids))
    search.prefix.begin(row, vectors, torch.tensor([0]))
    proposals = NearestToInput(search, vectors)
    assert proposals.scores(row).argmax() == 3
    search.accept(row, torch.tensor([3]))
    assert not proposals.scores(row).any()
    assert proposals.ahead(row, 2, 1) is None


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: LanguageModelPrior(uniform_share=0.0), "uniform_share must lie between 0 and 1"),
        (lambda: LanguageModelPrior(uniform_share=1.0), "uniform_share must lie between 0 and 1"),
        (lambda: GradientProxy(steps=0), "waits, steps, rounds_alone, restart and proxies must be"),
        (lambda: GradientProxy(nearness=0.0), "nearness positive"),
        (lambda: Mixture([]), "a mixture needs one proposer or more"),
        (lambda: Mixture([Exhaustive()], share_alone=1.5), "share_alone between 0 and 1"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(build: Callable[[], object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        build()
