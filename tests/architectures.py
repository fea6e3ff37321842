"""A tiny random model of every causal architecture that transformers has.

The configurations are transformers' own; the sizes are replaced wherever the architecture has them
under a name of the table. Every parameter is perturbed, so that no gate or scale is left at a value
that hides its path, and windows are shorter than the texts that are run.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.tiny import VOCABULARY, tiny_tokenizer

_SIZES: dict[Any, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input n_tokens original_vocab_size",
    256: "max_position_embeddings n_positions max_seq_len n_ctx original_max_position_embeddings",
    64: """intermediate_size ffn_dim d_ff n_inner d_inner dff decoder_ffn_dim encoder_ffn_dim
        ffn_hidden_size feed_forward_size intermediate_size_mlp dim_ff dense_intermediate_size
        block_ff_dim prefix_dense_intermediate_size mamba_d_ssm index_topk""",
    32: """hidden_size d_model n_embd emb_dim embed_dim embedding_size dim word_embed_proj_dim
        input_embedding_size output_embedding_size lru_width emb_size attention_hidden_size
        moe_intermediate_size moe_intermediate_dim shared_expert_intermediate_size
        shared_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size""",
    16: "moe_latent_size q_lora_rank kv_lora_rank o_lora_rank",
    8: """head_dim global_head_dim d_head d_kv dim_head attention_head_dim kv_channels
        qk_nope_head_dim qk_rope_head_dim v_head_dim index_head_dim mamba_n_heads mamba_d_head
        mamba_d_state mamba_chunk_size mamba_num_heads mamba_head_dim ssm_state_size state_size
        n_groups chunk_size mamba_headdim adapter_rank linear_key_head_dim linear_value_head_dim
        kda_head_dim linear_head_dim hidden_size_per_layer_input laurel_rank sliding_window
        attention_chunk_size""",
    4: """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers
        num_decoder_layers num_encoder_layers num_blocks num_attention_heads n_head n_heads
        num_heads decoder_attention_heads encoder_attention_heads num_decoder_attention_heads
        num_encoder_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts
        num_routed_experts mamba_dt_rank time_step_rank linear_num_value_heads linear_attn_num_heads
        kda_num_heads linear_num_heads""",
    2: """num_key_value_heads num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts
        o_groups index_n_heads mamba_expand n_mamba_heads linear_num_key_heads max_window_layers""",
    1: """n_group topk_group num_expert_group mamba_n_groups mamba_ngroups first_k_dense_replace
        num_dense_layers num_mem_blocks""",
    0: """num_kv_shared_layers num_nextn_predict_layers bos_token_id eos_token_id pad_token_id
        decoder_start_token_id unk_token_id""",
}  # fmt: skip
_SHAPE = {name: value for value, names in _SIZES.items() for name in names.split()}
_SHAPE["use_mambapy"] = False
_KEPT_ABSENT = {
    "head_dim", "n_inner", "sliding_window", "hidden_size_per_layer_input", "moe_latent_size",
}  # fmt: skip
"""Sizes that an architecture goes without where its own configuration leaves them out."""

_DECODER = {"is_decoder": True}
_HEADS_OF_8 = {"head_dim": 8}
_ALL_HEADS = {"num_key_value_heads": 4}
_HYBRID = ["linear_attention", "full_attention"] * 2
_ZAMBA = {
    "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 64,
    "attention_head_dim": 16, "use_mamba_kernels": False, **_ALL_HEADS,
}  # fmt: skip
_EYES = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
_QWEN4 = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
    "indexer_compress_ratio": 4, "hc_lowrank": 8, "ple_embed_dim": 16,
    "ngram_vocab_size_base": 100, "split_ngram_parts": 4, "heads_per_ngram": 2,
    "layer_types": ["linear_attention", "indexed_attention"] * 2,
}  # fmt: skip
_PLACEHOLDERS = {
    "image_token_id": 297, "video_token_id": 293, "audio_token_id": 299, "boi_token_id": 296,
    "eoi_token_id": 295,
}  # fmt: skip
_DOTS3 = {
    f"swa_{name}": value
    for name, value in {
        "num_attention_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "head_dim": 16,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, **_ALL_HEADS,
    }.items()
}  # fmt: skip

_INKLING = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
    "sliding_window_size": 8, "rel_extent": 64, "layer_types": ["hybrid_sliding", "hybrid"] * 2,
}  # fmt: skip

_DECODERS = """bert bert-generation camembert data2vec-text electra ernie megatron-bert rembert
    roberta roberta-prelayernorm roformer xlm-roberta xlm-roberta-xl"""
_LATENT_ATTENTION = """axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa
    longcat_flash minicpm3 youtu"""
_MORE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(_DECODERS.split(), _DECODER),
    **dict.fromkeys(_LATENT_ATTENTION.split(), _ALL_HEADS),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), _HEADS_OF_8),
    "bailing_hybrid": {
        "layer_types": _HYBRID, "mlp_layer_types": ["dense", *["sparse"] * 3],
        "linear_head_dim": 8, "linear_num_heads": 4, **_ALL_HEADS,
    },
    "bamba": {"attn_layer_indices": [1, 3]},
    "big_bird": {**_DECODER, "attention_type": "original_full"},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {
            "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2,
            "ffn_act_fn": {"name": "silu"},
        },
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {**_ALL_HEADS, **_DOTS3},
    "gemma3": {"vision_config": {**_EYES, "hidden_size": 32}, "mm_tokens_per_image": 4},
    "gemma4": _PLACEHOLDERS,
    "gemma4_unified": _PLACEHOLDERS,
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
    },
    "git": {"vision_config": _EYES},
    "got_ocr2": {
        "vision_config": {
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 16,
            "output_channels": 16, "image_size": 64, "global_attn_indexes": [0],
        }
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": _HYBRID},
    "inkling_text": _INKLING,
    "inkling2_text": _INKLING,
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "kimi_linear": {
        "layer_types": _HYBRID, "mlp_layer_types": ["dense", *["sparse"] * 3], **_ALL_HEADS,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mllama/text": {"cross_attention_layers": [2]},
    "modernbert-decoder": {
        "sep_token_id": 0, "cls_token_id": 0, "global_attn_every_n_layers": 2,
        "local_attention": 16,
    },
    "phi4_multimodal": {
        "vision_config": {**_EYES, "crop_size": 28},
        "audio_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2,
            "ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16,
            "nemo_conv_channels": 16,
        },
    },
    "qwen4_exp_text": _QWEN4,
    "qwen4_exp/text": _QWEN4,
    "reformer": {
        **_DECODER, "attn_layers": ["local", "lsh"] * 2, "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 16], "lsh_attn_chunk_length": 16,
        "local_attn_chunk_length": 16, "num_buckets": 2, "attention_head_size": 8,
    },
    "roc_bert": {
        **_DECODER, "enable_pronunciation": False, "enable_shape": False,
        "pronunciation_vocab_size": 50, "shape_vocab_size": 50,
    },
    "xlm": {"causal": True, "sinusoidal_embeddings": False},
    "xlstm": {"embedding_dim": 32, "use_cache": False},
    "xmod": {**_DECODER, "default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": {**_ZAMBA, "n_mamba_heads": 8, "num_query_groups": 4},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip
"""What an architecture's sizes need beside the table, by its name; NAME/text is its inner part."""

