"""What only a CUDA device can show."""

import json
from pathlib import Path

import pytest
import torch

from lightning_inversion.__main__ import main as run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.integration,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.mark.parametrize("depth", [1, 8])
def test_a_fit_on_a_gpu_verifies_every_token(depth: int, tmp_path: Path) -> None:
    arguments = [
        "fit",
        f"--config={QUICKSTART}",
        f"--model.transformer.depth={depth}",
        "--trainer.accelerator=cuda",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    assert run(arguments) == 0
    path = tmp_path / "lightning_logs" / "version_0" / "results.jsonl"
    (row,) = map(json.loads, path.read_text().splitlines())
    assert row["exact"]
    assert row["verified"]
