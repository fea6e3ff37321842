"""Whether two runs have the same settings."""

from __future__ import annotations

from lightning_inversion.cli.resume import differences


def test_configs_differ_by_key() -> None:
    ours = {"model": {"transformer": {"depth": 1}, "iterations": 5}, "ckpt_path": None}
    theirs = {"model": {"transformer": {"depth": 2}, "iterations": 5}, "ckpt_path": "last"}
    assert differences(ours, theirs) == ["model.transformer.depth"]
    assert differences(ours, ours) == []
