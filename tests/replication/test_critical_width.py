"""Bisection of the number of features."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_inversion.replication import critical_width

RECOMMENDED = Path(__file__).parents[2] / "configs" / "original" / "recommended.yaml"


@pytest.mark.parametrize("critical", [1, 5, 64])
def test_bisection(critical: int) -> None:
    tried: list[int] = []

    def recovers(width: int) -> bool:
        tried.append(width)
        return width >= critical

    assert critical_width.bisect_width(recovers, 64) == critical
    assert len(tried) <= 7


def test_no_width_recovers() -> None:
    assert critical_width.bisect_width(lambda width: False, 64) is None


@pytest.mark.integration  # a whole run
def test_the_command(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def try_the_widest(recovers: Callable[[int], bool], widest: int) -> int | None:
        return widest if recovers(widest) else None

    monkeypatch.setattr(critical_width, "bisect_width", try_the_widest)
    options = [
        f"--config={RECOMMENDED}", "--prompt=A", f"--model.transformer.model={tiny_folder}",
        "--data.tokens_per_batch=100", "--model.iterations=30",
    ]  # fmt: skip
    assert critical_width.main(options) == 0
    assert capsys.readouterr().out == "[0:32] recovers\ncritical width 32 of 32\n"


def test_a_wrong_option_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert critical_width.main([f"--config={RECOMMENDED}", "--model.iterations=none"]) == 2
    assert "--model.iterations" in capsys.readouterr().err
