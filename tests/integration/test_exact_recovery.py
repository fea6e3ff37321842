"""Exact recovery on the real model: the prompt comes back, and nothing wrong is ever verified."""

from __future__ import annotations

import pytest
import torch

from lightning_inversion.recovery.policy import Targets, recover_prompts
from lightning_inversion.recovery.token_recovery import TokenRecovery
from lightning_inversion.transformer.language_model import LanguageModel
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.prefix import FixedPrefix
from lightning_inversion.transformer.truncated import TruncatedTransformer
from lightning_inversion.verification.measurements import Measurements

pytestmark = pytest.mark.integration

TEXT = "The patient in room 12, Mrs. Okafor, is allergic to penicillin."


def test_a_sentence_comes_back_token_by_token_from_two_blocks() -> None:
    transformer, whole = TransformerSpec(depth=2).load_with_head()
    assert transformer.tokenizer is not None
    ids = transformer.tokenizer(TEXT, return_tensors="pt").input_ids
    measurements = Measurements.measure(transformer, LanguageModel(whole, transformer.caches))
    target = transformer.features_of(ids)
    (prompt,) = recover_prompts(TokenRecovery(), measurements, Targets(target, [ids.shape[1]]))
    assert prompt.ids == ids[0].tolist()
    assert prompt.verified
    assert sum(token.compared for token in prompt.tokens) < 64 * len(prompt.tokens)


def test_of_a_hundred_thousand_wrong_candidates_none_is_verified(
    smollm2: TruncatedTransformer,
) -> None:
    assert smollm2.tokenizer is not None
    ids = smollm2.tokenizer(TEXT, return_tensors="pt").input_ids
    measurements = Measurements.measure(smollm2)
    calibration, embedding = measurements.calibration, smollm2.embedding
    target = smollm2.features_of(ids)
    everything = torch.arange(embedding.vocabulary_size)
    offered = 0
    for position in (0, 3, 9):
        prefix = FixedPrefix(smollm2, 1)
        prefix.begin(torch.tensor([0]), embedding(ids), torch.tensor([position]))
        right = int(ids[0, position])
        wrong = everything[embedding.first_duplicate != embedding.first_duplicate[right]]
        for part in [torch.tensor([right]), *torch.split(wrong, 512)]:
            features = prefix.candidates(torch.tensor([0]), embedding(part[None]))[0]
            positions = torch.full((len(part),), position)
            residuals = calibration.residual(features, target[0, position], positions)
            accepted = calibration.passes(residuals, positions)
            assert accepted.tolist() == [int(token) == right for token in part]
        offered += len(wrong)
    assert offered > 100_000
