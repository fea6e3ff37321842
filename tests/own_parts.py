"""Parts that a user might write: an objective, a decoder, a proposer, a model family."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import huber_loss
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from lightning_inversion.decoding import Decoder
from lightning_inversion.objectives import Objective
from lightning_inversion.proposers.proposals import Proposals, Proposer
from lightning_inversion.recovery.search import PrefixSearch
from lightning_inversion.transformer.embedding import TokenEmbedding
from lightning_inversion.transformer.surgery import FAMILIES, Family


class Huber(Objective):
    """Squares small differences and takes large ones as they are.

    Args:
        delta: where small ends, in units of the features.
    """

    def __init__(self, delta: float = 1.0) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, generated: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """``([B, T, F], [B, T, F], [B, T]) -> [B]``."""
        loss = huber_loss(generated, target, reduction="none", delta=self.delta)
        return (loss * mask[..., None]).sum((1, 2))


class CentredCosineDecoder(Decoder):
    """Cosine after the mean token is taken off both sides."""

    def __call__(self, vectors: Tensor, embedding: TokenEmbedding) -> Tensor:
        """``[..., D] -> [..., V]``."""
        centred = vectors - embedding.mean
        products = embedding.dot(centred) - (centred @ embedding.mean)[..., None]
        lengths = (embedding.matrix.float() - embedding.mean).norm(dim=1).clamp_min(1e-12)
        return products / lengths


class SuspectedText(Proposer):
    """The tokens of a text that is suspected, the frequent ones first; then all others.

    Args:
        text: like the one to be recovered.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def begin(self, search: PrefixSearch) -> Proposals:
        """What depends on the model is made here."""
        return _ByFrequency(search, self.name, self.text)


class _ByFrequency(Proposals):
    def __init__(self, search: PrefixSearch, name: str, text: str) -> None:
        super().__init__(search, name)
        transformer = search.transformer
        ids = transformer.tokenizer(text, add_special_tokens=False)["input_ids"]
        vocabulary = transformer.embedding.vocabulary_size
        counts = torch.bincount(torch.tensor(ids), minlength=vocabulary)
        self.logarithms = (counts + 1e-3).log().to(transformer.device)

    def scores(self, rows: Tensor) -> Tensor:
        return self.logarithms.expand(len(rows), -1)


class MyConfig(LlamaConfig):
    model_type = "my_llama"


class MyForCausalLM(LlamaForCausalLM):
    config_class = MyConfig


AutoConfig.register("my_llama", MyConfig)
AutoModelForCausalLM.register(MyConfig, MyForCausalLM)

FAMILIES["my_llama"] = Family(
    attention="self_attn",  # the names of a block's own children
    mlp=("mlp",),
    norms=("input_layernorm", "post_attention_layernorm"),
    middle="post_attention_layernorm",
)
