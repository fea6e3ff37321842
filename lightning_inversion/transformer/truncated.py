"""The frozen, truncated transformer: vectors -> features."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from lightning_inversion.transformer.blocks import (
    cut_blocks_,
    frozen_copy,
    language_model,
    repeat_first_block_,
    replace_module_,
    shorten_config_,
    takes_position_ids,
)
from lightning_inversion.transformer.candidates import (
    GROUP,
    plain_candidates,
    tree_candidates,
    tree_fits,
    tree_works,
)
from lightning_inversion.transformer.embedding import TokenEmbedding
from lightning_inversion.transformer.ragged_cache import cache_works
from lightning_inversion.transformer.selection import Selection
from lightning_inversion.transformer.surgery import Surgery, check_bidirectional, operate_


class TruncatedTransformer(nn.Module):
    """The first blocks of a causal language model, frozen: O(a) of the document.

    The features are the output of block `depth`: Hugging Face's `hidden_states[depth]`, but for
    the last block, whose `hidden_states` are taken after the final norm (`final_norm=True` does).
    They are float32 whatever the model computes in.

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
        self.depth = selection.depth
        self.surgery = surgery or Surgery()
        self.causal = self.surgery.causal
        self._description = dict(description or {})

        own = model.get_input_embeddings()
        self.embedding = embedding or TokenEmbedding.from_module(own)
        # The model is only ever given vectors. Without its own embedding, W is held once, even
        # where it is scaled or moved to another device.
        replace_module_(model, own, nn.Identity())
        # A tuple, so that they are not registered a second time.
        self.blocks = cut_blocks_(model, self.depth)
        shorten_config_(model.config, self.depth)
        if self.surgery.repeat_first:
            self.blocks = repeat_first_block_(model)
        operate_(model, self.blocks, self.surgery)
        self.model = model
        self.requires_grad_(False)
        self.eval()
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
        surgery: Surgery | None = None,
        embedding: TokenEmbedding | None = None,
    ) -> TruncatedTransformer:
        """Of a model in memory, whose weights are shared and which itself stays as it is.

        Args:
            model: a causal language model, or its base model.
            tokenizer: its tokenizer.
            depth: blocks kept; None for all.
            layers: several depths, their features concatenated.
            features: a slice of the features, 'start:stop'.
            final_norm: apply the model's final norm to the (last) features.
            surgery: parts of the blocks to switch off.
            embedding: another token embedding in the place of the model's own.

        Raises:
            InputError: the depths or the slice do not fit the model.
        """
        base = language_model(model)
        selection = Selection.of(base.config, depth, layers, features, final_norm)
        name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        return cls(
            frozen_copy(base),
            tokenizer,
            selection=selection,
            surgery=surgery,
            embedding=embedding,
            description={"model": name},
        )

    def train(self, mode: bool = True) -> TruncatedTransformer:
        """Stays in evaluation mode whatever the mode of what contains it: no dropout, ever."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Where the vectors have to be."""
        return self.embedding.matrix.device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.embedding.matrix.dtype

    @cached_property
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
        allowed = None if self.causal else _everything(inputs_embeds, mask)
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
        """One forward of the model; `forward`, `candidates` and `KnownPrefix` call it.

        Args:
            embeds: [B, T, D].
            allowed: [B, T, P + T] bool, which position (row) sees which; None for the model's own.
            positions: [B, T] position ids; None for the model's own.
            cache: keys and values of P known tokens before these; P is 0 without.
        """
        if self.surgery.positions != "own":
            positions = torch.zeros(embeds.shape[:2], dtype=torch.long, device=embeds.device)
            if allowed is None:
                # transformers would take equal positions for many texts packed into one row.
                allowed = _everything(embeds, None).tril()
        if allowed is not None and positions is None and takes_position_ids(self.model):
            # OPT would count positions from the mask.
            positions = torch.arange(embeds.shape[1], device=embeds.device).expand(embeds.shape[:2])
        given: dict[str, Any] = {}
        if allowed is not None:
            hidden = torch.zeros(allowed.shape, dtype=self.dtype, device=self.device)
            hidden.masked_fill_(~allowed, torch.finfo(self.dtype).min)
            given["attention_mask"] = hidden[:, None]
        if positions is not None:
            given["position_ids"] = positions
        if cache is not None:
            given["past_key_values"] = cache
        with self.selection.listening(self.blocks) as heard:
            output = self.model(
                inputs_embeds=embeds.to(self.dtype), use_cache=cache is not None, **given
            )
        return self.selection.features_in(heard, output.last_hidden_state).float().to(embeds.device)

    @cached_property
    def tree_attention(self) -> bool:
        """Whether `candidates` may use tree attention; tried out once, when first asked."""
        return tree_works(self)

    @cached_property
    def caches(self) -> bool:
        """Whether `KnownPrefix` may keep keys and values; tried out once, when first asked."""
        return cache_works(self)

    def candidates(
        self, prefix_embeds: Tensor, lengths: Tensor, candidate_embeds: Tensor
    ) -> Tensor:
        """Features [B, K, F] of K candidates at the position after each row's prefix.

        Args:
            prefix_embeds: [B, P, D].
            lengths: [B], how many of the P vectors are row b's prefix; the rest is padding.
            candidate_embeds: [B, K, D].

        No gradients.
        """
        longest, beside = int(lengths.max()), min(GROUP, candidate_embeds.shape[1])
        fits = tree_fits(self.model.config, longest + 1, longest + beside)
        work = tree_candidates if fits and self.tree_attention else plain_candidates
        return work(self, prefix_embeds, lengths, candidate_embeds)

    @cached_property
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


def _everything(embeds: Tensor, mask: Tensor | None) -> Tensor:
    """[B, T, T]: every position sees every position that is no padding."""
    B, T, _ = embeds.shape
    if mask is None:
        mask = torch.ones(B, T, dtype=torch.bool, device=embeds.device)
    return mask[:, None, :].expand(B, T, T)
