"""The contracts of InputInversion under a Trainer, on a tiny random model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_inversion.callbacks.learning_rate import LinearLearningRate
from lightning_inversion.inputs import EmbeddingInput, NormalInitializer, VocabularyInput
from lightning_inversion.objectives import L1, L2, CosineDistance, Objective, Standardized
from lightning_inversion.transformer.truncated import TruncatedTransformer
from tests.fits import PROMPTS, fit


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param(L1(), marks=pytest.mark.integration),
        pytest.param(CosineDistance(), marks=pytest.mark.integration),
        Standardized(),
    ],
    ids=type,
)
def test_a_row_does_not_depend_on_its_batch(
    objective: Objective, tiny_folder: Path, tiny_transformer: TruncatedTransformer, tmp_path: Path
) -> None:
    def adam(parameters):
        return torch.optim.Adam(parameters, lr=0.02)

    settings = {
        "learnable": EmbeddingInput(NormalInitializer(0, 0.1)), "optimizer": adam,
        "objective": objective,
    }  # fmt: skip
    together, _ = fit(tiny_folder, tiny_transformer, tmp_path, **settings)
    # Rows are told apart by their number in the data set: two other prompts keep the place.
    others = ["bus", "bus", PROMPTS[2]]
    apart, _ = fit(tiny_folder, tiny_transformer, tmp_path, prompts=others, **settings)
    length = together.state.batch.lengths[2]
    torch.testing.assert_close(
        together.state.values[2, :length], apart.state.values[2, :length], atol=1e-5, rtol=1e-4
    )


def test_only_the_input_learns(
    tiny_folder: Path, tiny_transformer: TruncatedTransformer, tmp_path: Path
) -> None:
    before = {name: weight.clone() for name, weight in tiny_transformer.state_dict().items()}
    module, trainer = fit(tiny_folder, tiny_transformer, tmp_path)
    learning = [p for g in trainer.optimizers[0].param_groups for p in g["params"]]
    assert len(learning) == 1
    assert learning[0] is module.state.values
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
            if pl_module.state.iteration == 5:
                self.kept = pl_module.state.values.detach().clone()
                pl_module.stop_rows(torch.tensor([True, False, False]))

    stop = StopTheFirst()
    module, _ = fit(tiny_folder, tiny_transformer, tmp_path, stop)
    assert torch.equal(module.state.values[0], stop.kept[0])
    assert not torch.equal(module.state.values[2], stop.kept[2])
    assert module.state.stopped_at.tolist() == [5, -1, -1]


def test_a_vocabulary_input_learns(
    tiny_folder: Path, tiny_transformer: TruncatedTransformer, tmp_path: Path
) -> None:
    distances = []

    class Watch(LinearLearningRate):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            distances.append(float(pl_module.distances.detach().sum()))

    module, _ = fit(
        tiny_folder, tiny_transformer, tmp_path, Watch(),
        iterations=30, learnable=VocabularyInput(), objective=L2(),
        optimizer=lambda p: torch.optim.Adam(p, lr=0.05),
    )  # fmt: skip
    assert distances[-1] < 0.5 * distances[0]
    assert module.top_tokens(3).ids.shape == (*module.state.batch.mask.shape, 3)


def test_captions_of_allowed_tokens(
    tiny_folder: Path, tiny_transformer: TruncatedTransformer, tmp_path: Path
) -> None:
    module, _ = fit(
        tiny_folder, tiny_transformer, tmp_path, iterations=1, allowed_tokens=[5, 9, 11]
    )
    ids = module.top_tokens(2).ids[module.state.batch.mask]
    assert set(ids.flatten().tolist()) <= {5, 9, 11}


def test_a_checkpoint_holds_the_state_and_nothing_of_the_frozen_model(
    tiny_folder: Path, tiny_transformer: TruncatedTransformer, tmp_path: Path
) -> None:
    module, trainer = fit(tiny_folder, tiny_transformer, tmp_path, iterations=2)
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    checkpoint = torch.load(tmp_path / "own.ckpt", weights_only=True)
    assert checkpoint["state_dict"] == {}
    assert checkpoint["state"]["batch"]["prompts"] == PROMPTS
    assert torch.equal(checkpoint["state"]["values"], module.state.values.detach())
