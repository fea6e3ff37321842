"""SmolLM2-135M: trained weights, massive activations, quantisation, memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lightning_inversion.transformer import TransformerSpec, TruncatedTransformer
from lightning_inversion.transformer.prefix import FixedPrefix

pytestmark = pytest.mark.integration

TEXT = "The sky is blue or red depending on the time of day."


def test_features_are_the_hidden_states(smollm2: TruncatedTransformer) -> None:
    model, tokenizer = TransformerSpec().load_causal_lm()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(smollm2.features_of(ids), states[1])
    assert torch.equal(TransformerSpec(depth=8).load().features_of(ids), states[8])
    whole = TransformerSpec(depth=None, final_norm=True).load()
    assert torch.equal(whole.features_of(ids), states[-1])


def test_the_tokenizer_round_trips(smollm2: TruncatedTransformer) -> None:
    assert smollm2.tokenizer is not None
    assert smollm2.tokenizer.decode(smollm2.tokenizer(TEXT).input_ids) == TEXT


def test_duplicate_tokens_and_decoding(smollm2: TruncatedTransformer) -> None:
    embedding = smollm2.embedding
    duplicates = embedding.duplicates()
    assert sum(len(group) - 1 for group in duplicates) == 11
    found = embedding.unmix(embedding(torch.arange(2000))).argmax(-1)
    assert (found != torch.arange(2000)).sum() < 60


def test_candidates_behind_kept_keys_are_plain_rows(smollm2: TruncatedTransformer) -> None:
    assert smollm2.caches
    prefix, rows = FixedPrefix(smollm2, 2), torch.arange(2)
    vectors = smollm2.embedding(torch.arange(200, 212).reshape(2, 6))
    tried = smollm2.embedding(torch.arange(1000, 1128).reshape(2, 64))
    lengths = torch.tensor([6, 3])
    prefix.begin(rows, vectors, lengths)
    found = prefix.candidates(rows, tried)
    expected = smollm2.candidates(vectors, lengths, tried)
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(("quantization", "least"), [("int8", 0.99), ("nf4", 0.98)])
def test_quantised_gradients_and_rows(
    quantization: str,
    least: float,
    smollm2: TruncatedTransformer,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("bitsandbytes")
    quantised = TransformerSpec(quantization=quantization).load()  # type: ignore[arg-type]
    embeds = smollm2.embedding(torch.tensor([[504, 6376, 314, 4461, 30]]))

    def gradient(transformer: TruncatedTransformer) -> torch.Tensor:
        target = transformer(embeds.roll(1, dims=1)).detach()
        leaf = embeds.clone().requires_grad_()
        (transformer(leaf) - target).abs().sum().backward()
        assert leaf.grad is not None
        return leaf.grad.flatten()

    agreement = torch.nn.functional.cosine_similarity(gradient(quantised), gradient(smollm2), dim=0)
    assert agreement > least
    together = quantised(torch.cat([embeds, 3 * embeds.flip(1)]))[:1]
    torch.testing.assert_close(together, quantised(embeds), rtol=1e-4, atol=1e-4)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


MEASURE = """
import resource
import lightning_inversion.transformer as lt
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
libraries = peak()
t = lt.TransformerSpec(depth=1).load()
x = t.embedding(__import__('torch').tensor([[504, 6376]])).requires_grad_()
t(x).sum().backward()
kept = 4 * (sum(p.numel() for p in t.parameters()) + t.embedding.matrix.numel())
print(peak() / (libraries + kept))
"""


def test_peak_memory_is_that_of_the_kept_blocks(smollm2: TruncatedTransformer) -> None:
    run = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True
    )
    assert float(run.stdout) < 1.3
