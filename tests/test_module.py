"""The contracts of InputInversion under a Trainer, on a tiny random model."""

from pathlib import Path

import pytest
import torch
from lightning import Trainer

from lightning_inversion.callbacks.learning_rate import LinearLearningRate
from lightning_inversion.callbacks.results import Results
from lightning_inversion.callbacks.stopping import StoppingCriterion
from lightning_inversion.callbacks.token_by_token import TokenByToken
from lightning_inversion.data.batch import PromptBatch
from lightning_inversion.data.prompts import PromptDataModule
from lightning_inversion.files import read_records
from lightning_inversion.inputs import EmbeddingInput, NormalInitializer, VocabularyInput
from lightning_inversion.module import InputInversion
from lightning_inversion.objectives import L1, L2, CosineDistance, Objective, Standardized
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.truncated import TruncatedTransformer

PROMPTS = ["The sky is blue.", "bus", "A quick brown fox jumps over the lazy dog."]


def invert(
    folder: Path,
    transformer: TruncatedTransformer,
    prompts: list[str],
    root: Path,
    *callbacks,
    iterations: int = 12,
    **settings,
) -> tuple[InputInversion, Trainer]:
    module = InputInversion(
        TransformerSpec(model=str(folder), depth=2), iterations=iterations, **settings
    ).use(transformer)
    data = PromptDataModule(
        prompts=prompts, tokenizer=str(folder), iterations=iterations, tokens_per_batch=100
    )
    trainer = Trainer(
        default_root_dir=root,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module, datamodule=data)
    return module, trainer


@pytest.fixture(autouse=True)
def _quiet() -> None:
    from lightning_inversion.cli.trainer import quiet_lightning

    quiet_lightning()


@pytest.mark.parametrize("objective", [L1(), CosineDistance(), Standardized()], ids=type)
def test_a_row_does_not_depend_on_its_batch(
    objective: Objective, tiny_folder: Path, tiny_transformer: TruncatedTransformer, tmp_path: Path
) -> None:
    def adam(parameters):
        return torch.optim.Adam(parameters, lr=0.02)

    start = {"learnable": EmbeddingInput(NormalInitializer(0, 0.1)), "optimizer": adam}
    together, _ = invert(
        tiny_folder, tiny_transformer, PROMPTS, tmp_path, objective=objective, **start
    )
    # Rows are told apart by their number in the data set: two other prompts keep the place.
    alone, _ = invert(
        tiny_folder, tiny_transformer, ["bus", "bus", PROMPTS[2]], tmp_path,
        objective=objective, **start,
    )  # fmt: skip
    length = together.batch.lengths[2]
    torch.testing.assert_close(
        together.learnable.values[2, :length], alone.learnable.values[2, :length],
        atol=1e-5, rtol=1e-4,
    )  # fmt: skip


def test_only_the_input_learns(
    tiny_folder: Path, tiny_transformer: TruncatedTransformer, tmp_path: Path
) -> None:
    before = {name: weight.clone() for name, weight in tiny_transformer.state_dict().items()}
    module, trainer = invert(tiny_folder, tiny_transformer, PROMPTS, tmp_path)
    assert [p.shape for g in trainer.optimizers[0].param_groups for p in g["params"]] == [
        module.learnable.values.shape
    ]
    assert all(p.grad is None for p in tiny_transformer.parameters())
    after = tiny_transformer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not tiny_transformer.training


def test_a_stopped_row_is_still_whatever_momentum_says(
    tiny_folder: Path, tiny_transformer: TruncatedTransformer, tmp_path: Path
) -> None:
    class StopTheFirst(LinearLearningRate):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            if pl_module.iteration == 5:
                self.kept = pl_module.learnable.values.detach().clone()
                pl_module.stop_rows(torch.tensor([True, False, False]))

    stop = StopTheFirst()
    module, _ = invert(tiny_folder, tiny_transformer, PROMPTS, tmp_path, stop)
    assert torch.equal(module.learnable.values[0], stop.kept[0])
    assert not torch.equal(module.learnable.values[2], stop.kept[2])
    assert module.progress.stopped_at.tolist() == [5, -1, -1]


def test_an_epoch_ends_when_each_row_has_stopped(
    tiny_folder: Path, tiny_transformer: TruncatedTransformer, tmp_path: Path
) -> None:
    stopping = StoppingCriterion(threshold=1e9)
    module, trainer = invert(
        tiny_folder, tiny_transformer, PROMPTS, tmp_path, stopping, Results(), iterations=50
    )
    assert trainer.global_step == 1
    assert module.progress.met_at.tolist() == [0, 0, 0]
    rows = read_records(tmp_path / "results.jsonl")
    assert all(row["criterion_met"] and row["criterion_met_at"] == 0 for row in rows)


def test_prompts_that_the_map_reads_need_no_iteration(
    tiny_folder: Path, tiny_transformer: TruncatedTransformer, tmp_path: Path
) -> None:
    module, trainer = invert(
        tiny_folder, tiny_transformer, PROMPTS, tmp_path,
        TokenByToken(), StoppingCriterion(stop=False), Results(),
    )  # fmt: skip
    assert trainer.global_step == 0
    rows = read_records(tmp_path / "results.jsonl")
    assert [row["recovered"] for row in rows] == PROMPTS
    assert all(row["verified"] and row["criterion_met"] for row in rows)
    assert [row["iterations"] for row in rows] == [0, 0, 0]
    assert module.learnable.values.grad is None


