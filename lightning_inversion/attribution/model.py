"""A model as attribution sees it: vectors in, outputs at some positions out."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from lightning_inversion.attribution.prefix import CleanPrefix
from lightning_inversion.errors import InputError
from lightning_inversion.transformer.truncated import TruncatedTransformer

# The gradient of a head is a sum over the vocabulary. For fewer rows than this it is done by a
# kernel that loses two digits of float32 (seen with 49,152 tokens): a lone row is run four times.
_PRECISE_ROWS = 4


class Reader(Protocol):
    """Vectors [B, T, D] -> outputs [B, P, K] at P positions. Rows are independent, and causal."""

    @property
    def device(self) -> torch.device:
        """Where the vectors have to be."""
        ...

    def embed(self, ids: Tensor) -> Tensor:
        """Ids [T] -> vectors [T, D], as the first block of the model gets them."""
        ...

    def read(
        self, embeds: Tensor, at: Tensor, prefix: tuple[CleanPrefix, int] | None = None
    ) -> Tensor:
        """Vectors [B, T, D] -> float outputs [B, P, K] at the positions `at` [P] of the T.

        Args:
            embeds: the vectors.
            at: positions among them.
            prefix: a clean pass and how many of its positions are in front of the vectors.
        """
        ...

    def clean(self, embeds: Tensor, at: Tensor) -> tuple[Tensor, CleanPrefix]:
        """One pass over [T, D] -> outputs [P, K] and what other rows can use of it.

        Raises:
            ValueError: nothing can be used; the message says why.
        """
        ...


class LogitReader:
    """The logits [B, P, V] of a causal language model. Only those asked for are computed."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._few = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def device(self) -> torch.device:
        """Of the embedding."""
        return next(self.model.get_input_embeddings().parameters()).device

    def embed(self, ids: Tensor) -> Tensor:
        """Ids [T] -> vectors [T, D]."""
        with torch.no_grad():
            vectors: Tensor = self._embedding(ids.to(self.device)[None])
            return vectors[0].clone()

    def read(
        self, embeds: Tensor, at: Tensor, prefix: tuple[CleanPrefix, int] | None = None
    ) -> Tensor:
        """Vectors [B, T, D] -> logits [B, P, V], float32."""
        if prefix is None or prefix[1] == 0:
            return self._logits(embeds, at, use_cache=False)
        shared, length = prefix
        return self._logits(embeds, at, use_cache=True, past_key_values=shared.of(length))

    def clean(self, embeds: Tensor, at: Tensor) -> tuple[Tensor, CleanPrefix]:
        """One pass -> logits [P, V] and its keys and values."""
        # Made without the model's config, it keeps every position also where attention slides; the
        # model's own mask then does the sliding.
        cache = DynamicCache()
        outputs = self._logits(embeds[None], at, use_cache=True, past_key_values=cache)
        return outputs[0], CleanPrefix(cache, embeds.shape[0])

    @property
    def _embedding(self) -> nn.Module:
        embedding: nn.Module = self.model.get_input_embeddings()
        return embedding

    def _logits(self, embeds: Tensor, at: Tensor, **how: Any) -> Tensor:
        logits: Tensor
        if not self._few:
            logits = self.model(inputs_embeds=embeds, **how).logits
            return logits[:, at].float()
        # Positions, not a number of them: the states are then picked out contiguously, and the head
        # is read once for all rows instead of once for each.
        again = -(-_PRECISE_ROWS // (len(embeds) * len(at))) if embeds.requires_grad else 1
        logits = self.model(inputs_embeds=embeds, logits_to_keep=at.repeat(again), **how).logits
        return logits[:, : len(at)].float()


class FeatureReader:
    """The features [B, P, F] of a truncated transformer."""

    def __init__(self, transformer: TruncatedTransformer) -> None:
        self.model = transformer

    @property
    def device(self) -> torch.device:
        """Of the embedding."""
        return self.model.device

    def embed(self, ids: Tensor) -> Tensor:
        """Ids [T] -> vectors [T, D]."""
        with torch.no_grad():
            vectors: Tensor = self.model.embedding(ids.to(self.device)[None])
            return vectors[0].clone()

    def read(
        self, embeds: Tensor, at: Tensor, prefix: tuple[CleanPrefix, int] | None = None
    ) -> Tensor:
        """Vectors [B, T, D] -> features [B, P, F], float32."""
        assert prefix is None or prefix[1] == 0
        features: Tensor = self.model(embeds)
        return features[:, at]

    def clean(self, embeds: Tensor, at: Tensor) -> tuple[Tensor, CleanPrefix]:
        """Features are read without a cache."""
        raise ValueError("features are read without one")


def check_gradients(model: nn.Module) -> None:
    """Raise InputError for 4-bit layers that give wrong gradients, silently, once they have run.

    On a CPU with the instructions for it, bitsandbytes repacks their weights for a faster forward.
    """
    for module in model.modules():
        repacks = getattr(module, "support_avx512bf16_for_cpu", False)
        if repacks and next(module.parameters()).device.type == "cpu":
            raise InputError(
                "The 4-bit layers of this model give wrong gradients on a CPU: load it with "
                "TransformerSpec, or choose --method occlusion."
            )


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The model frozen and in evaluation mode within, and exactly as it was afterwards.

    Gradients can be taken within, even inside `torch.inference_mode()`, as in `predict_step`.
    """
    modes = [(module, module.training) for module in model.modules()]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as inside:
        inside.enter_context(torch.inference_mode(False))
        inside.enter_context(torch.enable_grad())
        try:
            for module, _ in modes:
                module.training = False
            # Otherwise every activation is kept for gradients that nobody asked for.
            for parameter in learning:
                parameter.requires_grad_(False)
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter in learning:
                parameter.requires_grad_(True)
