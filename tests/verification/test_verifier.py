"""A token is verified where it reproduces the target and nothing else does."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import pytest
import torch

from lightning_inversion.data.storage import Storage
from lightning_inversion.proposers.probe_proposer import ProbeProposer
from lightning_inversion.recovery.policy import Targets, recover_prompts
from lightning_inversion.recovery.search import PrefixSearch
from lightning_inversion.recovery.token_recovery import TokenRecovery
from lightning_inversion.transformer.rounding import _perturbed
from lightning_inversion.transformer.surgery import Surgery
from lightning_inversion.transformer.truncated import TruncatedTransformer
from lightning_inversion.verification import held_out, rivals
from lightning_inversion.verification.calibration import CLEARANCE, RISK, Calibration
from lightning_inversion.verification.certificate import Certificate
from lightning_inversion.verification.judgement import Verdict
from lightning_inversion.verification.measurements import Measurements
from lightning_inversion.verification.rivals import NearTokens
from lightning_inversion.verification.verifier import Verifier
from tests.tiny import shared_tiny_model


def calibrate(measurements: Measurements, storage: Storage) -> Calibration:
    return Calibration.measure(measurements.transformer, measurements.probe, storage)


def verdict_of(
    measurements: Measurements, ids: torch.Tensor, target: torch.Tensor, mask: torch.Tensor
) -> Verdict:
    return measurements.derived(Verifier).verify(
        ids, target, mask, measurements.transformer.features_of
    )


def test_right_and_wrong_are_far_apart(measurements: Measurements) -> None:
    calibration = measurements.calibration
    assert (calibration.right < 1e-4).all()
    assert (calibration.wrong > 1e-2).all()
    assert (calibration.right < calibration.rounding).all()
    assert (calibration.rounding < calibration.threshold).all()
    assert (calibration.threshold < calibration.wrong).all()
    assert calibration.verifies


def test_position_0_allows_another_rounding(measurements: Measurements) -> None:
    """The same forward gives the same features there; another machine's would not."""
    stored = calibrate(measurements, Storage("bfloat16"))
    assert (measurements.calibration.right > 1e-8).all()
    assert (stored.right > 100 * measurements.calibration.right).all()
    assert stored.verifies


def test_told_noise_is_the_unit_of_a_residual(measurements: Measurements) -> None:
    noisy = calibrate(measurements, Storage(noise=0.01))
    torch.testing.assert_close(noisy.std, torch.full_like(noisy.std, 0.01), rtol=1e-3, atol=0)
    assert noisy.has_noise
    assert noisy.verifies
    F = noisy.std.shape[1]
    drawn = 0.01 * torch.randn(4000, F, generator=torch.Generator().manual_seed(0))
    residuals = noisy.residual(drawn, torch.zeros(F), torch.ones(4000, dtype=torch.long))
    assert noisy.plausible[1] < 2.0
    assert (residuals > noisy.plausible[1]).float().mean() < 1e-3
    assert residuals.mean() == pytest.approx(1.0, abs=0.02)
    # Deterministic: the noise is described, not drawn.
    torch.randn(1)
    assert torch.equal(noisy.noisy, calibrate(measurements, Storage(noise=0.01)).noisy)


def test_noise_that_hides_tokens_verifies_nothing(measurements: Measurements) -> None:
    """A token that was not compared could pass for the target."""
    strong = calibrate(measurements, Storage(noise=1.0))
    assert strong.hidden.all()
    assert not strong.verifies
    assert (strong.plausible > 1).all()


