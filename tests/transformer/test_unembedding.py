"""Logits determine the states after the final norm, and those the text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_inversion import recover
from lightning_inversion.__main__ import main as run
from lightning_inversion.errors import InputError
from lightning_inversion.recovery.last_position import LastPosition
from lightning_inversion.transformer.unembedding import Unembedding
from tests.tiny import BLOCKS, CONFIGS, shared_tiny_model

IDS = torch.tensor([[11, 42, 7, 8, 9]])


@torch.no_grad()
def output(family: str) -> tuple[Tensor, Tensor]:
    """Logits and last states of a text."""
    found = shared_tiny_model(family)(IDS, output_hidden_states=True)
    return found.logits, found.hidden_states[-1]


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("kind", ["logits", "log-probabilities"])
def test_states_are_solved(family: str, kind: str) -> None:
    logits, states = output(family)
    head = Unembedding.of(shared_tiny_model(family))
    if kind == "log-probabilities":
        if head.cap is not None:
            pytest.skip("softly capped logits cannot be had from log-probabilities")
        logits = logits.log_softmax(-1)
    assert torch.allclose(head.states(logits), states, atol=2e-3 * float(states.std()))


def test_logits_of_another_model_are_refused() -> None:
    head = Unembedding.of(shared_tiny_model("llama"))
    with pytest.raises(InputError, match="of no state of this model"):
        head.states(output("gpt2")[0])


def test_python_recovers_from_logits() -> None:
    model = shared_tiny_model("llama")
    logits, _ = output("llama")
    for given in (logits, logits[0].log_softmax(-1), model(IDS), {"logits": logits}):
        (found,) = recover(model, None, given, depth=BLOCKS, final_norm=True, logits=True)
        assert found.ids == IDS[0].tolist()
        assert found.verified
    (one,) = recover(
        model, None, model(IDS[:, :1]).logits, depth=BLOCKS, final_norm=True, logits=True,
        policy=LastPosition(),
    )  # fmt: skip
    assert one.ids == [11]
    with pytest.raises(InputError, match="set depth 4 final_norm true"):
        recover(model, None, logits, depth=2, logits=True)
    with pytest.raises(InputError, match="for logits set logits true"):
        recover(model, None, logits, depth=BLOCKS, final_norm=True)


@pytest.mark.usefixtures("shared_parsers")
def test_a_file_of_logits(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(AutoModelForCausalLM.from_pretrained(tiny_folder)(IDS).logits, tmp_path / "x.pt")
    words = [
        f"--model.transformer.model={tiny_folder}", f"--model.transformer.depth={BLOCKS}",
        "--model.transformer.final_norm=true", f"--data.targets={tmp_path / 'x.pt'}",
        "--data.logits=true", f"--trainer.default_root_dir={tmp_path}",
        "--trainer.accelerator=cpu",
    ]  # fmt: skip
    assert run(["predict", *words]) == 0
    (file,) = tmp_path.rglob("results.jsonl")
    row = json.loads(file.read_text())
    assert row["recovered_ids"] == IDS[0].tolist()
    assert row["verified"]
    assert run(["fit", *words]) == 2
    assert "--data.logits is for predict" in capsys.readouterr().err
