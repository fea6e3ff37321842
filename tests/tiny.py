"""Tiny random models, one for each family: the stand-ins that let tests run in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 300
WIDTH = 32
BLOCKS = 4

SENTENCES = [
    "The sky is blue.",
    "The sky is blue or red depending on the time of day.",
    "This is a prompt sentence.",
    "The wipers on the bus go swish swish.",
    "A quick brown fox jumps over the lazy dog.",
]

_SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def _shape(**more: Any) -> dict[str, Any]:
    """The shape under the names most families share."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        **_SPECIAL,
        **more,
    }


def _gpt_shape(**more: Any) -> dict[str, Any]:
    """The shape under the names of GPT-2 and GPT-J."""
    return {
        "vocab_size": VOCABULARY,
        "n_embd": WIDTH,
        "n_layer": BLOCKS,
        "n_head": 4,
        "n_positions": 128,
        **_SPECIAL,
        **more,
    }


CONFIGS: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "gpt2": lambda: hf.GPT2Config(**_gpt_shape()),
    "gptj": lambda: hf.GPTJConfig(**_gpt_shape(rotary_dim=4)),
    "gpt_neo": lambda: hf.GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_layers=BLOCKS,
        num_heads=4,
        max_position_embeddings=128,
        attention_types=[[["global", "local"], BLOCKS // 2]],
        **_SPECIAL,
    ),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**_shape()),
    "llama": lambda: hf.LlamaConfig(**_shape(num_key_value_heads=2)),
    "mistral": lambda: hf.MistralConfig(**_shape(num_key_value_heads=2)),
    "mixtral": lambda: hf.MixtralConfig(**_shape(num_key_value_heads=2, num_local_experts=4)),
    "qwen2": lambda: hf.Qwen2Config(**_shape(num_key_value_heads=2)),
    "qwen3": lambda: hf.Qwen3Config(**_shape(num_key_value_heads=2, head_dim=8)),
    "gemma": lambda: hf.GemmaConfig(**_shape(num_key_value_heads=2, head_dim=8)),
    "gemma2": lambda: hf.Gemma2Config(**_shape(num_key_value_heads=2, head_dim=8)),
    "gemma3_text": lambda: hf.Gemma3TextConfig(**_shape(num_key_value_heads=2, head_dim=8)),
    "opt": lambda: hf.OPTConfig(
        **{key: value for key, value in _shape().items() if key != "intermediate_size"},
        ffn_dim=64,
        word_embed_proj_dim=WIDTH,
    ),
    "bloom": lambda: hf.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=BLOCKS, n_head=4, **_SPECIAL
    ),
    "falcon": lambda: hf.FalconConfig(**_shape()),
    "mpt": lambda: hf.MptConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, n_layers=BLOCKS, n_heads=4, max_seq_len=128
    ),
    "phi": lambda: hf.PhiConfig(**_shape()),
    "olmo2": lambda: hf.Olmo2Config(**_shape(num_key_value_heads=2)),
    "stablelm": lambda: hf.StableLmConfig(**_shape(num_key_value_heads=2)),
    "granite": lambda: hf.GraniteConfig(**_shape(num_key_value_heads=2)),
    "phi3": lambda: hf.Phi3Config(**_shape(num_key_value_heads=2)),
    "smollm3": lambda: hf.SmolLM3Config(**_shape(num_key_value_heads=2)),
    "cohere": lambda: hf.CohereConfig(**_shape(num_key_value_heads=2)),
}
FAMILIES = tuple(CONFIGS)
FEW = ("gpt2", "llama", "gemma2", "bloom")
"""Learned and rotary positions, ALiBi; a scaled embedding; with and without cached keys."""


def each(families: Iterable[str]) -> pytest.MarkDecorator:
    """A test for each family. Those not in `FEW` are integration tests: they are many."""
    slow = pytest.mark.integration
    cases = [pytest.param(name, marks=() if name in FEW else slow) for name in families]
    return pytest.mark.parametrize("family", cases)


def tiny_model(family: str, attention: str | None = None, seed: int = 0) -> hf.PreTrainedModel:
    """A random causal LM of `family` with weights large enough that attention matters.

    Its attention is sdpa where the family has it, unless another is named.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = hf.AutoModelForCausalLM.from_config(
            CONFIGS[family](), attn_implementation=attention
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(5)
    return model.eval()


@cache
def shared_tiny_model(family: str, attention: str | None = None) -> hf.PreTrainedModel:
    """The same, made once: for tests that leave it as it is."""
    return tiny_model(family, attention)


def tiny_tokenizer() -> hf.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCABULARY` tokens: any text round-trips. Id 0 is the end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def save_tiny(folder: Path, family: str = "llama", seed: int = 0) -> Path:
    """Save a tiny model with its tokenizer the way a downloaded model lies in a folder."""
    tiny_model(family, seed=seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
