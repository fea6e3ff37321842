"""Planted mistakes are named, each with its option; where there is none, none is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import get_args

import pytest
import torch
from torch import Tensor

from lightning_inversion import recover
from lightning_inversion.data.storage import Storage
from lightning_inversion.errors import InputError
from lightning_inversion.proposers.proposals import Exhaustive
from lightning_inversion.recovery.captured import Origin, explain, recover_captured
from lightning_inversion.recovery.diagnosis import Diagnosis, diagnose
from lightning_inversion.recovery.later_rows import LaterRows
from lightning_inversion.recovery.policy import Targets
from lightning_inversion.recovery.token_recovery import TokenRecovery
from lightning_inversion.recovery.variants import OtherCuts
from lightning_inversion.transformer.truncated import TruncatedTransformer
from lightning_inversion.verification.measurements import Measurements
from lightning_inversion.verification.noise import NoiseName
from tests.tiny import shared_tiny_model

DEPTH = 3
IDS = torch.tensor([[11, 42, 7, 8, 9, 5], [21, 22, 23, 24, 25, 26]])


def at(depths: tuple[int, ...], final_norm: bool) -> TruncatedTransformer:
    return TruncatedTransformer.from_model(
        shared_tiny_model("llama"), layers=depths, final_norm=final_norm
    )


CUTS = OtherCuts(at, 4)


def features(depth: int = DEPTH, final_norm: bool = False) -> Tensor:
    return at((depth,), final_norm).features_of(IDS)


def whole(target: Tensor) -> Targets:
    return Targets(target, [target.shape[1]] * len(target))


@pytest.fixture(scope="module")
def first_alone(measurements: Measurements) -> Measurements:
    return Measurements.measure(measurements.transformer, first_alone=True)


def diagnosed(measurements: Measurements, target: Tensor) -> list[Diagnosis | None]:
    return diagnose(measurements, whole(target), CUTS)


def by(measurements: Measurements) -> Callable[[Targets], list[Diagnosis | None]]:
    return partial(diagnose, measurements, cuts=CUTS)


def test_features_that_fit_are_not_diagnosed(first_alone: Measurements) -> None:
    assert diagnosed(first_alone, features()) == [None, None]
    known = (int(IDS[0, 0]),)
    assert diagnose(first_alone, Targets(features()[:1], [6], known), CUTS) == [None]


MISTAKES: dict[str, tuple[Callable[[], Tensor], str]] = {
    "one block less": (lambda: features(2), "fit depth 2, not 3; set --model.transformer.depth 2"),
    "one block more": (lambda: features(4), "fit depth 4, not 3; set --model.transformer.depth 4"),
    "after the norm": (
        lambda: features(3, True),
        "fit depth 3 after the final norm; set --model.transformer.final_norm true",
    ),
    "the last of a tuple": (
        lambda: features(4, True),
        "fit depth 4, not 3 after the final norm; "
        "set --model.transformer.depth 4 --model.transformer.final_norm true",
    ),
    "centred": (
        lambda: features() - features().mean(-1, keepdim=True), "centred; set --data.centred true"
    ),
    "halved": (lambda: features() / 2, "scaled by 0.5; set --data.scale 0.5"),
    "a hundredfold": (lambda: features() * 100, "scaled by 100; set --data.scale 100"),
    "embeddings": (lambda: features(1) * 0 + embedded(), "are the embeddings of tokens"),
    "padding on the left": (
        lambda: torch.cat([features()[:, 2:4], features()], dim=1),
        r"row 2 fits as the first position, so that rows 0 to 1 are padding .*lengths \[6\]",
    ),
}  # fmt: skip


def embedded() -> Tensor:
    vectors: Tensor = shared_tiny_model("llama").get_input_embeddings()(IDS).detach()
    return vectors


@pytest.mark.parametrize(("planted", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_planted_mistake_is_named(
    first_alone: Measurements, planted: Callable[[], Tensor], message: str
) -> None:
    for found in diagnosed(first_alone, planted()):
        assert found is not None
        assert re.search(message, str(found))


def never() -> Measurements:
    raise AssertionError("everything is measured before a mistake is named")


def test_a_mistake_of_every_prompt_that_an_option_corrects_ends_the_run(
    first_alone: Measurements, messages: list[str]
) -> None:
    with pytest.raises(InputError, match=r"x, prompts 1, 2: position 0 fits no .*depth 2\."):
        recover_captured(
            TokenRecovery(), never, whole(features(2)), Origin("x", diagnose=by(first_alone))
        )
    mixed = whole(torch.cat([features()[:1], features(2)]))
    _, found, _ = explain(mixed, Origin("x", (7, 8, 9), by(first_alone)))
    assert messages == [f"x, prompts 9, 10: {found}."]
    messages.clear()
    explain(whole(features(2)), Origin("x", diagnose=by(first_alone), first=False))
    assert messages == [f"x, prompts 1, 2: {found}."]


def no_text() -> Tensor:
    return 3 * torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))


def test_features_of_no_text_have_no_mistake(first_alone: Measurements) -> None:
    for found in diagnosed(first_alone, no_text()):
        assert found is not None
        assert found.cause is None
        assert not found.has_option
        assert f"nearest has residual {found.residual:.2g}" in str(found)


def test_what_is_made_of_rows_is_not_called_rows(
    measurements: Measurements, first_alone: Measurements
) -> None:
    """Neither differences nor projections are rows of later positions."""
    ids = torch.randint(300, (8, 12), generator=torch.Generator().manual_seed(5))[1:]
    rows = measurements.transformer.features_of(ids)
    axes = torch.linalg.svd(rows.flatten(0, 1), full_matrices=False).Vh
    for target in (rows - rows.flip(1), rows - rows.roll(1, 0)):
        for found in diagnosed(first_alone, target):
            assert found is not None
            assert found.cause is None
    for found in diagnosed(first_alone, rows @ axes[:8].T @ axes[:8]):
        assert "no first position" not in str(found)


def test_later_rows_are_told_from_what_is_made_of_them() -> None:
    """Where the probe reads tokens well; the rows are those of a linear model."""
    generator = torch.Generator().manual_seed(0)
    known = 1 + 0.1 * torch.randn(20, 16, 8, generator=generator, dtype=torch.float64)
    misfit = torch.tensor([1.0, 3.0, *[1.0] * 6], dtype=torch.float64)
    rows = LaterRows(torch.zeros(6), torch.eye(6), known, known * misfit, None, None)  # type: ignore[arg-type]
    own = 1 + 0.1 * torch.randn(1, 16, 8, generator=generator, dtype=torch.float64)
    for measures, included in ((own, True), (own * misfit, False), (0 * own + 1, False)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LaterRows, "_measures", lambda self, rows, found=measures: found)
            assert rows.include(torch.zeros(16, 6)) is included
            assert rows.include(torch.zeros(1, 6)) is None
    alike = LaterRows(torch.zeros(6), torch.eye(6), known, known, None, None)  # type: ignore[arg-type]
    assert alike.include(torch.zeros(16, 6)) is None


def test_noise_on_features_leaves_the_nearest_token_clear(
    measurements: Measurements, first_alone: Measurements
) -> None:
    noisy = features() + 0.05 * measurements.probe.std[0] * torch.randn(
        (2, 6, 32), generator=torch.Generator().manual_seed(0)
    )
    for found, ids in zip(diagnosed(first_alone, noisy), IDS, strict=True):
        assert found is not None
        assert found.near
        assert found.token == int(ids[0])


@pytest.mark.parametrize("kind", get_args(NoiseName))
def test_noise_that_was_not_told_is_estimated(first_alone: Measurements, kind: NoiseName) -> None:
    std = 0.02 * float(features().std())
    noisy = Storage(noise=std, noise_kind=kind)(features(), torch.Generator().manual_seed(0))
    found = diagnosed(first_alone, noisy)
    for one in found:
        assert one is not None
        assert one.noise is not None
        assert one.noise[1] == pytest.approx(std, rel=0.4)
        assert one.has_option
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].finding == found[1].finding
    assert f"{kind.capitalize()} noise of std" in found[0].finding
    assert ("--data.noise_kind laplace" in found[0].finding) == (kind == "laplace")
    # One feature that is off is no noise.
    off = features()
    off[..., 3] += 10 * std
    for one in diagnosed(first_alone, off):
        assert one is not None
        assert one.noise is None


def test_a_wrong_known_prefix_is_named(first_alone: Measurements) -> None:
    (found,) = diagnose(first_alone, Targets(features()[:1], [6], (12,)), CUTS)
    assert found is not None
    assert "does not reproduce its own rows" in str(found)


def test_prompts_without_an_option_are_reported_and_searched_in_bounded_time(
    measurements: Measurements, first_alone: Measurements, messages: list[str]
) -> None:
    target = torch.cat([features()[:1], no_text()[:1]])
    policy, rounds = TokenRecovery(Exhaustive(), candidates=64), []
    prompts = recover_captured(
        policy, lambda: measurements, whole(target), Origin("x", diagnose=by(first_alone)),
        lambda some: rounds.append(len(some)),
    )  # fmt: skip
    assert messages == [f"x, prompt 2: {diagnosed(first_alone, target)[1]}."]
    assert prompts[0].ids == IDS[0].tolist()
    assert prompts[0].verified
    assert not any(token.verified for token in prompts[1].tokens)
    assert len(prompts[1].tokens) == 6
    assert set(rounds) == {2}


def test_where_rows_stop_fitting_is_reported(
    measurements: Measurements, messages: list[str]
) -> None:
    mixed = torch.cat([features()[:1, :3], features()[1:, 3:]], dim=1)
    policy = TokenRecovery(Exhaustive(), candidates=64)
    prompts = recover_captured(policy, lambda: measurements, whole(mixed), Origin("x"))
    assert [token.verified for token in prompts[0].tokens] == [True] * 3 + [False] * 3
    assert "x, prompt 1: no token fits position 3 or one after it" in messages[-1]
    recover_captured(policy, lambda: measurements, whole(features()[:1]), Origin("x"))
    assert len([line for line in messages if "no token fits" in line]) == 1


def test_the_last_states_with_and_without_the_norm() -> None:
    """Hugging Face's last entry is after the norm, other tools' before it."""
    model = shared_tiny_model("llama")
    for stored in (True, False):
        transformer = TruncatedTransformer.from_model(model, depth=4, final_norm=stored)
        states = transformer.features_of(IDS[:2])
        option = f"set final_norm {str(stored).lower()}"
        with pytest.raises(InputError, match=option):
            recover(model, None, list(states), depth=4, final_norm=not stored)
