"""Callbacks in any order leave the same rows, and none sets an attribute of the module."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_inversion.callbacks.checkpoint import RunCheckpoint
from lightning_inversion.callbacks.display import RecoveryDisplay
from lightning_inversion.callbacks.learning_rate import LinearLearningRate
from lightning_inversion.callbacks.result_writer import ResultWriter
from lightning_inversion.callbacks.stopping import StoppingCriterion
from lightning_inversion.callbacks.token_decoding import TokenDecoding
from lightning_inversion.cli.trainer import quiet_lightning
from lightning_inversion.data.prompts import PromptDataModule
from lightning_inversion.inputs import EmbeddingInput, NormalInitializer
from lightning_inversion.module import InputInversion
from lightning_inversion.objectives import L2
from lightning_inversion.results import read_rows
from lightning_inversion.schedules import AllPositions, Schedule, VerifiedPrefix
from lightning_inversion.state import BatchState
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.truncated import TruncatedTransformer
from tests.fits import PROMPTS, fit
from tests.tiny import tiny_model

THRESHOLD = 2.0
"""So that rows meet the criterion in the middle of a short fit."""
ORDERS = ((0, 1, 2, 3, 4), (4, 3, 2, 1, 0))
"""Of any two callbacks, either is the first in one of them."""


def callbacks(stop: bool) -> list[Callback]:
    return [
        LinearLearningRate(),
        StoppingCriterion(stop=stop, threshold=THRESHOLD, log_every=2),
        TokenDecoding(every=3),
        ResultWriter(),
        RunCheckpoint(every=1),
    ]


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.05)


FEW = VerifiedPrefix(every=2, candidates=2, max_candidates=2)


@pytest.mark.parametrize(
    ("schedule", "stop"),
    [
        pytest.param(AllPositions(), True, id="all positions, stop", marks=pytest.mark.integration),
        pytest.param(FEW, True, id="verified prefix, stop"),
        pytest.param(FEW, False, id="verified prefix", marks=pytest.mark.integration),
    ],
)
def test_in_any_order_they_leave_the_same_rows(
    schedule: Schedule,
    stop: bool,
    tiny_folder: Path,
    tiny_transformer: TruncatedTransformer,
    tmp_path: Path,
) -> None:
    found = []
    for number, order in enumerate(ORDERS):
        root, made = tmp_path / str(number), callbacks(stop)
        _, trainer = fit(
            tiny_folder, tiny_transformer, root, *(made[place] for place in order),
            prompts=PROMPTS[:2], data_options={"batch_size": 1},
            schedule=schedule, iterations=9, learnable=EmbeddingInput(NormalInitializer(0, 0.1)),
            objective=L2(), optimizer=adam,
            trainer_options={"enable_checkpointing": True, "log_every_n_steps": 1},
        )  # fmt: skip
        rows = [row.to_record() for row in read_rows(root / "results.jsonl")]
        for row in rows:
            del row["seconds"]
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        found.append((rows, metrics))
    assert [row["prompt"] for row in found[0][0]] == PROMPTS[:2]
    if stop and isinstance(schedule, AllPositions):
        assert all(0 < row["iterations"] < 9 for row in found[0][0])
    for rows, metrics in found[1:]:
        assert rows == found[0][0]
        assert metrics == pytest.approx(found[0][1], nan_ok=True)


class Guarded(InputInversion):
    """Fails where a callback sets an attribute."""

    def __setattr__(self, name: str, value: Any) -> None:
        _refuse_callbacks(name)
        super().__setattr__(name, value)


def _refuse_callbacks(name: str) -> None:
    setter = sys._getframe(2).f_globals["__name__"]
    assert not setter.startswith("lightning_inversion.callbacks"), f"{setter} sets {name}"


@pytest.fixture
def _guarded_state(monkeypatch: pytest.MonkeyPatch) -> None:
    set_attribute = BatchState.__setattr__

    def guarded(self: BatchState, name: str, value: Any) -> None:
        _refuse_callbacks(name)
        set_attribute(self, name, value)

    monkeypatch.setattr(BatchState, "__setattr__", guarded)


@pytest.mark.usefixtures("_guarded_state")
def test_no_callback_sets_an_attribute_in_a_fit(
    tiny_folder: Path, tiny_transformer: TruncatedTransformer, tmp_path: Path
) -> None:
    module, _ = fit(
        tiny_folder, tiny_transformer, tmp_path, *callbacks(stop=True),
        module_class=Guarded, learnable=EmbeddingInput(NormalInitializer(0, 0.1)),
        trainer_options={
            "enable_checkpointing": True, "logger": TensorBoardLogger(tmp_path, ""),
        },
    )  # fmt: skip
    assert isinstance(module, Guarded)
    assert module.state.ratio.isfinite().all()


@pytest.mark.usefixtures("_guarded_state")
def test_no_callback_sets_an_attribute_in_predict_or_validate(
    tiny_folder: Path, tiny_transformer: TruncatedTransformer, tmp_path: Path
) -> None:
    quiet_lightning()
    spec = TransformerSpec(model=str(tiny_folder), depth=2)
    module = Guarded(spec, iterations=2).use(tiny_transformer, tiny_model("llama"))
    data = PromptDataModule(prompts=PROMPTS[:2], tokenizer=str(tiny_folder), tokens_per_batch=100)
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, inference_mode=False,
        callbacks=[RecoveryDisplay(), ResultWriter(), StoppingCriterion()],
    )  # fmt: skip
    trainer.predict(module, datamodule=data, return_predictions=False)
    assert [row.recovered for row in read_rows(tmp_path / "results.jsonl")] == PROMPTS[:2]
    module.begin(data.batches[0])
    trainer.validate(module, datamodule=data, verbose=False)
    assert module.state.ratio.isfinite().all()


def test_the_guard_sees_a_callback(tiny_transformer: TruncatedTransformer) -> None:
    module = Guarded().use(tiny_transformer)
    own = {"__name__": "lightning_inversion.callbacks.mine", "module": module}
    with pytest.raises(AssertionError, match="mine sets distances"):
        exec("module.distances = None", own)
