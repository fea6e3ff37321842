"""A tiny model with its instruments; nothing is written to the user's cache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lightning_inversion.recovery.instruments import Instruments
from lightning_inversion.transformer.cache import ENVIRONMENT
from lightning_inversion.transformer.language_model import LanguageModel
from lightning_inversion.transformer.truncated import TruncatedTransformer
from tests.tiny import tiny_model


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Scans and texts of tiny models go to a folder of the test session."""
    patch = pytest.MonkeyPatch()
    patch.setenv(ENVIRONMENT, str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def instruments(own_cache: None) -> Instruments:
    """Of a random Llama of 4 blocks, cut after the third."""
    model = tiny_model("llama")
    torch.manual_seed(0)
    transformer = TruncatedTransformer.from_model(model, depth=3)
    return Instruments.measure(transformer, LanguageModel(model, transformer.caches))
