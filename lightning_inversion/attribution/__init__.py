"""Which input tokens an output depends on, and a page that shows it."""

from lightning_inversion.attribution.attribute import attribute
from lightning_inversion.attribution.config import Choices, Look
from lightning_inversion.attribution.result import AttributionResult

__all__ = ["AttributionResult", "Choices", "Look", "attribute"]
