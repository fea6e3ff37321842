"""Which input tokens a prediction or a hidden state depends on."""

from lightning_inversion.attribution.attribute import attribute
from lightning_inversion.attribution.config import Choices, Display
from lightning_inversion.attribution.result import AttributionResult, AttributionResults

__all__ = ["AttributionResult", "AttributionResults", "Choices", "Display", "attribute"]
