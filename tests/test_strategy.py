"""What processes exchange, with a dictionary in the place of the store; where the store listens."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from lightning_inversion.strategy import IndependentPrompts


class Dictionary(dict[str, bytes]):
    """The part of a torch store that a broadcast uses."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def get(self, key: str) -> bytes:  # type: ignore[override]
        return self[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


def process(rank: int, store: Dictionary, monkeypatch: pytest.MonkeyPatch) -> IndependentPrompts:
    strategy = IndependentPrompts()
    strategy._store = store  # type: ignore[assignment]
    monkeypatch.setattr(strategy, "check_processes", lambda: None)
    monkeypatch.setattr(type(strategy), "global_rank", property(lambda self: self.rank))
    strategy.rank = rank  # type: ignore[attr-defined]
    return strategy


@pytest.mark.parametrize("value", [None, True, 3, "lightning_logs/version_0", ["a", "b"]])
def test_a_broadcast_arrives(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Dictionary()
    first, second = process(0, store, monkeypatch), process(1, store, monkeypatch)
    assert first.broadcast(value) == value
    assert second.broadcast("its own") == value


def test_a_pickle_in_the_store_is_not_executed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("executed",)

    store = Dictionary({"broadcast/1": pickle.dumps(Bomb()).hex().encode()})
    with pytest.raises(json.JSONDecodeError):
        process(1, store, monkeypatch).broadcast(None)
    assert "executed" not in capsys.readouterr().out


def test_the_store_listens_on_this_machine_alone() -> None:
    environment = LightningEnvironment()
    strategy = IndependentPrompts()
    store = strategy._connect(environment)
    assert store.add("batch", 1) == 1
    listening = [
        line.split()[1]
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(table).read_text().splitlines()[1:]
        if line.split()[1].endswith(f":{environment.main_port:04X}") and line.split()[3] == "0A"
    ]
    assert listening == [f"0100007F:{environment.main_port:04X}"]
