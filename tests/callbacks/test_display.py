"""What ``predict`` shows while it runs: readable tokens, lines with news."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lightning_inversion.callbacks import display
from lightning_inversion.callbacks.display import RecoveryDisplay
from lightning_inversion.data.batch import PromptBatch
from lightning_inversion.errors import InputError
from lightning_inversion.recovery.policy import RecoveredPrompt
from lightning_inversion.transformer.tokens import shown_tokens
from tests.tiny import tiny_tokenizer

TEXT = "The café 🙂 emoji"


def test_tokens_are_shown_as_whole_characters() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(f"{TEXT}\nsky")["input_ids"]
    shown = shown_tokens(tokenizer, ids)
    assert len(shown) == len(ids)
    assert "".join(shown) == f"{TEXT}\\nsky"
    assert shown_tokens(None, [7, 8]) == ["[7]", "[8]"]


def test_a_line_is_printed_with_news_and_not_too_often(
    monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(display, "time", SimpleNamespace(monotonic=lambda: clock.now))
    shown = RecoveryDisplay()
    batch = PromptBatch.collate([(0, "a", [1] * 5), (1, "b", [2] * 4)])
    trainer = SimpleNamespace(is_global_zero=True)
    shown.on_predict_batch_start(trainer, None, batch, 0)
    for clock.now, done in ((1.0, 1), (6.0, 2), (8.0, 3), (20.0, 2), (21.0, 4)):
        shown._show_round(trainer, None, [RecoveredPrompt(known=(1,) * done), RecoveredPrompt()])
    assert messages == ["2 of 9 tokens", "4 of 9 tokens"]
    assert shown._bar.tasks[0].completed == 4


def test_verified_tokens_are_told_from_others() -> None:
    shown = RecoveryDisplay(prompts=1)
    shown._batch = PromptBatch.collate([(4, "a", [1, 2]), (9, "b", [3])])
    prompts = [RecoveredPrompt(known=(7, 8)), RecoveredPrompt(known=(9,))]
    table = shown._table(None, prompts)
    assert table.row_count == 1
    assert list(table.columns[0].cells) == ["5"]
    (text,) = table.columns[1].cells
    assert text.plain == "[7][8]"
    assert {str(span.style) for span in text.spans} == {"green"}


def test_a_display_shows_a_prompt_at_least() -> None:
    with pytest.raises(InputError, match=r"display\.prompts must be at least 1"):
        RecoveryDisplay(prompts=0)
