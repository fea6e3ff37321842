"""The model of an attribution: vectors in, outputs at some positions out.

The only module of the package that imports transformers.
"""

from __future__ import annotations

import inspect
import platform
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

import lightning_inversion
from lightning_inversion.errors import InputError
from lightning_inversion.transformer.load_checks import check_reads_vectors
from lightning_inversion.transformer.truncated import TruncatedTransformer

_PRECISE_ROWS = 4
"""Fewest rows of a head that is differentiated. Its gradient is a sum over the vocabulary, for
which fewer rows get a kernel that loses two digits of float32 (measured with 49,152 tokens): a lone
row is run this many times."""


_ONE_AT_A_TIME = threading.RLock()
"""Held while a model is not as its user left it."""
_CHECKED: WeakSet[PreTrainedModel] = WeakSet()
"""Models whose logits are known to follow from token vectors."""


class Reader(ABC):
    """Vectors [B, T, D] -> outputs [B, P, K] at P positions. Rows are independent and causal.

    Args:
        embedding: ids [1, T] -> vectors [1, T, D], as the first block of the model gets them.
        device: the device of the vectors.
    """

    model: nn.Module

    def __init__(self, embedding: nn.Module, device: torch.device) -> None:
        self._embedding, self.device = embedding, device

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Ids [T] -> vectors [T, D]."""
        vectors: Tensor = self._embedding(ids.to(self.device)[None])
        return vectors[0].clone()

    @abstractmethod
    def read(
        self, embeds: Tensor, at: Tensor, prefix: tuple[CleanPrefix, int] | None = None
    ) -> Tensor:
        """Vectors [B, T, D] -> float32 outputs [B, P, K] at the positions `at` [P] of the T.

        Args:
            embeds: the vectors.
            at: positions among them.
            prefix: a clean pass and how many of its positions precede the vectors.
        """

    @abstractmethod
    def clean(self, embeds: Tensor, at: Tensor) -> tuple[Tensor, CleanPrefix]:
        """One pass over [T, D] -> outputs [P, K] and the keys and values other rows can share.

        Raises:
            ValueError: nothing can be shared; the message gives the reason.
        """


class LogitReader(Reader):
    """The logits [B, P, V] of a causal language model; only those asked for are computed."""

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel) -> None:
        embedding = model.get_input_embeddings()
        super().__init__(embedding, next(embedding.parameters()).device)
        self.model = model
        self._keeps_few = "logits_to_keep" in inspect.signature(model.forward).parameters
        if model not in _CHECKED:
            check_reads_vectors(type(model).__name__, self._all_logits, embedding)
            _CHECKED.add(model)

    def read(
        self, embeds: Tensor, at: Tensor, prefix: tuple[CleanPrefix, int] | None = None
    ) -> Tensor:
        if prefix is None or prefix[1] == 0:
            return self._logits(embeds, at, use_cache=False)
        shared, length = prefix
        return self._logits(embeds, at, use_cache=True, past_key_values=shared.of(length))

    def clean(self, embeds: Tensor, at: Tensor) -> tuple[Tensor, CleanPrefix]:
        # Made without the model's config, the cache keeps every position also where attention
        # slides; the model's own mask then does the sliding.
        cache = DynamicCache()
        outputs = self._logits(embeds[None], at, use_cache=True, past_key_values=cache)
        return outputs[0], CleanPrefix(cache, embeds.shape[0])

    def _all_logits(self, **given: Tensor) -> Tensor:
        logits: Tensor = self.model(use_cache=False, **given).logits
        return logits

    def _logits(self, embeds: Tensor, at: Tensor, **options: Any) -> Tensor:
        logits: Tensor
        embeds = embeds.clone()  # CTRL and GIT write in it
        if not self._keeps_few:
            logits = self.model(inputs_embeds=embeds, **options).logits
            return logits[:, at].float()
        # Positions, not their number: the states are then picked out contiguously, and the head
        # is read once for all rows instead of once for each.
        copies = -(-_PRECISE_ROWS // (len(embeds) * len(at))) if embeds.requires_grad else 1
        kept = at.repeat(copies)
        logits = self.model(inputs_embeds=embeds, logits_to_keep=kept, **options).logits
        return logits[:, : len(at)].float()


class FeatureReader(Reader):
    """The features [B, P, F] of a truncated transformer."""

    def __init__(self, transformer: TruncatedTransformer) -> None:
        super().__init__(transformer.embedding, transformer.device)
        self.model = transformer

    def read(
        self, embeds: Tensor, at: Tensor, prefix: tuple[CleanPrefix, int] | None = None
    ) -> Tensor:
        assert prefix is None or prefix[1] == 0
        features: Tensor = self.model(embeds)
        return features[:, at]

    def clean(self, embeds: Tensor, at: Tensor) -> tuple[Tensor, CleanPrefix]:
        raise ValueError("features are read without a cache")


def reader_of(model: PreTrainedModel | TruncatedTransformer, depth: int | None) -> Reader:
    """What reads the model's logits, or with a depth its features.

    Raises:
        InputError: a truncated transformer is asked for logits, or for another depth.
    """
    if not isinstance(model, TruncatedTransformer):
        if depth is None:
            return LogitReader(model)
        return FeatureReader(TruncatedTransformer.from_model(model, depth=depth))
    if depth is None:
        raise InputError(
            "A truncated transformer predicts no token: give --depth, or the whole model."
        )
    if depth != model.depth:
        raise InputError(f"--depth {depth} is not the model's depth, which is {model.depth}.")
    return FeatureReader(model)


class _SharedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """The first `length` keys and values of a layer, read by any number of rows, never written."""

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = length
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = keys[..., :length, :], values[..., :length, :]
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """The length of the prefix, before and after a forward."""
        return self.length

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The prefix followed by the rows' own keys and values, which are not kept.

        Only one layer's rows are in memory at a time.
        """
        rows = key_states.shape[0]
        assert self.keys is not None
        assert self.values is not None
        return (
            torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], dim=-2),
            torch.cat([self.values.expand(rows, -1, -1, -1), value_states], dim=-2),
        )


