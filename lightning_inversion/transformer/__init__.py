"""Hugging Face models: a model's name in, a frozen truncated transformer out."""

from lightning_inversion.transformer.embedding import TokenEmbedding
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.sources import ModelFiles, check_source, resolve_source
from lightning_inversion.transformer.surgery import Surgery
from lightning_inversion.transformer.truncated import TruncatedTransformer

__all__ = [
    "ModelFiles",
    "Surgery",
    "TokenEmbedding",
    "TransformerSpec",
    "TruncatedTransformer",
    "check_source",
    "resolve_source",
]
