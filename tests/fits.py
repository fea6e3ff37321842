"""A fit of a few prompts under a Trainer, without the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Callback, Trainer

from lightning_inversion.cli.trainer import quiet_lightning
from lightning_inversion.data.prompts import PromptDataModule
from lightning_inversion.module import InputInversion
from lightning_inversion.schedules import AllPositions
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.truncated import TruncatedTransformer

PROMPTS = ["The sky is blue.", "bus", "A quick brown fox jumps over the lazy dog."]


def fit(
    folder: Path,
    transformer: TruncatedTransformer,
    root: Path,
    *callbacks: Callback,
    prompts: list[str] = PROMPTS,
    iterations: int = 12,
    module_class: type[InputInversion] = InputInversion,
    trainer_options: dict[str, Any] | None = None,
    data_options: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[InputInversion, Trainer]:
    """Fit ``prompts`` with the tiny model of ``folder``; all positions together by default."""
    quiet_lightning()
    module = module_class(
        TransformerSpec(model=str(folder), depth=2),
        iterations=iterations,
        **{"schedule": AllPositions(), **settings},
    ).use(transformer)
    data = PromptDataModule(
        prompts=prompts, tokenizer=str(folder), iterations=iterations,
        **{"tokens_per_batch": 100, **(data_options or {})},
    )  # fmt: skip
    options = {"logger": False, "enable_checkpointing": False, **(trainer_options or {})}
    trainer = Trainer(
        default_root_dir=root,
        max_epochs=-1,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module, datamodule=data)
    return module, trainer
