"""Architectures whose loading or running differs from Llama's, each for its own reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel

from lightning_inversion.errors import InputError
from lightning_inversion.transformer import TransformerSpec, TruncatedTransformer
from tests.architectures import save_architecture, tiny_architecture

IDS = torch.randint(1, 290, (2, 20), generator=torch.Generator().manual_seed(0))

SLOW = pytest.mark.integration
DIFFERENT = [
    "minicpm3",  # scales its residuals by the number of blocks
    "mamba",  # its configuration's layer types cannot be set; it keeps a state, not keys
    "roberta",  # AutoModel would ask for a pooler
    "bart",  # the decoder of an encoder-decoder
    pytest.param("openai-gpt", marks=SLOW),  # its blocks return lists
    pytest.param("granite_swa", marks=SLOW),  # as many rotary embeddings as blocks
    pytest.param("git", marks=SLOW),  # as many blocks for images as for text
    pytest.param("gpt_neox_japanese", marks=SLOW),  # its last block has one weight more
    pytest.param("longcat_flash", marks=SLOW),  # counts two caches to a block
    pytest.param("llama4_text", marks=SLOW),
]


@pytest.mark.parametrize("name", DIFFERENT)
def test_loaded_features_are_the_hidden_states(name: str, tmp_path: Path) -> None:
    model = save_architecture(tmp_path, name)
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True, use_cache=False).hidden_states
    first = int(name == "mamba")  # whose states lack the embeddings
    for depth in (1, 3):
        transformer = TransformerSpec(model=str(tmp_path), depth=depth).load()
        torch.testing.assert_close(
            transformer.features_of(IDS), states[depth - first], rtol=1e-4, atol=1e-4
        )
        blocks = [*transformer.model.parameters()]
        assert len(blocks) < len([*model.parameters()])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("xlnet", "gives hidden states of shape"),
        pytest.param("gemma4_text", "needs token ids beside their vectors", marks=SLOW),
        pytest.param("cpmant", "needs token ids beside their vectors", marks=SLOW),
        pytest.param("xlm", "no single list of its 4 blocks", marks=SLOW),
    ],
)
def test_what_cannot_be_inverted_is_refused(name: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        TruncatedTransformer.from_model(tiny_architecture(name), depth=2)


def test_an_encoder_is_refused() -> None:
    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64,
    )  # fmt: skip
    with pytest.raises(InputError, match="is not causal"):
        TruncatedTransformer.from_model(BertLMHeadModel(config).eval(), depth=1)


def test_vectors_that_a_model_writes_in_stay_as_they_were() -> None:
    transformer = TruncatedTransformer.from_model(tiny_architecture("ctrl"), depth=2)
    vectors = transformer.embedding(IDS)
    before = vectors.clone().requires_grad_()
    transformer(vectors)
    assert torch.equal(vectors, before)
    transformer(before).sum().backward()  # a leaf
    assert before.grad is not None
