"""The main job on the real trained model, through the real entry point."""

import json
import operator
from pathlib import Path

import pytest

from lightning_inversion.__main__ import main as run

pytestmark = pytest.mark.integration
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
PROMPT = "My key is sk-9fQ2xLz7 and my IBAN is DE89 3704 0044 0532 0130 00."


def rows_of(root: Path) -> list[dict]:
    path = root / "lightning_logs" / "version_0" / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_quickstart_recovers_and_verifies_every_token(tmp_path: Path, capsys) -> None:
    assert run(["fit", f"--config={QUICKSTART}", f"--trainer.default_root_dir={tmp_path}"]) == 0
    (row,) = rows_of(tmp_path)
    assert row["recovered"] == PROMPT
    assert row["iterations"] > 0  # the initial guess is wrong, and the method is seen to work
    assert row["exact"]
    assert row["verified"]
    assert row["unresolved"] == []
    assert all(map(operator.le, row["token_residuals"], row["thresholds"]))
    assert "My key is sk-9fQ2xLz7" in capsys.readouterr().out


def test_gradient_steps_find_what_the_linear_guess_does_not(tmp_path: Path) -> None:
    arguments = [
        "fit",
        '--data.prompts=["The wipers on the bus go swish swish", "Call me Ishmael."]',
        "--model.transformer.depth=8",
        "--model.schedule.candidates=1",  # so that what comes first must be right
        "--model.schedule.max_candidates=1",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    assert run(arguments) == 0
    rows = rows_of(tmp_path)
    assert all(row["exact"] and row["verified"] for row in rows)
    assert max(row["iterations"] for row in rows) > 0


def test_the_sources_recipe_meets_its_criterion_without_reading_the_text(tmp_path: Path) -> None:
    config = QUICKSTART.with_name("original") / "original.yaml"
    arguments = [
        "fit",
        f"--config={config}",
        '--data.prompts=["The sky is blue."]',
        "--model.iterations=60",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    assert run(arguments) == 0
    (row,) = rows_of(tmp_path)
    assert row["token_accuracy"] < 1
    assert not row["verified"]
    assert row["distance_ratio"] is not None