def test_a_row_that_has_ended_meets_the_criterion_no_later(
    tiny_transformer: TruncatedTransformer,
) -> None:
    module = InputInversion().use(tiny_transformer)
    module.configure_model()
    module.begin(PromptBatch.collate([(0, "a", [5, 6, 7]), (1, "b", [8, 9])]))
    module.iteration = 3
    module.stop_rows(torch.tensor([True, False]))
    module.iteration = 10
    StoppingCriterion().judge(module, module.target)
    assert module.progress.met_at.tolist() == [3, 10]


def test_the_criterion_is_the_documents(
    tiny_folder: Path, tiny_transformer: TruncatedTransformer, tmp_path: Path
) -> None:
    stopping = StoppingCriterion(stop=False)
    module, _ = invert(
        tiny_folder, tiny_transformer, PROMPTS, tmp_path, stopping,
        iterations=3, learnable=EmbeddingInput(NormalInitializer()), objective=L1(),
    )  # fmt: skip
    ids, mask = module.batch.ids, module.batch.mask
    shifted = tiny_transformer.embedding(ids) + 0.05 * module.noise("shift")
    target = tiny_transformer.features_of(ids, mask)
    moved = (tiny_transformer(shifted, mask) - target).abs().sum((1, 2))
    distance = (tiny_transformer(module.learnable.values, mask) - target).abs().sum((1, 2))
    torch.testing.assert_close(module.progress.ratio, (distance / moved).detach())


def test_a_vocabulary_input_learns(
    tiny_folder: Path, tiny_transformer: TruncatedTransformer, tmp_path: Path
) -> None:
    distances = []

    class Watch(LinearLearningRate):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            distances.append(float(pl_module.distances.detach().sum()))

    module, _ = invert(
        tiny_folder, tiny_transformer, PROMPTS, tmp_path, Watch(),
        iterations=30, learnable=VocabularyInput(), objective=L2(),
        optimizer=lambda p: torch.optim.Adam(p, lr=0.05),
    )  # fmt: skip
    assert distances[-1] < 0.5 * distances[0]
    assert module.top_tokens(3).ids.shape == (*module.batch.ids.shape, 3)


def test_tokens_are_proven_and_fixed_one_by_one(
    tiny_folder: Path, tiny_transformer: TruncatedTransformer, tmp_path: Path
) -> None:
    # No linear guess and few candidates: the tokens must come from rounds, restarts and growth.
    proving = TokenByToken(every=1, candidates=4, most=64)
    module, trainer = invert(
        tiny_folder, tiny_transformer, PROMPTS, tmp_path, proving, Results(),
        iterations=400, learnable=EmbeddingInput(NormalInitializer(0, 0.01)),
        optimizer=lambda p: torch.optim.Adam(p, lr=0.02),
    )  # fmt: skip
    assert torch.equal(module.progress.verified, module.batch.mask)
    assert torch.equal(
        module.top_tokens(1).best[module.batch.mask], module.batch.ids[module.batch.mask]
    )
    assert 0 < trainer.global_step < 400
    rows = read_records(tmp_path / "results.jsonl")
    assert all(row["verified"] and row["exact"] for row in rows)


def test_captions_of_allowed_tokens(
    tiny_folder: Path, tiny_transformer: TruncatedTransformer, tmp_path: Path
) -> None:
    module, _ = invert(
        tiny_folder, tiny_transformer, PROMPTS, tmp_path, iterations=1, allowed_tokens=[5, 9, 11]
    )
    assert set(module.top_tokens(2).ids[module.batch.mask].flatten().tolist()) <= {5, 9, 11}


@pytest.mark.parametrize("objective", [L1(), L2(relative=True), Standardized()], ids=type)
def test_behind_what_is_held_the_distance_and_its_gradient_are_the_same(
    objective: Objective, tiny_transformer: TruncatedTransformer
) -> None:
    module = InputInversion(objective=objective).use(tiny_transformer)
    rows = [(0, "a", [5, 6, 7, 8, 9, 4, 3, 2]), (1, "b", [8, 9, 7, 6]), (2, "c", [1, 2, 3, 4, 5])]
    module.begin(PromptBatch.collate(rows))
    objective.calibrate(lambda: module.probe)
    known = torch.tensor([5, 0, 4])
    positions = torch.arange(8)
    module.learnable.held = positions < known[:, None]
    looked_at = module.batch.mask & ~module.learnable.held & (positions < known[:, None] + 2)
    window = module._window(looked_at)
    assert window is not None
    vectors = module.learnable(module.embedding)
    ours = window.distances(vectors, module.prefix, objective, module.target)
    whole = objective(module.generated(), module.target, looked_at)
    torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-4)
    behind = ~module.learnable.held
    (gradient,) = torch.autograd.grad(ours.sum(), module.learnable.values)
    (expected,) = torch.autograd.grad(whole.sum(), module.learnable.values)
    torch.testing.assert_close(gradient[behind], expected[behind], atol=1e-5, rtol=1e-3)
