"""The bar of what takes a while."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lightning_inversion import progress
from lightning_inversion.progress import counted


@pytest.mark.parametrize("is_terminal", [True, False])
def test_parts_are_counted_on_a_terminal_alone(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=is_terminal, width=80)
    monkeypatch.setattr(progress, "Console", lambda stderr: console)
    assert list(counted(range(3), "measuring")) == [0, 1, 2]
    assert ("measuring" in shown.getvalue()) is is_terminal
    assert ("3/3" in shown.getvalue()) is is_terminal