class CleanPrefix:
    """The keys and values of a clean pass, of which any beginning can be shared by other rows.

    In a causal model the positions before c do not depend on token c, so a row that differs from
    the clean text at c only has to be run from c on.

    Args:
        cache: filled by one forward of one row of `length` tokens.
        length: T.

    Raises:
        ValueError: the cache does not hold plain keys and values of each position.
    """

    def __init__(self, cache: Cache, length: int) -> None:
        self._layers: list[tuple[Tensor, Tensor]] = []
        for layer in cache.layers:
            if type(layer) is not DynamicLayer or layer.get_seq_length() != length:
                raise ValueError(f"the model keeps a {type(layer).__name__}")
            assert layer.keys is not None
            assert layer.values is not None
            self._layers.append((layer.keys, layer.values))
        if not self._layers:
            raise ValueError("the model keeps no keys and values")

    def of(self, length: int) -> Cache:
        """A cache that holds the first `length` positions for any number of rows."""
        return Cache(layers=[_SharedLayer(keys, values, length) for keys, values in self._layers])


def check_gradients(model: nn.Module) -> None:
    """Refuse 4-bit layers whose gradients are wrong, without an error, after a first forward.

    On a CPU with the instructions for it, bitsandbytes repacks their weights for a faster forward.

    Raises:
        InputError: the model has such layers.
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
    Threads that attribute wait for each other.
    """
    with _ONE_AT_A_TIME, torch.inference_mode(False), torch.enable_grad():
        modes = [(module, module.training) for module in model.modules()]
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            for module, _ in modes:
                module.training = False
            # Otherwise every activation is kept for gradients that are not needed.
            for parameter in learning:
                parameter.requires_grad_(False)
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter in learning:
                parameter.requires_grad_(True)


def whole_model(model: PreTrainedModel | TruncatedTransformer) -> PreTrainedModel:
    """The model of transformers itself."""
    return model.model if isinstance(model, TruncatedTransformer) else model


def describe(model: PreTrainedModel | TruncatedTransformer, name: str | None) -> dict[str, Any]:
    """The model and versions that made a result, as plain values; `name` overrides the model's."""
    whole = whole_model(model)
    if isinstance(model, TruncatedTransformer):
        own = model.description["model"]
    else:
        own = whole.config._name_or_path or type(whole).__name__
    quantization = getattr(whole.config, "quantization_config", None)
    return {
        "model": name or own,
        "class": type(whole).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": None if quantization is None else quantization.quant_method.value,
        "device": model.device.type,
        "version": lightning_inversion.__version__,
        "version_torch": torch.__version__,
        "version_transformers": transformers.__version__,
        "version_python": platform.python_version(),
    }
