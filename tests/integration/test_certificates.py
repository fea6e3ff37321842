"""Inputs whose certificates could mislead, each with its right outcome."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf

from lightning_inversion.cache import ENVIRONMENT
from lightning_inversion.data.storage import Storage
from lightning_inversion.proposers.probe_proposer import ProbeProposer
from lightning_inversion.recovery.policy import RecoveredPrompt, Targets, recover_prompts
from lightning_inversion.recovery.token_recovery import TokenRecovery
from lightning_inversion.transformer.language_model import LanguageModel
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.truncated import TruncatedTransformer
from lightning_inversion.verification.calibration import Calibration
from lightning_inversion.verification.measurements import Measurements

pytestmark = pytest.mark.integration

POLICY = TokenRecovery(ProbeProposer(), candidates=64)
NEVER_TRAINED = [
    "gh_stars", "issue_start", "issue_comment", "issue_closed", "jupyter_start", "jupyter_text",
    "jupyter_code", "jupyter_output", "jupyter_script", "empty_output", "file_sep",
]  # fmt: skip


def small(positions: int = 64) -> hf.PreTrainedModel:
    """A random GPT-2 whose attention matters."""
    torch.manual_seed(0)
    shape = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": positions}
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def false(prompts: list[RecoveredPrompt], truth: list[list[int]]) -> int:
    return sum(
        token.verified and token.id != right
        for prompt, ids in zip(prompts, truth, strict=True)
        for token, right in zip(prompt.tokens, ids, strict=True)
    )


def test_tokens_that_training_never_saw() -> None:
    """Eleven special tokens of SmolLM2, most of them with equal or nearly equal embeddings."""
    transformer, whole = TransformerSpec(depth=1).load_with_head()
    kept = Measurements.measure(transformer, LanguageModel(whole, transformer.caches))
    tokenizer = transformer.tokenizer
    assert tokenizer is not None
    prompts = [f"The sky <{name}> is blue <{name}>." for name in NEVER_TRAINED]
    truth = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    special = set(tokenizer.convert_tokens_to_ids([f"<{name}>" for name in NEVER_TRAINED]))
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in truth], batch_first=True)
    first_duplicate = transformer.embedding.first_duplicate
    for storage in (Storage("float32"), Storage("bfloat16")):
        calibration = Calibration.measure(transformer, kept.probe, storage, kept.text)
        measurements = replace(kept, calibration=calibration)
        target = storage(transformer.features_of(ids))
        found = recover_prompts(
            TokenRecovery(), measurements, Targets(target, [len(row) for row in truth])
        )
        assert false(found, truth) == 0
        for prompt, row in zip(found, truth, strict=True):
            for token, right in zip(prompt.tokens, row, strict=True):
                if token.state == "group":
                    assert right in special
                    members = set(first_duplicate[list(token.alternatives)].tolist())
                    assert storage.dtype == "bfloat16" or int(first_duplicate[right]) in members
                else:
                    assert token.id == right
                    assert token.state in ("verified", "conditional")


def test_another_machines_rounding_is_within_the_threshold() -> None:
    """A model in bfloat16, and a target that was computed in float32 and rounded."""
    low = small().to(torch.bfloat16)
    transformer = TruncatedTransformer.from_model(low, depth=2)
    wide = TruncatedTransformer.from_model(copy.deepcopy(low).float(), depth=2)
    storage = Storage("bfloat16")
    ids = torch.randint(300, (30, 6), generator=torch.Generator().manual_seed(0))
    target = storage(wide.features_of(ids))
    measurements = Measurements.measure(transformer, None, storage)
    found = recover_prompts(POLICY, measurements, Targets(target, [6] * 30))
    assert false(found, ids.tolist()) == 0
    assert sum(prompt.tokens[0].verified for prompt in found) == 30
    assert sum(token.verified for prompt in found for token in prompt.tokens[1:]) >= 149


@pytest.mark.parametrize("positions", [8, 32])
def test_a_model_that_reads_few_positions(positions: int) -> None:
    transformer = TruncatedTransformer.from_model(small(positions), depth=1)
    measurements = Measurements.measure(transformer)
    ids = torch.randint(300, (2, 8), generator=torch.Generator().manual_seed(0))
    found = recover_prompts(POLICY, measurements, Targets(transformer.features_of(ids), [8, 8]))
    assert [prompt.ids for prompt in found] == ids.tolist()
    assert all(prompt.verified for prompt in found)


def test_features_that_overflow_spoil_no_other_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    model = small()
    with torch.no_grad():
        model.transformer.wte.weight[7, 3] = 6e4
        model.transformer.h[0].mlp.c_proj.bias[3] = 3e4
    half = model.to(torch.float16)
    transformer = TruncatedTransformer.from_model(half, depth=2)
    ids = torch.tensor([[5, 9, 8], [7, 9, 8], [5, 7, 8]])
    target = transformer.features_of(ids)
    assert not target[1:].isfinite().all()
    language_model = LanguageModel(half, transformer.caches)
    measurements = Measurements.measure(transformer, language_model, Storage("float16"))
    found = recover_prompts(TokenRecovery(candidates=64), measurements, Targets(target, [3, 3, 3]))
    assert [prompt.finite for prompt in found] == [True, *target[1:].isfinite().all(-1).all(-1)]
    assert found[0].ids == [5, 9, 8]
    assert not any(prompt.verified for prompt in found if not prompt.finite)
