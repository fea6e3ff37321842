"""Rows and metrics of a run, for the file and for Lightning's own tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_inversion.callbacks.result_writer import ResultWriter
from lightning_inversion.callbacks.stopping import StoppingCriterion
from lightning_inversion.errors import InputError
from lightning_inversion.inputs import EmbeddingInput, NormalInitializer
from lightning_inversion.objectives import L1
from lightning_inversion.results import names, read_rows
from lightning_inversion.transformer.truncated import TruncatedTransformer
from lightning_inversion.verification.measurements import Measurements
from tests.fits import PROMPTS, fit


def test_lightnings_own_tools_see_the_metrics(
    tiny_folder: Path, tiny_transformer: TruncatedTransformer, tmp_path: Path
) -> None:
    best = ModelCheckpoint(
        tmp_path / "best", monitor="final/token_accuracy", mode="max",
        save_on_train_epoch_end=True,
    )  # fmt: skip
    _, trainer = fit(
        tiny_folder, tiny_transformer, tmp_path, best, ResultWriter(),
        StoppingCriterion(stop=False),
        learnable=EmbeddingInput(NormalInitializer(0, 0.1)),
        trainer_options={"enable_checkpointing": True},
    )  # fmt: skip
    rows = read_rows(tmp_path / "results.jsonl")
    assert [row.prompt for row in rows] == PROMPTS
    accuracy = sum(row.token_accuracy or 0.0 for row in rows) / len(rows)
    seen = trainer.callback_metrics
    assert float(seen["final/token_accuracy"]) == pytest.approx(accuracy)
    assert float(seen["match/distance"]) > 0
    assert float(seen["match/distance_ratio"]) > 0
    assert best.best_model_score is not None
    assert float(best.best_model_score) == pytest.approx(accuracy)
    assert Path(best.best_model_path).exists()


def test_a_fit_without_certificates_measures_nothing(
    tiny_folder: Path,
    tiny_transformer: TruncatedTransformer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measured(*_: Any) -> Any:
        raise AssertionError("the model was measured")

    monkeypatch.setattr(Measurements, "measure", measured)
    writer = ResultWriter(verify=False)
    fit(
        tiny_folder, tiny_transformer, tmp_path, writer, StoppingCriterion(stop=False),
        learnable=EmbeddingInput(NormalInitializer(0.5, 0.05)), objective=L1(relative=False),
        iterations=3,
    )  # fmt: skip
    rows = read_rows(tmp_path / "results.jsonl")
    assert [row.prompt for row in rows] == PROMPTS
    for row in rows:
        assert row.error is None
        assert len(row.recovered_ids) == len(row.ids or ())
        assert not row.verified
        assert row.token_states == row.token_verified == row.unresolved == []
    writer.show()
    shown = capsys.readouterr().out
    assert "not compared" in shown
    assert f"of {len(PROMPTS)} prompts" in shown
    assert "verified 0" not in shown
    with pytest.raises(AssertionError, match="measured"):
        fit(
            tiny_folder, tiny_transformer, tmp_path / "other", ResultWriter(),
            learnable=EmbeddingInput(NormalInitializer(0.5, 0.05)), objective=L1(relative=False),
            iterations=3,
        )  # fmt: skip


def test_rows_of_one_run_have_the_same_settings(
    tiny_folder: Path, tiny_transformer: TruncatedTransformer, tmp_path: Path
) -> None:
    fit(
        tiny_folder, tiny_transformer, tmp_path, ResultWriter(), prompts=["bus", "", "sky"],
        data_options={"batch_size": 1}, iterations=2,
    )  # fmt: skip
    rows = read_rows(tmp_path / "results.jsonl")
    assert [row.error for row in rows] == [None, "is empty; give it a text.", None]
    assert rows[0].settings() == rows[1].settings() == rows[2].settings()
    settings = rows[0].settings()
    assert set(settings) == set(names("setting"))
    assert settings["schedule"] == "AllPositions"
    assert settings["iterations_limit"] == 2
    assert settings["model"] == str(tiny_folder)
    assert {row.seed for row in rows} == {0}


def test_a_row_keeps_a_token_at_least() -> None:
    with pytest.raises(InputError, match=r"--results\.top_k must be at least 1"):
        ResultWriter(top_k=0)
