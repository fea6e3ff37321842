"""Where converted models are kept, and how a folder appears there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs
from filelock import FileLock

ENVIRONMENT = "LIGHTNING_INVERSION_CACHE"


def cache_root() -> Path:
    """The user's cache folder, or the one that `LIGHTNING_INVERSION_CACHE` names."""
    named = os.environ.get(ENVIRONMENT)
    root = (
        Path(named).expanduser() if named else platformdirs.user_cache_path("lightning_inversion")
    )
    root.mkdir(parents=True, exist_ok=True)
    return root


def cached_folder(
    key: str, build: Callable[[Path], None], is_whole: Callable[[Path], bool]
) -> Path:
    """The cached folder `key`, made by `build(folder)` unless it lies there whole.

    A file lock makes the other processes wait while one builds. The folder is built beside its
    place and renamed into it, so that a killed build leaves nothing that looks finished.
    """
    root = cache_root()
    folder = root / key
    if is_whole(folder):
        return folder
    with FileLock(root / f"{key}.lock"):
        if is_whole(folder):  # another process built it while this one waited
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=f"{key}.part-") as part:
            built = Path(part) / "built"
            built.mkdir()
            build(built)
            built.rename(folder)
    return folder
