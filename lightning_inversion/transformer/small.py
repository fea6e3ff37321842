"""Small models that are trained here: their configuration and their tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerFast

ShapeName = Literal["gpt2", "llama"]
"""Learned positions, LayerNorm and a tied head; or rotary ones, RMSNorm, SwiGLU, a head apart."""
_END = "<|endoftext|>"


def small_config(
    shape: ShapeName, width: int, blocks: int, vocabulary: int, positions: int
) -> PretrainedConfig:
    """The configuration of a model of a shape and a width, without dropout.

    Args:
        shape: whose architecture and proportions it has.
        width: D, a multiple of 16.
        blocks: how many.
        vocabulary: V.
        positions: tokens of the longest text.
    """
    heads = max(2, width // 32)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    sizes: dict[str, Any] = {"vocab_size": vocabulary, "num_hidden_layers": blocks, **ids}
    sizes |= {"hidden_size": width, "num_attention_heads": heads}
    sizes["max_position_embeddings"] = positions
    if shape == "gpt2":
        own = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    else:
        own = {"intermediate_size": 8 * width // 24 * 8, "tie_word_embeddings": False}
    return AutoConfig.for_model(shape, **sizes, **own)


def bpe_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on texts: any text round-trips. Id 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=_END, eos_token=_END, pad_token=_END,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
