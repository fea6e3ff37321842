"""What the command line does with a model, as functions for a notebook: tensors in, text out."""

from lightning_inversion.api.certificates import read_certificates
from lightning_inversion.api.exact import capture, recover, verify
from lightning_inversion.api.gradient import invert
from lightning_inversion.api.recovered import Inverted, Recovered, RecoveredToken, Recoveries

__all__ = [
    "Inverted",
    "Recovered",
    "RecoveredToken",
    "Recoveries",
    "capture",
    "invert",
    "read_certificates",
    "recover",
    "verify",
]
