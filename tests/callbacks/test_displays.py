"""What a run shows while it goes on: readable tokens, early iterations, lines that are news."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_inversion.__main__ import main as run
from lightning_inversion.callbacks import recovery_display
from lightning_inversion.callbacks.recovery_display import RecoveryDisplay
from lightning_inversion.callbacks.shown_tokens import shown_tokens
from tests.tiny import tiny_tokenizer

TEXT = "The café 🙂 emoji"


def test_tokens_are_shown_as_whole_characters() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(f"{TEXT}\nsky")["input_ids"]
    shown = shown_tokens(tokenizer, ids)
    assert len(shown) == len(ids)
    assert "".join(shown) == f"{TEXT}\\nsky"
    assert shown_tokens(None, [7, 8]) == ["[7]", "[8]"]


def test_a_short_fit_is_shown_at_several_iterations(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        f"--model.transformer.model={tiny_folder}",
        "--model.transformer.depth=1",
        f'--data.prompts=["{TEXT}"]',
        "--data.tokens_per_batch=100",
        "--model.iterations=200",
        "--token_by_token.candidates=1",
        "--token_by_token.most=1",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.accelerator=cpu",
    ]
    assert run(["fit", *options]) == 0
    events = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0"))
    events.Reload()
    for kind, key in (
        (events.Scalars, "tokens/verified"),
        (events.Images, "tokens/distance_to_nearest"),
        (events.Tensors, "tokens/top_k/text_summary"),
    ):
        assert len(kind(key)) > 1
    *_, last = (event.tensor_proto for event in events.Tensors("tokens/top_k/text_summary"))
    said = [line for line in capsys.readouterr().err.splitlines() if "iteration" in line]
    assert said[0].startswith("iteration 1: distance ")
    assert " at its start, then token accuracy " in said[0]
    assert "verified 1.000" in said[-1]
    assert TEXT in said[-1]
    assert TEXT in last.string_val[0].decode()


def test_only_what_is_news_is_said_and_not_too_often(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(recovery_display, "time", SimpleNamespace(monotonic=lambda: clock.now))
    display = RecoveryDisplay()
    for clock.now, line in (
        (1.0, "1 of 9 tokens"),
        (6.0, "2 of 9 tokens"),
        (8.0, "3 of 9 tokens"),
        (20.0, "2 of 9 tokens"),
        (21.0, "4 of 9 tokens"),
    ):
        display._say(line)
    assert capsys.readouterr().err.splitlines() == ["2 of 9 tokens", "4 of 9 tokens"]
