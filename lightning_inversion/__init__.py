"""Reads a language model's input back out of its hidden states."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_inversion.api import capture, invert, read_certificates, recover, verify
    from lightning_inversion.attribution.attribute import attribute
    from lightning_inversion.data.layout import Layout
    from lightning_inversion.data.prompts import PromptDataModule
    from lightning_inversion.inversion import Inversion
    from lightning_inversion.module import InputInversion
    from lightning_inversion.results import ResultRow, read_rows
    from lightning_inversion.transformer.loading import TransformerSpec
    from lightning_inversion.transformer.truncated import TruncatedTransformer
    from lightning_inversion.verification.certificate import Certificate

__version__ = "0.1.0"
__all__ = [
    "Certificate",
    "InputInversion",
    "Inversion",
    "Layout",
    "PromptDataModule",
    "ResultRow",
    "TransformerSpec",
    "TruncatedTransformer",
    "attribute",
    "capture",
    "invert",
    "read_certificates",
    "read_rows",
    "recover",
    "verify",
]
_HOMES = {
    "Certificate": "verification.certificate",
    "InputInversion": "module",
    "Inversion": "inversion",
    "Layout": "data.layout",
    "PromptDataModule": "data.prompts",
    "ResultRow": "results",
    "TransformerSpec": "transformer.loading",
    "TruncatedTransformer": "transformer.truncated",
    "attribute": "attribution.attribute",
    "capture": "api",
    "invert": "api",
    "read_certificates": "api",
    "read_rows": "results",
    "recover": "api",
    "verify": "api",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch alone takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lightning_inversion' has no attribute {name!r}")
    return getattr(import_module(f"lightning_inversion.{_HOMES[name]}"), name)
