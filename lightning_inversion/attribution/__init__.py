"""Which input tokens an output depends on, and a page that shows it."""

from lightning_inversion.attribution.choices import Choices, Look
from lightning_inversion.attribution.one_call import attribute
from lightning_inversion.attribution.result import AttributionResult

__all__ = ["AttributionResult", "Choices", "Look", "attribute"]