NOT_MADE = {
    "blt": "five nested configurations",
    "dots3_note": "its vision adapter must be set with the text's width (dots3_note_text is made)",
    "gemma3n": "needs timm (gemma3n_text is made)",
    "gemma4_assistant": "a drafter: it takes another model's hidden states",
    "gemma4_unified_assistant": "a drafter: it takes another model's hidden states",
    "moss_transcribe_diarize": "a nested audio encoder of 300M parameters",
    "musicgen": "transformers' own AutoModelForCausalLM.from_config fails",
    "musicgen_melody": "transformers' own AutoModelForCausalLM.from_config fails",
}
"""Architectures of transformers' causal mapping that have no tiny model here, and why."""

ARCHITECTURES = tuple(sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(NOT_MADE)))
"""All that can be made."""


def tiny_config(name: str) -> PretrainedConfig:
    """The architecture's own configuration with tiny sizes."""
    kind = CONFIG_MAPPING[name]
    default = kind()
    text = default.get_text_config(decoder=True)
    if type(text) is kind:
        return kind(**_tiny(default, name))
    inner = next(key for key in kind.sub_configs if type(getattr(default, key, None)) is type(text))
    tiny = type(text)(**_tiny(text, f"{name}/text"))
    return kind(**{inner: tiny, **_MORE.get(name, {})})


def _tiny(config: PretrainedConfig, name: str) -> dict[str, Any]:
    own = config.to_dict()
    sizes = {
        key: value
        for key, value in _SHAPE.items()
        if key in own
        and not isinstance(own[key], list | dict)
        and not (own[key] is None and key in _KEPT_ABSENT)
    }
    return {**sizes, **_MORE.get(name, {})}


@torch.no_grad()
def tiny_architecture(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model of the architecture, with its head, all of whose parameters matter."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        tiny_config(name), trust_remote_code=False
    )
    _shorten_chunks(sys.modules[type(model).__module__])
    for path, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        parameter.data = parameter.data.float()
        parameter.nan_to_num_(0.0, 0.0, 0.0)  # left as memory happened to be
        std = float(parameter.std()) if parameter.numel() > 1 else 0.0
        if parameter.dim() > 1 and 0 < std < 0.06 and "A_log" not in path:
            parameter.mul_(5)
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def _shorten_chunks(code: ModuleType) -> None:
    """Let an architecture's code pad to multiples of 8 positions, not of 64: same, and sooner.

    Linear attention runs in chunks, which without a GPU's kernels cost a second each.
    """
    for function in map(inspect.unwrap, filter(callable, vars(code).values())):
        if isinstance(function, FunctionType) and function.__defaults__:
            arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
            defaults = zip(reversed(arguments), reversed(function.__defaults__), strict=False)
            function.__defaults__ = tuple(
                8 if name == "chunk_size" else default for name, default in reversed([*defaults])
            )


def save_architecture(folder: Path, name: str, seed: int = 0) -> PreTrainedModel:
    """Save the model with a tokenizer the way a downloaded model lies in a folder; returns it."""
    model = tiny_architecture(name, seed)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model
