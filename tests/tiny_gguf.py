"""The tiny Llama as a .gguf file."""

from __future__ import annotations

import json
from pathlib import Path

import gguf

from tests.tiny import BLOCKS, VOCABULARY, WIDTH, tiny_model, tiny_tokenizer

TENSORS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def save_tiny_gguf(file: Path) -> None:
    """Write the model and its tokenizer."""
    model = tiny_model("llama")
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    bpe = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].__getitem__))
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    state = model.state_dict()
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    writer.add_tensor("output.weight", state["lm_head.weight"].numpy())
    for block in range(BLOCKS):
        for name, module in TENSORS.items():
            weight = state[f"model.layers.{block}.{module}.weight"]
            if name in ("attn_q", "attn_k"):  # the format interleaves the halves of rotary heads
                heads = 4 if name == "attn_q" else 2
                halves = weight.reshape(heads, 2, -1, WIDTH)
                weight = halves.transpose(1, 2).reshape(weight.shape).contiguous()
            writer.add_tensor(f"blk.{block}.{name}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