def test_strong_noise_leaves_tokens_that_are_compared_with_all(measurements: Measurements) -> None:
    """Noise in which one more token could pass for the target hides nothing that was run."""
    usual = measurements.calibration
    noise = float((usual.wrong * usual.std.median(dim=1).values).amax()) / 1.8
    storage = Storage(noise=noise)
    strong = dataclasses.replace(measurements, calibration=calibrate(measurements, storage))
    assert not strong.calibration.verifies
    assert strong.calibration.hidden.all()
    ids = torch.randint(300, (6, 5), generator=torch.Generator().manual_seed(3))
    target = storage(measurements.transformer.features_of(ids), torch.Generator().manual_seed(4))
    shown: dict[str, list[bool]] = {}
    for certify in ("near", "exhaustive"):
        policy = TokenRecovery(ProbeProposer(), candidates=64, certify=certify)
        found = recover_prompts(policy, strong, Targets(target, [5] * 6))
        pairs = [
            (token, right)
            for prompt, row in zip(found, ids.tolist(), strict=True)
            for token, right in zip(prompt.tokens, row, strict=True)
        ]
        assert not any(token.verified and token.id != right for token, right in pairs)
        shown[certify] = [token.verified for token, _ in pairs]
    assert not any(shown["near"])
    assert sum(shown["exhaustive"]) >= 5
    prompt = next(prompt for prompt in found if prompt.tokens[0].verified)
    row = next(number for number, other in enumerate(found) if other is prompt)
    certificate = Certificate.of((), prompt.tokens, strong, dataclasses.asdict(storage))
    check = certificate.check(measurements.transformer, target[row])
    assert check.holds
    assert check.reproduced[0]


def test_under_noise_a_rival_must_be_unlikely(measurements: Measurements) -> None:
    noisy = calibrate(measurements, Storage(noise=0.01))
    at, own = torch.ones(1, dtype=torch.long), torch.ones(1)
    F = float(noisy.noisy[1])
    enough = torch.tensor([(1 + 2 * 20.0 / F) ** 0.5])  # log(300 / 1e-6) is 19.5
    too_little = torch.tensor([(1 + 2 * 19.0 / F) ** 0.5])
    assert noisy.apart(own, enough, at, 300).all()
    assert not noisy.apart(own, too_little, at, 300).any()
    assert (
        float(noisy.risk(own, enough, at, 300)) < 1e-6 < float(noisy.risk(own, too_little, at, 300))
    )


def test_a_residual_does_not_drown_where_one_feature_is_massive(measurements: Measurements) -> None:
    calibration = measurements.calibration
    target = measurements.transformer.features_of(torch.tensor([[5]]))[0, 0]
    massive = target.clone()
    massive[0] = 1e6
    for features in (target, massive):
        moved = features.clone()
        moved[3] += 10 * calibration.std[0, 3]
        residual = calibration.residual(moved, features, torch.tensor(0))
        torch.testing.assert_close(residual, torch.tensor(10 / len(target) ** 0.5))


def test_a_threshold_of_0_and_an_infinite_one_pass_nothing(headless: Measurements) -> None:
    own = headless.calibration
    thresholds = torch.tensor([0.0, 0.5])
    calibration = dataclasses.replace(own, threshold=thresholds)
    residuals = torch.tensor([0.0, 0.1, 0.5, 0.6, torch.nan])
    first, later = torch.zeros(5, dtype=torch.long), torch.full((5,), 7)
    assert calibration.passes(residuals, first).tolist() == [False] * 5
    infinite = dataclasses.replace(own, threshold=torch.tensor([torch.inf, 0.5]))
    assert not infinite.passes(residuals, first).any()
    assert calibration.passes(residuals, later).tolist() == [True, True, True, False, False]
    assert not calibration.verifies


def test_where_every_wrong_candidate_is_a_duplicate_nothing_is_verified(
    headless: Measurements, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        held_out, "_right_and_wrong", lambda _, right, seed: right[:, None].repeat(1, 5)
    )
    calibration = Calibration.measure(headless.transformer, headless.probe)
    assert calibration.threshold.tolist() == [0.0, 0.0]
    assert not calibration.verifies
    blind = dataclasses.replace(headless, calibration=calibration)
    ids = torch.tensor([[3, 4, 5], [9, 8, 7]])
    target = headless.transformer.features_of(ids)
    verdict = verdict_of(blind, ids, target, torch.ones_like(ids, dtype=torch.bool))
    assert not verdict.residuals.any()
    assert not verdict.verified.any()
    (trial,) = PrefixSearch(blind, target).run(torch.arange(2), ids[:, :1])
    assert not trial.verified.any()


@pytest.fixture
def nearly_alike(headless: Measurements) -> Iterator[Measurements]:
    """Token 20 is token 3, but for 1e-7 of its length; 21 is 5 exactly; 22 is 4 but for 1%."""
    embedding = headless.transformer.embedding
    original = embedding.matrix.clone()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for copy, of, far in ((20, 3, 1e-7), (21, 5, 0.0), (22, 4, 1e-2)):
            away = torch.randn(embedding.width, generator=generator)
            moved = embedding.matrix[of].norm() * far * away / away.norm()
            embedding.matrix[copy] = embedding.matrix[of] + moved
        embedding._apply(lambda tensor: tensor)  # drops what was computed from the matrix
        yield Measurements(headless.transformer, headless.probe, headless.calibration)
        embedding.matrix.copy_(original)
        embedding._apply(lambda tensor: tensor)


