"""A tiny model with its measurements."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_inversion.files import ENVIRONMENT
from lightning_inversion.recovery.measurements import Measurements
from lightning_inversion.transformer.language_model import LanguageModel
from lightning_inversion.transformer.truncated import TruncatedTransformer
from tests.tiny import tiny_model


@pytest.fixture(scope="session")
def measurements(cache: Path) -> Measurements:
    """Of a random Llama of 4 blocks, cut after the third."""
    model = tiny_model("llama")
    torch.manual_seed(0)
    transformer = TruncatedTransformer.from_model(model, depth=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT, str(cache))
        return Measurements.measure(transformer, LanguageModel(model, transformer.caches))
