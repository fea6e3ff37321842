"""A tiny model of each family that is compared with the independent reference, and its texts."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.tiny import tiny_model, tiny_tokenizer

SENTENCE = "The wipers on the bus go swish swish"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="session", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    """24 tokens, one of them twice."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 300, (24,), generator=generator)
    ids[7] = ids[3]
    return ids