def test_tokens_that_are_nearly_alike_are_a_group(nearly_alike: Measurements) -> None:
    transformer = nearly_alike.transformer
    ids = torch.tensor([[9, 3, 5, 4, 8]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    target = transformer.features_of(ids)
    near = nearly_alike.derived(NearTokens)
    assert [near.of_token(token)[0].tolist() for token in (9, 3, 5)] == [[], [20], [21]]
    for found in (ids, torch.tensor([[9, 20, 21, 22, 8]])):
        verdict = verdict_of(nearly_alike, found, target, mask)
        assert verdict.verified.tolist() == [[True, False, False, False, False]]
        assert verdict.group[0, 1:3].all()
        # 22 is far enough from 4 to be told from it.
        assert bool(verdict.conditional[0, 3]) == (found[0, 3] == 4)
        search = PrefixSearch(nearly_alike, target)
        for position in range(3):
            (trial,) = search.run(torch.arange(1), found[:, position, None])
            assert trial.settled.all()
            if position:
                assert trial.group.all()
                assert {int(trial.rivals), int(trial.best)} in ({3, 20}, {5, 21})
        assert search.prefix.lengths.tolist() == [3]
        (trial,) = search.run(torch.arange(1), found[:, 3, None])
        assert trial.verified.tolist() == [found[0, 3] == 4]


def test_of_too_many_near_tokens_those_that_may_be_right_are_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rivals, "_MOST", 8)
    monkeypatch.setattr(rivals, "_STRETCH", 1.0)  # directions of 16 dimensions are exact
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(400, 16, generator=generator)
    distances = (vectors - vectors[7]).norm(dim=1)
    order = distances.argsort()[1:]
    near = NearTokens(vectors, float(distances[order[100]]), whole=False)
    fifth, ninth = float(distances[order[4]]), float(distances[order[8]])
    few, whole = near.of_token(7, fifth)
    assert whole
    assert torch.equal(few, order[:5])
    many, whole = near.of_token(7, ninth)
    assert not whole
    assert torch.equal(many, order[:8])
    # Where the distance does not tell what may be right, all up to the radius are needed.
    assert not NearTokens(vectors, near.radius).of_token(7, fifth)[1]
    # Where all can be compared, all are.
    wide = NearTokens(vectors, fifth, whole=False).of_token(7, 0.0)
    assert wide[1]
    assert torch.equal(wide[0], order[:5])


def test_a_token_with_more_near_tokens_than_can_be_compared_is_not_verified(
    headless: Measurements,
) -> None:
    ids = torch.tensor([[9, 3, 5]])
    target, mask = headless.transformer.features_of(ids), torch.ones_like(ids, dtype=torch.bool)
    verifier = headless.derived(Verifier)
    assert verdict_of(headless, ids, target, mask).verified.all()
    some = torch.tensor([3]), torch.tensor([4.0]), 0.0
    for reach in (0.0, 1e9):
        near = NearTokens(headless.transformer.embedding.matrix, 1e9, whole=False)
        for token in (9, 3, 5):
            near._found[token] = rivals._Found(some[0][:0], some[1][:0], reach)
        crowded = Verifier(verifier.calibration, near, verifier.vocabulary, verifier.causal)
        found = crowded.verify(ids, target, mask, headless.transformer.features_of)
        assert found.verified.tolist() == [[reach > 0] * 3]


def test_the_nearest_of_many_embeddings_are_known_exactly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Projections shorten distances: they alone leave open whether all near tokens are there."""
    monkeypatch.setattr(rivals, "_MOST", 8)
    vectors = torch.randn(2000, 200, generator=torch.Generator().manual_seed(0))
    distances = (vectors - vectors[7]).norm(dim=1)
    order = distances.argsort()[1:]
    near = NearTokens(vectors, 100.0, whole=False)
    few, whole = near.of_token(7, float(distances[order[4]]))
    assert whole
    assert torch.equal(few, order[:5])
    assert not near.of_token(7, float(distances[order[8]]))[1]


def test_a_low_precision_looks_through_the_features_of_first_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Embeddings near enough to be right can be too many; features near enough are few."""
    monkeypatch.setattr(rivals, "_MOST", 64)
    model = copy.deepcopy(shared_tiny_model("llama")).to(torch.bfloat16)
    model.get_input_embeddings().weight.data[21] = model.get_input_embeddings().weight.data[20]
    transformer = TruncatedTransformer.from_model(model, depth=2)
    measurements = Measurements.measure(transformer, None, Storage("bfloat16"))
    own = measurements.derived(Verifier)
    crowded = NearTokens(transformer.embedding.matrix, 1e9, whole=False)
    for token in range(300):
        crowded._found[token] = rivals._Found(torch.arange(0), torch.zeros(0), 0.0)
    own.near = crowded
    ids = torch.tensor([[9, 3, 5], [20, 3, 5]])
    target = transformer.features_of(ids)
    verdict = verdict_of(measurements, ids, target, torch.ones_like(ids, dtype=torch.bool))
    assert verdict.verified.tolist() == [[True, False, False], [False] * 3]
    assert verdict.state(1, 0) == "group"
    first, second = recover_prompts(
        TokenRecovery(ProbeProposer()), measurements, Targets(target, [1, 1])
    )
    assert first.tokens[0].verified
    assert first.tokens[0].compared == 300  # all were run as the first of a prompt
    assert second.tokens[0].state == "group"
    certificate = Certificate.of((), first.tokens, measurements, {})
    assert certificate.check(transformer, target[0, :1]).reproduced == (True,)


@pytest.mark.parametrize("left_open", ["by too many near tokens", "by rounding of what is stored"])
def test_features_of_first_tokens_decide_what_embeddings_leave_open(
    left_open: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_inversion.verification.calibration._MANY_FEATURES", 32)
    monkeypatch.setattr("lightning_inversion.verification.verifier._SMALL_VOCABULARY", 0)
    model = copy.deepcopy(shared_tiny_model("llama"))
    model.get_input_embeddings().weight.data[21] = model.get_input_embeddings().weight.data[20]
    transformer = TruncatedTransformer.from_model(model, depth=2)
    measurements = Measurements.measure(transformer, None, Storage("bfloat16"))
    verifier = measurements.derived(Verifier)
    if left_open == "by rounding of what is stored":
        monkeypatch.setattr(Calibration, "unseen", lambda self, some, *_: torch.ones_like(some))
    else:
        verifier.near = NearTokens(transformer.embedding.matrix, 1e9, whole=False)
        for token in range(300):
            verifier.near._found[token] = rivals._Found(torch.arange(0), torch.zeros(0), 0.0)
    ids = torch.tensor([[9, 3, 5], [20, 3, 5]])
    target, mask = transformer.features_of(ids), torch.ones_like(ids, dtype=torch.bool)
    stored = Storage("bfloat16")(target)
    verdict = verifier.verify(ids, stored, mask, transformer.features_of)
    assert verdict.verified.tolist() == [[True, False, False], [False] * 3]
    assert verdict.state(1, 0) == "group"
    verifier.first = None
    without = verifier.verify(ids, stored, mask, transformer.features_of)
    assert not without.verified.any()


def test_a_low_precision_leaves_out_where_it_errs_most() -> None:
    model = shared_tiny_model("llama")
    ids = torch.randint(300, (4, 6), generator=torch.Generator().manual_seed(0))
    for dtype, count in ((torch.float32, 0), (torch.bfloat16, 1)):
        transformer = TruncatedTransformer.from_model(copy.deepcopy(model).to(dtype), depth=2)
        calibration = Measurements.measure(transformer, None, Storage("bfloat16")).calibration
        assert calibration.left_out.shape == (2, 32, count)
        target = transformer.features_of(ids)
        at = torch.arange(6).expand(4, 6)
        moved = target + calibration.std[1] * 3
        residuals = calibration.residual(moved, target, at)
        for kind, where in ((0, slice(0, 1)), (1, slice(1, 6))):
            along = (calibration.std[1] / calibration.std[kind] * 3) @ calibration.left_out[kind]
            whole = (calibration.std[1] / calibration.std[kind] * 3).square().sum()
            expected = ((whole - along.square().sum()) / 32).sqrt()
            torch.testing.assert_close(residuals[:, where], expected.expand(4, len(at[0, where])))


def test_a_massive_activation_does_not_round_the_other_features() -> None:
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    massive = values.clone()
    massive[:, 0] = 1e5
    errors = [
        _perturbed(some, 1e-3, torch.Generator().manual_seed(1))[:, 1:] - some[:, 1:]
        for some in (values, massive)
    ]
    assert errors[1].abs().max() < 2 * errors[0].abs().max()


def test_a_rival_must_be_as_far_as_the_clearance(headless: Measurements) -> None:
    bar = float(headless.calibration.rounding[1])
    ids, at = torch.tensor([[3, 9]]), torch.ones(1, dtype=torch.long)
    target = torch.zeros_like(headless.probe.mean[1:])
    for own, rival, verified, group in (
        (0.0, 0.9 * bar, False, True),
        (0.0, 1.1 * bar, True, False),
        (0.9 * bar, 1.2 * bar, False, True),
        (0.9 * bar, 1.01 * CLEARANCE * 0.9 * bar, True, False),
        (1.0, 2.0, False, False),
    ):
        judged = headless.derived(Verifier).judge(ids, torch.tensor([[own, rival]]), at, target)
        assert judged.verified.tolist() == [verified], (own, rival)
        assert judged.group.tolist() == [group], (own, rival)
    before = (torch.tensor([12]), torch.tensor([0.5 * bar]))
    judged = headless.derived(Verifier).judge(ids, torch.tensor([[0.0, 1.0]]), at, target, before)
    assert judged.group.all()
    assert judged.rivals.tolist() == [12]


def test_few_features_leave_open_what_rounding_does_not_explain(headless: Measurements) -> None:
    """Noise that was not told may bring a near token closer to the target than the right one."""
    whole = headless.calibration
    few = dataclasses.replace(whole, mean=whole.mean[:, :3], std=whole.std[:, :3], features=3)
    at, factor = torch.ones(1, dtype=torch.long), (300 / RISK) ** (1 / 3)
    unexplained, rounded = 1.1 * whole.rounding[at], 0.9 * whole.rounding[at]
    far = 1.1 * whole.threshold[at]
    assert CLEARANCE * unexplained < far < 0.9 * factor * unexplained
    assert whole.apart(unexplained, far, at, 300).all()
    assert few.apart(rounded, far, at, 300).all()
    assert not few.apart(unexplained, far, at, 300).any()
    assert few.apart(unexplained, far + 1.1 * factor * unexplained, at, 300).all()


def test_one_feature_verifies_nothing_but_by_the_whole_vocabulary() -> None:
    """Among many tokens some have the same one feature; it does not show that none was missed."""
    model = shared_tiny_model("llama")
    transformer = TruncatedTransformer.from_model(model, depth=2, features="3:4")
    measurements = Measurements.measure(transformer)
    ids = torch.tensor([[3, 4, 5]])
    target = transformer.features_of(ids)
    assert measurements.calibration.dimension[1] < 2
    assert not PrefixSearch(measurements, target).run(torch.arange(1), ids[:, :1])[0].verified.any()
    search = PrefixSearch(measurements, target, exhaustive=True)
    (trial,) = search.run(torch.arange(1), ids[:, :1])
    assert trial.tried.tolist() == [transformer.embedding.vocabulary_size]
    assert trial.verified.all() or trial.group.all()


@pytest.mark.parametrize("many", [32, 33])
def test_all_tokens_of_a_small_vocabulary_are_compared_where_the_near_ones_do_not_suffice(
    measurements: Measurements, monkeypatch: pytest.MonkeyPatch, many: int
) -> None:
    """Tokens that training never saw lie together; then random tokens look common everywhere."""
    monkeypatch.setattr("lightning_inversion.verification.calibration._MANY_FEATURES", many)
    common = dataclasses.replace(
        measurements.calibration, dimension=torch.tensor([0.8, 0.8]), common=torch.ones(2)
    )
    measurements = dataclasses.replace(measurements, calibration=common)
    ids = torch.randint(300, (4, 6), generator=torch.Generator().manual_seed(5))
    target = measurements.transformer.features_of(ids)
    verdict = verdict_of(measurements, ids, target, torch.ones_like(ids, dtype=torch.bool))
    assert verdict.verified.all() == verdict.verified.any() == (many <= 32)
    found = recover_prompts(TokenRecovery(ProbeProposer()), measurements, Targets(target, [6] * 4))
    assert [prompt.ids for prompt in found] == ids.tolist()
    tokens = [token for prompt in found for token in prompt.tokens]
    assert {token.verified for token in tokens} == {many <= 32}
    if many <= 32:
        assert {token.compared for token in tokens} == {300}
    wrong = recover_prompts(
        TokenRecovery(ProbeProposer()), measurements, Targets(1.1 * target, [6] * 4)
    )
    assert not any(token.verified for prompt in wrong for token in prompt.tokens)


def test_a_dead_feature_verifies_nothing(headless: Measurements) -> None:
    model = shared_tiny_model("llama")
    transformer = TruncatedTransformer.from_model(model, depth=1, features="7:8")
    dead = dataclasses.replace(headless.probe, std=torch.full((2, 1), 1e-6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            TruncatedTransformer, "run",
            lambda self, embeds, *_: torch.zeros(*embeds.shape[:2], 1),
        )  # fmt: skip
        calibration = Calibration.measure(transformer, dead)
    assert not calibration.verifies
    assert calibration.threshold.tolist() == [0.0, 0.0]


def test_one_odd_token_moves_no_threshold(headless: Measurements) -> None:
    """Of the random tokens, 1 in 50 is nearly another one."""
    embedding = headless.transformer.embedding
    original = embedding.matrix.clone()
    try:
        with torch.no_grad():
            embedding.matrix[:6] = embedding.matrix[6] * (1 + 1e-8)
        embedding._apply(lambda tensor: tensor)
        calibration = Calibration.measure(headless.transformer, headless.probe)
        assert calibration.verifies
        ids = torch.tensor([[30, 4, 50]])
        target = headless.transformer.features_of(ids)
        measurements = Measurements(headless.transformer, headless.probe, calibration)
        mask = torch.ones_like(ids, dtype=torch.bool)
        verdict = verdict_of(measurements, ids, target, mask)
        assert verdict.verified.tolist() == [[True, False, False]]
        assert verdict.group.tolist() == [[False, True, False]]
        assert verdict.conditional.tolist() == [[False, False, True]]
    finally:
        with torch.no_grad():
            embedding.matrix.copy_(original)
        embedding._apply(lambda tensor: tensor)


def test_a_token_is_verified_only_behind_a_verified_prefix(headless: Measurements) -> None:
    transformer = headless.transformer
    ids = torch.tensor([[3, 4, 5, 6]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    target = transformer.features_of(ids)
    verdict = verdict_of(headless, torch.tensor([[3, 9, 5, 6]]), target, mask)
    assert verdict.verified.tolist() == [[True, False, False, False]]
    right = verdict_of(headless, ids, target, mask)
    assert right.verified.all()
    assert right.residuals.max() < 1e-5


def test_the_padding_is_neither_verified_nor_in_the_way(headless: Measurements) -> None:
    ids, mask = torch.tensor([[3, 4, 5]]), torch.tensor([[True, True, False]])
    target = headless.transformer.features_of(ids)
    target[0, 2] += 100.0
    verdict = verdict_of(headless, ids, target, mask)
    assert verdict.verified.tolist() == [[True, True, False]]


def test_where_tokens_see_what_follows_all_are_verified_or_none() -> None:
    model = shared_tiny_model("llama")
    transformer = TruncatedTransformer.from_model(model, depth=2, surgery=Surgery(causal=False))
    measurements = Measurements.measure(transformer)
    assert (measurements.calibration.threshold > 0).all()
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 6]])
    target = transformer.features_of(ids)
    ids[1, 2] = 9
    mask = torch.ones_like(ids, dtype=torch.bool)
    verdict = verdict_of(measurements, ids, target, mask)
    assert verdict.verified.tolist() == [[True] * 4, [False] * 4]


def test_what_is_derived_from_measurements_is_computed_once(headless: Measurements) -> None:
    class Derived:
        count = 0

        @classmethod
        def of(cls, measurements: Measurements) -> Derived:
            assert measurements is headless
            cls.count += 1
            return cls()

    assert headless.derived(Derived) is headless.derived(Derived)
    assert Derived.count == 1
