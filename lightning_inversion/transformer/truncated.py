"""The frozen, truncated transformer: vectors -> features."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from lightning_inversion.errors import module_property
from lightning_inversion.transformer.blocks import (
    config_of,
    cut_blocks_,
    frozen_copy,
    repeat_first_block_,
    replace_module_,
    takes_position_ids,
    without_head,
)
from lightning_inversion.transformer.cached import kept
from lightning_inversion.transformer.embedding import TokenEmbedding
from lightning_inversion.transformer.kv_cache import (
    additive_mask,
    one_after_another,
    recording_cache,
)
from lightning_inversion.transformer.load_checks import (
    CacheCheck,
    check_caches,
    check_reads_vectors,
)
from lightning_inversion.transformer.selection import Output, Selection
from lightning_inversion.transformer.surgery import Surgery, check_bidirectional, operate_

_ROWS = 256
"""Rows of one forward of candidates, which bounds the memory."""


class TruncatedTransformer(nn.Module):
    """The first blocks of a causal language model, frozen: O(a) of the source.

    The features are the output of block `depth`: Hugging Face's `hidden_states[depth]`, but for
    the last block, whose `hidden_states` are taken after the final norm (`final_norm=True` does),
    and for Mamba and RWKV, whose `hidden_states` lack the embeddings: `hidden_states[depth - 1]`.
    They are float32 whatever the model computes in. With another `output` they are the keys and
    values that block `depth + 1` computes of these hidden states, as they lie in a model's cache.

    Built by `TransformerSpec.load` or `from_model`; the constructor takes the model over and
    cuts it in place.

    Attributes:
        embedding: ids -> vectors.
        tokenizer: text <-> ids; None for a model in memory that was given without.
        depth: the number of blocks kept.
        blocks: the model's, in their order.
        causal: whether a position sees only itself and what is before it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        selection: Selection,
        surgery: Surgery | None = None,
        embedding: TokenEmbedding | None = None,
        description: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.selection = selection
        self.depth = selection.blocks
        self.surgery = surgery or Surgery()
        self.causal = self.surgery.causal
        self._description = dict(description or {})

        # A tuple, so that they are not registered a second time.
        self.blocks = cut_blocks_(model, self.depth)
        self.model = model
        self.requires_grad_(False)
        self.eval()
        own = model.get_input_embeddings()
        run = partial(self._features, use_cache=False)
        check_reads_vectors(type(model).__name__, run, own, self.blocks)
        self.embedding = embedding or TokenEmbedding.from_module(own)
        # The model is only ever given vectors. Without its own embedding, W is held once, even
        # where it is scaled or moved to another device.
        replace_module_(model, own, nn.Identity())
        if self.surgery.repeat_first:
            self.blocks = repeat_first_block_(model)
        operate_(model, self.blocks, self.surgery)
        if not self.causal:
            check_bidirectional(self, self.embedding.matrix[None, :4].float())

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        depth: int | None = None,
        layers: Sequence[int] | None = None,
        features: str | None = None,
        final_norm: bool = False,
        output: Output = "hidden_states",
        surgery: Surgery | None = None,
        embedding: TokenEmbedding | None = None,
    ) -> TruncatedTransformer:
        """Truncate a model in memory: its weights are shared, and it stays as it is.

        Args:
            model: a causal language model, or its base model.
            tokenizer: its tokenizer.
            depth: blocks kept; None for all.
            layers: several depths, their features concatenated.
            features: a slice of the features, 'start:stop'.
            final_norm: apply the model's final norm to the (last) features.
            output: hidden states, or keys and values of the block after them.
            surgery: parts of the blocks to switch off.
            embedding: another token embedding instead of the model's own.

        Raises:
            InputError: the depths or the slice do not fit the model.
        """
        base = without_head(model)
        selection = Selection.of(base.config, depth, layers, features, final_norm, output)
        name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        return cls(
            frozen_copy(base),
            tokenizer,
            selection=selection,
            surgery=surgery,
            embedding=embedding,
            description={"model": name},
        )

    def centred(self) -> TruncatedTransformer:
        """The same model, whose features lose their mean over the features; it shares all parts."""
        return self._selecting(replace(self.selection, centred=True))

    def uncut(self) -> TruncatedTransformer:
        """The same model, without the slice of its features; it shares all parts."""
        return self._selecting(replace(self.selection, features=None))

    def _selecting(self, selection: Selection) -> TruncatedTransformer:
        other = copy(self)
        other.selection = selection
        other.__dict__.pop("feature_size", None)  # the only cached value that follows from it
        return other

    def train(self, mode: bool = True) -> TruncatedTransformer:
        """Stays in evaluation mode whatever the mode of what contains it: no dropout, ever."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """The device on which vectors must be."""
        return self.embedding.matrix.device

    @property
    def dtype(self) -> torch.dtype:
        """The type that the model computes in."""
        return self.embedding.matrix.dtype

    @property
    def keeps_embeddings(self) -> bool:
        """Whether the features hold a token's whole embedding, with what the blocks add to it."""
        selection = self.selection
        return self.surgery.residuals and selection.features is None and not selection.of_cache

    @module_property
    @torch.no_grad()
    def feature_size(self) -> int:
        """F, found by running one token."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        return self.features_of(token).shape[-1]

    def forward(self, inputs_embeds: Tensor, mask: Tensor | None = None) -> Tensor:
        """Vectors [B, T, D] -> features [B, T, F]; rows are independent.

        Args:
            inputs_embeds: what the embedding gives, or anything like it.
            mask: [B, T] bool, False for padding, which must be at the right. Features there are
                0, and neither they nor the vectors there influence anything.
        """
        allowed = None
        if not self.causal:  # every position sees every position that is no padding
            B, T, _ = inputs_embeds.shape
            tokens = torch.ones_like(inputs_embeds[..., 0], dtype=torch.bool)
            allowed = (tokens if mask is None else mask)[:, None, :].expand(B, T, T)
        if mask is None:
            return self.run(inputs_embeds, allowed)
        padding = ~mask[..., None]
        # What is right of a position cannot reach it in a causal model: no attention mask is
        # needed, which keeps the faster kernels and the model's own positions.
        features = self.run(inputs_embeds.masked_fill(padding, 0.0), allowed)
        return features.masked_fill(padding, 0.0)

    @torch.no_grad()
    def features_of(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features [B, T, F] of ids [B, T], without gradients."""
        features: Tensor = self(self.embedding(ids), mask)
        return features

    def run(
        self,
        embeds: Tensor,
        allowed: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """One forward of the model; `forward`, `candidates` and `FixedPrefix` call it.

        Args:
            embeds: [B, T, D].
            allowed: [B, T, P + T] bool, which position (row) sees which; None for the model's own.
            positions: [B, T] position ids; None for the model's own.
            cache: keys and values of P known tokens before these; P is 0 without.
        """
        if self.surgery.positions != "own":
            positions = torch.zeros(embeds.shape[:2], dtype=torch.long, device=embeds.device)
            if allowed is None:
                # transformers would take equal positions for many sequences packed into one row.
                allowed = one_after_another(embeds.shape[1], embeds.device)[None]
                allowed = allowed.expand(embeds.shape[0], -1, -1)
        if allowed is not None and positions is None and takes_position_ids(self.model):
            # OPT would count positions from the mask.
            positions = torch.arange(embeds.shape[1], device=embeds.device).expand(embeds.shape[:2])
        given: dict[str, Any] = {}
        if allowed is not None:
            given["attention_mask"] = additive_mask(allowed, self.dtype)
        if positions is not None:
            given["position_ids"] = positions
        if cache is not None:
            given["past_key_values"] = cache
        given["inputs_embeds"] = embeds.to(self.dtype, copy=True)  # CTRL writes in it
        return self._features(use_cache=cache is not None, **given).float().to(embeds.device)

    def _features(self, **given: Any) -> Tensor:
        """The selected features of one forward of the model."""
        if self.selection.of_cache and "past_key_values" not in given:
            given |= {"past_key_values": recording_cache(self.depth), "use_cache": True}
        with self.selection.capturing(self.blocks) as outputs:
            output = self.model(**given)
        return self.selection.features_in(outputs, output, given.get("past_key_values"))

    def candidates(
        self, prefix_embeds: Tensor, lengths: Tensor, candidate_embeds: Tensor
    ) -> Tensor:
        """Features [B, K, F] of K candidates at the position after each row's prefix.

        Each candidate is run with its whole prefix, which every model takes; `FixedPrefix` is the
        fast way. Differentiable in the candidates.

        Args:
            prefix_embeds: [B, P, D].
            lengths: [B], how many of the P vectors are row b's prefix; the rest is padding.
            candidate_embeds: [B, K, D].
        """
        B, K, D = candidate_embeds.shape
        P = int(lengths.max())
        positions = torch.arange(P + 1, device=self.device)
        owner = torch.arange(B, device=self.device).repeat_interleave(K)
        features = []
        for rows, embeds in zip(
            torch.split(owner, _ROWS),
            torch.split(candidate_embeds.reshape(-1, D), _ROWS),
            strict=True,
        ):
            each, ends = torch.arange(len(rows), device=self.device), lengths[rows]
            sequence = prefix_embeds.new_zeros(len(rows), P + 1, D)
            sequence[:, :P] = prefix_embeds[rows, :P]
            sequence = sequence.index_put((each, ends), embeds)
            features.append(self(sequence, positions <= ends[:, None])[each, ends])
        return torch.cat(features).reshape(B, K, -1)

    @module_property
    def caches(self) -> bool:
        """Whether `FixedPrefix` may keep keys and values: compared once with plain forwards."""
        if not self.causal:
            return False  # the prefix would see the candidates
        return kept(CacheCheck, self.identity, self._caching).works

    def _caching(self) -> CacheCheck:
        return check_caches(self.embedding, self.depth, self.run, self.candidates)

    @module_property
    def fingerprint(self) -> str:
        """sha256 of the kept weights, with their names and types."""
        digest = hashlib.sha256()
        # A block that repeats another counts as a block, whether its tensors are the same objects.
        weights = self.named_parameters(remove_duplicate=False)
        for name, tensor in [*weights, *self.named_buffers()]:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(raw.numpy().data)
        return digest.hexdigest()

    @property
    def description(self) -> dict[str, Any]:
        """Where the features come from, as plain values: for results and for captured targets."""
        return {
            **self._description,
            **self.selection.description(),
            **self.surgery.description(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention": self.model.config._attn_implementation,
            "weights_sha256": self.fingerprint,
        }

    @property
    def identity(self) -> dict[str, Any]:
        """What the features depend on, as plain values: what was measured is found again by it."""
        device = self.device
        return {
            "description": self.description,
            "features": {**self.selection.description(), **self.surgery.description()},
            "computed": [str(self.dtype), self.model.config._attn_implementation],
            "weights": self.fingerprint,
            "kind": f"{type(self.model).__module__}.{type(self.model).__qualname__}",
            "modules": repr(self.model),
            "config": config_of(self.model),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "versions": [torch.__version__, version("transformers")],
        }
