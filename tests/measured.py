"""Measurements of tiny random models, with their heads."""

import torch

from lightning_inversion.transformer.language_model import LanguageModel
from lightning_inversion.transformer.truncated import TruncatedTransformer
from lightning_inversion.verification.measurements import Measurements
from tests.tiny import tiny_model


def measured(family: str, depth: int) -> Measurements:
    """Of a random model, with its head."""
    model = tiny_model(family)
    torch.manual_seed(0)
    transformer = TruncatedTransformer.from_model(model, depth=depth)
    return Measurements.measure(transformer, LanguageModel(model, transformer.caches))
