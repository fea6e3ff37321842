"""Runs that have not ended: their settings name more prompts than they have rows."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from lightning_inversion.results import FILE, FITTED, PREDICTED
from lightning_inversion.untrusted import read_file, read_yaml


def settings_of(path: Path) -> dict[str, Any]:
    """The settings beside a run's rows; {} where none can be read. Not to be changed."""
    try:
        return _parsed(read_file(path))
    except (OSError, ValueError):
        return {}


@cache
def _parsed(text: bytes) -> dict[str, Any]:
    config = read_yaml(text)
    return config if isinstance(config, dict) else {}


def unfinished_runs(paths: Iterable[Path], found: dict[Path, int]) -> list[tuple[Path, str]]:
    """The folder of each run that has not ended, and how far it is.

    Args:
        paths: of folders of runs and of result files.
        found: how many rows each result file has, those of prompts that could not be run too.
    """
    folders = {path.parent: rows for path, rows in found.items() if path.name == FILE}
    for path in paths:
        if path.is_dir():
            for name in (FITTED, PREDICTED):
                for settings in sorted(path.rglob(name)):
                    folders.setdefault(settings.parent, 0)
    unfinished = []
    for folder, rows in folders.items():
        config = settings_of(folder / FITTED) or settings_of(folder / PREDICTED)
        if not isinstance(config.get("data"), dict) or "model" not in config:
            continue  # the settings of something else
        prompts = _prompts_of(config["data"])
        if rows < (prompts or 1):
            unfinished.append((folder, f"{rows} of {prompts or 'its'} prompts"))
    return unfinished


def _prompts_of(data: dict[str, Any]) -> int | None:
    """How many rows a run is to have; None where its settings do not say so."""
    prompts, file, repeat = data.get("prompts"), data.get("file"), data.get("repeat", 1)
    count = len(prompts) if isinstance(prompts, list) else _lines(Path(str(file))) if file else None
    return count * repeat if count is not None and isinstance(repeat, int) else None


def _lines(path: Path) -> int | None:
    """The lines of a file of prompts; None where it has moved."""
    try:
        return len(read_file(path).rstrip(b"\r\n").split(b"\n"))
    except (OSError, ValueError):
        return None
