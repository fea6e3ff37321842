"""The experiment without Lightning: its parts, one batch, one iteration."""

from __future__ import annotations

import pytest
import torch

from lightning_inversion.data.batch import PromptBatch
from lightning_inversion.errors import InputError
from lightning_inversion.inputs import EmbeddingInput, NormalInitializer
from lightning_inversion.inversion import Inversion
from lightning_inversion.objectives import L1, L2, CosineDistance, Objective, Standardized
from lightning_inversion.schedules import AllPositions
from lightning_inversion.transformer.truncated import TruncatedTransformer

BATCH = PromptBatch.collate([(0, "a", [5, 6, 7]), (1, "b", [8, 9])])


def begun(transformer: TruncatedTransformer, batch: PromptBatch = BATCH, **settings) -> Inversion:
    inversion = Inversion(**settings).use(transformer)
    inversion.load()
    inversion.begin(batch)
    return inversion


def test_own_tokens_are_those_of_the_row(tiny_transformer: TruncatedTransformer) -> None:
    best = begun(tiny_transformer, own_tokens=True).top_tokens().best
    assert set(best[0].tolist()) <= {5, 6, 7}
    assert set(best[1, :2].tolist()) <= {8, 9}


def test_only_allowed_tokens_are_decoded(tiny_transformer: TruncatedTransformer) -> None:
    inversion = begun(tiny_transformer, allowed_tokens=[5, 9, 11])
    ids = inversion.top_tokens(2).ids[BATCH.mask]
    assert set(ids.flatten().tolist()) <= {5, 9, 11}


def test_an_isolated_position_is_a_prompt_of_one_token(
    tiny_transformer: TruncatedTransformer,
) -> None:
    inversion = begun(tiny_transformer, isolated=True, schedule=AllPositions())
    features = inversion.generated()
    one = tiny_transformer(inversion.state.values[:1, 2:3])
    torch.testing.assert_close(features[0, 2], one[0, 0])
    whole = tiny_transformer.features_of(torch.tensor([[5, 6, 7]]))
    assert inversion.state.target is not None
    torch.testing.assert_close(inversion.state.target[0], whole[0])
    assert not features[1, 2].any()


@pytest.mark.parametrize("objective", [L1(), L2(relative=True), Standardized()], ids=type)
def test_behind_what_is_fixed_the_distance_and_its_gradient_are_the_same(
    objective: Objective, tiny_transformer: TruncatedTransformer
) -> None:
    rows = [(0, "a", [5, 6, 7, 8, 9, 4, 3, 2]), (1, "b", [8, 9, 7, 6]), (2, "c", [1, 2, 3, 4, 5])]
    inversion = begun(tiny_transformer, PromptBatch.collate(rows), objective=objective)
    state, known, positions = inversion.state, torch.tensor([5, 0, 4]), torch.arange(8)
    state.fixed = positions < known[:, None]
    state.focus = ~state.fixed & (positions < known[:, None] + 2)
    assert inversion._window() is not None
    ours = inversion.compute_distances()
    assert inversion.features(compute=False) is None  # whole rows were not run
    assert state.target is not None
    whole = objective(inversion.generated(), state.target, state.compared)
    torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-4)
    (gradient,) = torch.autograd.grad(ours.sum(), state.values)
    (expected,) = torch.autograd.grad(whole.sum(), state.values)
    after = ~state.fixed
    torch.testing.assert_close(gradient[after], expected[after], atol=1e-5, rtol=1e-3)


def test_the_features_of_an_iteration_are_kept_for_what_judges_it(
    tiny_transformer: TruncatedTransformer,
) -> None:
    inversion = begun(tiny_transformer, objective=CosineDistance(), schedule=AllPositions())
    assert inversion.features(compute=False) is None
    inversion.compute_distances()
    features = inversion.features(compute=False)
    assert features is not None
    assert not features.requires_grad
    torch.testing.assert_close(features, inversion.generated())


def test_right_tokens_are_verified_and_wrong_ones_are_not(
    tiny_transformer: TruncatedTransformer,
) -> None:
    inversion = begun(tiny_transformer)
    assert BATCH.ids is not None
    assert torch.equal(inversion.verify(BATCH.ids).verified, BATCH.mask)
    wrong = BATCH.ids.clone()
    wrong[0, 1] = 50
    assert inversion.verify(wrong).verified.tolist() == [[True, False, False], [True, True, False]]


def test_a_loop_of_ones_own_comes_nearer_to_the_target(
    tiny_transformer: TruncatedTransformer,
) -> None:
    inversion = begun(
        tiny_transformer, learnable=EmbeddingInput(NormalInitializer(0, 0.1)), objective=L2()
    )
    optimizer = torch.optim.Adam([inversion.state.values], lr=0.02)
    distances = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = inversion.compute_distances().sum()
        loss.backward()
        optimizer.step()
        distances.append(float(loss.detach()))
    assert distances[-1] < 0.8 * distances[0]
    assert all(parameter.grad is None for parameter in tiny_transformer.parameters())


def test_the_given_beginning_is_fixed_and_not_verified(
    tiny_transformer: TruncatedTransformer,
) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    target = tiny_transformer.features_of(ids)
    target[:, :2] = torch.nan  # none were stored
    mask = torch.ones(1, 4, dtype=torch.bool)
    batch = PromptBatch((0,), (None,), None, mask, target, known_prefix=(5, 6))
    state = begun(tiny_transformer, batch).state
    assert state.fixed.tolist() == [[True, True, False, False]]
    assert not state.verified.any()
    assert torch.equal(state.values[0, :2], tiny_transformer.embedding(ids)[0, :2])
    assert state.target is not None
    torch.testing.assert_close(state.target, tiny_transformer.features_of(ids))


def test_there_is_no_fit_without_an_iteration() -> None:
    with pytest.raises(InputError, match=r"--model\.iterations must be at least 1"):
        Inversion(iterations=0)
