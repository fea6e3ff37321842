"""A tiny .gguf file, written here, is converted once and loads like any folder."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch

from lightning_inversion.transformer import TransformerSpec, resolve_source
from lightning_inversion.transformer.sources import is_converted
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


@pytest.fixture
def tiny_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny Llama as a .gguf file, and a cache of its own."""
    monkeypatch.setenv("LIGHTNING_INVERSION_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
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
    return file


def test_a_gguf_file_gives_the_same_features(
    tiny_gguf: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    transformer = TransformerSpec(model=str(tiny_gguf), depth=2).load()
    assert "Writing" not in (noise := capfd.readouterr().err)
    assert "%" not in noise
    ids = torch.tensor([[5, 9, 77, 120, 33]])
    with torch.no_grad():
        expected = tiny_model("llama")(ids, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(transformer.features_of(ids), expected)
    assert transformer.tokenizer is not None
    text = "The sky is blue, encore."
    assert transformer.tokenizer(text).input_ids == tiny_tokenizer()(text).input_ids
    assert transformer.tokenizer.decode(transformer.tokenizer(text).input_ids) == text


def test_a_conversion_is_kept_and_a_damaged_one_is_made_again(tiny_gguf: Path) -> None:
    folder = Path(resolve_source(str(tiny_gguf)).location)
    weights = folder / "model.safetensors"
    written = weights.stat().st_mtime_ns
    resolve_source(str(tiny_gguf))
    assert weights.stat().st_mtime_ns == written
    weights.write_bytes(weights.read_bytes()[:1000])
    assert not is_converted(folder)
    resolve_source(str(tiny_gguf))
    assert is_converted(folder)
