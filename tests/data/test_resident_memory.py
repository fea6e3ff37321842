"""What does not fit the memory comes in halves; what cannot fit at all is reported."""

from pathlib import Path

import pytest
import torch
from lightning import Trainer

from lightning_inversion.callbacks.checkpoint import RunCheckpoint
from lightning_inversion.callbacks.result_writer import ResultWriter
from lightning_inversion.callbacks.stopping import StoppingCriterion
from lightning_inversion.callbacks.token_decoding import TokenDecoding
from lightning_inversion.cli.trainer import quiet_lightning
from lightning_inversion.data.prompts import PromptDataModule
from lightning_inversion.files import read_records
from lightning_inversion.module import InputInversion
from lightning_inversion.schedules import AllPositions
from lightning_inversion.transformer.loading import TransformerSpec

PROMPTS = ["The sky is blue.", "bus", "A quick brown fox jumps over the lazy dog.", "day " * 40]


@pytest.mark.parametrize(
    "when",
    [
        "forward",
        pytest.param("backward", marks=pytest.mark.integration),
        pytest.param("begin", marks=pytest.mark.integration),
    ],
)
def test_a_batch_too_large_comes_as_two(
    when: str, tiny_folder: Path, tmp_path: Path, messages: list[str]
) -> None:
    quiet_lightning()
    transformer = TransformerSpec(model=str(tiny_folder), depth=2).load()
    run, limit = transformer.run, 60

    def limited(embeds: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        large = embeds.shape[0] * embeds.shape[1] > limit and torch.is_grad_enabled()
        if large and when == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        features = run(embeds, *args, **kwargs)
        if large and when == "backward":
            features.register_hook(lambda _: (_ for _ in ()).throw(MemoryError()))
        return features

    transformer.run = limited
    module = InputInversion(
        TransformerSpec(model=str(tiny_folder), depth=2), iterations=4, schedule=AllPositions()
    ).use(transformer)
    if when == "begin":
        begin = module.begin

        def limited_begin(batch) -> None:
            begin(batch)
            if batch.size > limit:
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

        module.begin = limited_begin
    data = PromptDataModule(
        prompts=PROMPTS, tokenizer=str(tiny_folder), iterations=4, tokens_per_batch=10_000
    )
    trainer = Trainer(
        default_root_dir=tmp_path, max_epochs=-1, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[
            RunCheckpoint(every=1), TokenDecoding(every=1), StoppingCriterion(stop=False),
            ResultWriter(),
        ],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    rows = read_records(tmp_path / "results.jsonl")
    assert [row["prompt"] for row in rows] == PROMPTS
    errors = [row["error"] for row in rows]
    assert errors[:3] == [None] * 3
    assert "does not fit the memory even by itself" in errors[3]
    assert all(row["iterations"] == 4 for row in rows[:3])
    sentence = "are too many for the memory; they are run as two batches."
    halved = [line for line in messages if line.endswith(sentence)]
    assert halved[0].startswith("4 prompts")


def test_another_error_is_not_taken_for_it(tiny_folder: Path, tmp_path: Path) -> None:
    quiet_lightning()
    module = InputInversion(TransformerSpec(model=str(tiny_folder), depth=2), iterations=2)

    def broken(batch) -> None:
        raise RuntimeError("something else")

    module.begin = broken
    data = PromptDataModule(prompts=PROMPTS, tokenizer=str(tiny_folder), iterations=2)
    trainer = Trainer(
        default_root_dir=tmp_path, max_epochs=-1, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="something else"):
        trainer.fit(module, datamodule=data)
