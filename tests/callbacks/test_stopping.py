"""The source's stopping criterion: what it compares, when it stops, who it judges."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_inversion.callbacks.result_writer import ResultWriter
from lightning_inversion.callbacks.stopping import StoppingCriterion
from lightning_inversion.data.batch import PromptBatch
from lightning_inversion.errors import InputError
from lightning_inversion.inputs import EmbeddingInput, NormalInitializer
from lightning_inversion.module import InputInversion
from lightning_inversion.objectives import L1
from lightning_inversion.results import read_rows
from lightning_inversion.transformer.truncated import TruncatedTransformer
from tests.fits import fit


def test_an_epoch_ends_when_each_row_has_stopped(
    tiny_folder: Path, tiny_transformer: TruncatedTransformer, tmp_path: Path
) -> None:
    stopping = StoppingCriterion(threshold=1e9)
    module, trainer = fit(
        tiny_folder, tiny_transformer, tmp_path, stopping, ResultWriter(), iterations=50
    )
    assert trainer.global_step == 1
    assert module.state.criterion_met_at.tolist() == [0, 0, 0]
    rows = read_rows(tmp_path / "results.jsonl")
    assert all(row.criterion_met and row.criterion_met_at == 0 for row in rows)


def begun(transformer: TruncatedTransformer) -> InputInversion:
    module = InputInversion(learnable=EmbeddingInput(NormalInitializer())).use(transformer)
    module.configure_model()
    module.begin(PromptBatch.collate([(0, "a", [5, 6, 7]), (1, "b", [8, 9])]))
    return module


def test_a_row_that_has_ended_meets_the_criterion_no_later(
    tiny_transformer: TruncatedTransformer,
) -> None:
    module = begun(tiny_transformer)
    module.state.iteration = 3
    module.stop_rows(torch.tensor([True, False]))
    module.state.iteration = 10
    StoppingCriterion(threshold=1e9).judge(module)
    assert module.state.criterion_met_at.tolist() == [3, 10]


def test_to_judge_twice_changes_nothing(tiny_transformer: TruncatedTransformer) -> None:
    module, stopping = begun(tiny_transformer), StoppingCriterion(threshold=1e9)
    stopping.judge(module)
    first = module.state.to_checkpoint()
    stopping.judge(module)
    second = module.state.to_checkpoint()
    assert module.state.stopped_at.tolist() == [0, 0]
    for name in ("stopped_at", "criterion_met_at", "ratio"):
        assert torch.equal(first[name], second[name])


def test_rows_are_judged_where_whole_rows_were_run_or_on_demand(
    tiny_transformer: TruncatedTransformer,
) -> None:
    module, stopping = begun(tiny_transformer), StoppingCriterion(stop=False)
    stopping.judge(module, compute=False)
    assert module.state.ratio.isnan().all()
    stopping.judge(module)
    assert module.state.ratio.isfinite().all()
    assert not module.state.stopped.any()


def test_prompts_that_are_not_known_are_not_judged(
    tiny_transformer: TruncatedTransformer,
) -> None:
    target = tiny_transformer.features_of(torch.tensor([[5, 6, 7]]))
    mask = torch.ones(1, 3, dtype=torch.bool)
    module = InputInversion().use(tiny_transformer)
    module.configure_model()
    module.begin(PromptBatch((0,), (None,), None, mask, target))
    StoppingCriterion(threshold=1e9).judge(module)
    assert not module.state.stopped.any()
    assert module.state.ratio.isnan().all()


def test_the_criterion_is_the_sources(
    tiny_folder: Path, tiny_transformer: TruncatedTransformer, tmp_path: Path
) -> None:
    module, _ = fit(
        tiny_folder, tiny_transformer, tmp_path, StoppingCriterion(stop=False),
        iterations=3, learnable=EmbeddingInput(NormalInitializer()), objective=L1(),
    )  # fmt: skip
    ids, mask = module.state.batch.ids, module.state.batch.mask
    shifted = tiny_transformer.embedding(ids) + 0.05 * module.noise("shift")
    target = tiny_transformer.features_of(ids, mask)
    moved = (tiny_transformer(shifted, mask) - target).abs().sum((1, 2))
    distance = (tiny_transformer(module.state.values, mask) - target).abs().sum((1, 2))
    torch.testing.assert_close(module.state.ratio, (distance / moved).detach())


def test_numbers_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InputError, match=r"stopping\.threshold must be positive"):
        StoppingCriterion(threshold=0)
