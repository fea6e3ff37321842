"""Tiny models with their measurements."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_inversion.cache import ENVIRONMENT
from lightning_inversion.recovery.measurements import Measurements
from lightning_inversion.transformer.language_model import LanguageModel
from lightning_inversion.transformer.truncated import TruncatedTransformer
from tests.tiny import tiny_model


@pytest.fixture(scope="session")
def _own_cache(session_cache: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT, str(session_cache))
        yield


def measured(family: str, depth: int) -> Measurements:
    """Of a random model, with its head."""
    model = tiny_model(family)
    torch.manual_seed(0)
    transformer = TruncatedTransformer.from_model(model, depth=depth)
    return Measurements.measure(transformer, LanguageModel(model, transformer.caches))


@pytest.fixture(scope="session")
def measurements(_own_cache: None) -> Measurements:
    """Of a random Llama of 4 blocks, cut after the third."""
    return measured("llama", 3)


@pytest.fixture(scope="session")
def other_measurements(_own_cache: None) -> Measurements:
    """Of a random GPT-2 of 4 blocks, cut after the first."""
    return measured("gpt2", 1)


@pytest.fixture(scope="session")
def headless(tiny_transformer: TruncatedTransformer) -> Measurements:
    """Of the tiny Llama cut after its second block, without its head."""
    return Measurements.measure(tiny_transformer)
