"""Short texts from the state of their last position: found, verified, or left unresolved."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_inversion import read_certificates, recover, verify
from lightning_inversion.__main__ import main as run
from lightning_inversion.errors import InputError
from lightning_inversion.recovery.last_position import LastPosition
from lightning_inversion.recovery.policy import Targets, recover_prompts
from lightning_inversion.recovery.text_search import TextSearch
from lightning_inversion.verification.certificate import Certificate
from lightning_inversion.verification.measurements import Measurements
from tests.tiny import shared_tiny_model

TEXTS = [[11, 42], [223, 116, 129], [7, 150, 150]]


def last_row(ids: list[int], depth: int = 1) -> Tensor:
    model = shared_tiny_model("llama")
    return (
        model(torch.tensor([ids]), output_hidden_states=True).hidden_states[depth][0, -1:].detach()
    )


@pytest.mark.parametrize("ids", [[11], *TEXTS])
def test_a_text_is_found_and_verified(ids: list[int]) -> None:
    model = shared_tiny_model("llama")
    policy = LastPosition(len(ids), budget=4096)
    (found,) = recover(model, None, last_row(ids), depth=1, policy=policy)
    assert found.ids == ids
    assert found.verified
    for token in found.tokens:
        assert token.residual <= token.threshold
        assert token.rival_residual is not None
        assert token.rival_residual >= 1.5 * token.residual
        assert token.compared > 7
    stored = Certificate.from_json(found.certificate.to_json())
    assert stored.rows == "last"
    assert verify(stored, model, last_row(ids)).holds
    assert not verify(stored, model, last_row([*ids[:-1], 60])).holds
    if len(ids) > 1:
        assert not verify(stored, model, last_row([60, *ids[1:]])).holds


def test_the_number_of_tokens_is_tried_or_that_of_the_rows(measurements: Measurements) -> None:
    model, ids = shared_tiny_model("llama"), [11, 42]
    (found,) = recover(model, None, last_row(ids), depth=1, policy=LastPosition(budget=2048))
    assert found.ids == ids
    rows = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1].detach()
    (found,) = recover(model, None, rows, depth=1, policy=LastPosition())
    assert found.ids == ids


def test_behind_known_tokens(other_measurements: Measurements) -> None:
    measurements, ids = other_measurements, torch.tensor([[5, 6, 90]])
    rows = measurements.transformer.features_of(ids)
    policy = LastPosition(budget=512)
    (found,) = recover_prompts(
        policy, measurements, Targets(rows, [3], (int(ids[0, 0]), int(ids[0, 1])))
    )
    assert found.ids == ids[0].tolist()
    assert found.verified
    search = TextSearch(measurements, rows[0, -1], 2, ids[0, :1], 4096)
    search.find()
    assert search.best.tolist() == [6, 90]


def test_a_row_of_no_text_is_unresolved_with_the_best_texts() -> None:
    row = last_row([11, 42, 7]) + torch.randn(32, generator=torch.Generator().manual_seed(1))
    model = shared_tiny_model("llama")
    (found,) = recover(model, None, row, depth=1, policy=LastPosition(3, budget=600))
    assert [token.state for token in found.tokens] == ["unresolved"] * 3
    assert all(len(token.alternatives) > 1 for token in found.tokens)
    assert found.tokens[0].compared <= 600
    assert not found.verified


def test_duplicates_are_a_group(measurements: Measurements) -> None:
    """Nothing tells a token from another with the same embedding."""
    model = shared_tiny_model("llama")
    weight = model.get_input_embeddings().weight
    stored = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[200] = weight[11]
        policy = LastPosition(2, budget=4096)
        (found,) = recover(model, None, last_row([11, 42]), depth=1, policy=policy)
    finally:
        with torch.no_grad():
            weight.copy_(stored)
    assert not found.verified
    assert found.tokens[0].state == "group"
    assert {11, 200} <= set(found.tokens[0].alternatives)


def test_settings_and_models_that_do_not_fit(measurements: Measurements) -> None:
    with pytest.raises(InputError, match="must be at least 1, and are 0, 4 and 5"):
        LastPosition(0, 4, 5)
    loose = replace(measurements, language_model=None, text=None)
    (found,) = recover_prompts(
        LastPosition(2, budget=256),
        loose,
        Targets(measurements.transformer.features_of(torch.ones(1, 2).long()), [2]),
    )
    assert len(found.tokens) == 2


def test_a_file_of_the_last_row(tiny_folder: Path, tmp_path: Path) -> None:
    ids = torch.tensor([TEXTS[0]])
    states = AutoModelForCausalLM.from_pretrained(tiny_folder)(ids, output_hidden_states=True)
    save_file({"hidden": states.hidden_states[1][0, -1:].detach()}, tmp_path / "x.safetensors")
    words = [
        "predict", f"--model.transformer.model={tiny_folder}", "--model.transformer.depth=1",
        f"--data.targets={tmp_path / 'x.safetensors'}", "--model.recovery=LastPosition",
        "--model.recovery.tokens=2", f"--trainer.default_root_dir={tmp_path}",
        "--trainer.accelerator=cpu",
    ]  # fmt: skip
    assert run(words) == 0
    (file,) = tmp_path.rglob("results.jsonl")
    row = json.loads(file.read_text())
    assert row["recovered_ids"] == ids[0].tolist()
    assert row["verified"]
    (certificate,) = read_certificates(file.parent).values()
    assert certificate.rows == "last"
