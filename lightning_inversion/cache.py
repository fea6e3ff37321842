"""The cache folder: converted models, and what was measured of models, within a limit of size.

Models lie in folders of their own and stay until they are cleared. What was measured is one file
each under ``measured/``; where they come to more than the limit, the ones unused for longest go.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock

from lightning_inversion.errors import InputError
from lightning_inversion.untrusted import check_regular, read_json

_log = logging.getLogger(__name__)

ENVIRONMENT = "LIGHTNING_INVERSION_CACHE"
LIMIT_ENVIRONMENT = "LIGHTNING_INVERSION_CACHE_GB"
LIMIT_GB = 4.0
"""Size of all that was measured, where `LIGHTNING_INVERSION_CACHE_GB` names no other."""
SUFFIX = ".safetensors"
_LONGEST_HEADER = 1 << 24


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
    path and renamed to it, so that a killed build leaves nothing that looks finished.
    """
    root = cache_root()
    folder = root / key
    if is_whole(folder):
        return folder
    with FileLock(root / f"{key}.lock"):
        if is_whole(folder):  # another process built it while this one waited
            return folder
        if os.path.lexists(folder):
            _log.warning("%s in the cache is damaged and is made again", folder)
            if folder.is_symlink() or not folder.is_dir():
                folder.unlink()
            else:
                shutil.rmtree(folder)
        with tempfile.TemporaryDirectory(dir=root, prefix=f"{key}.part-") as part:
            built = Path(part) / "built"
            built.mkdir()
            build(built)
            built.rename(folder)
    return folder


# -- what was measured -----------------------------------------------------------------------


def measured_folder() -> Path:
    """The folder of the files of what was measured."""
    folder = cache_root() / "measured"
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def measuring_alone(path: Path) -> Iterator[bool]:
    """The other processes wait while one measures what `path` is to hold.

    Yields:
        Whether the file can be written. A cache that cannot be is no reason to end a run.
    """
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # a folder of somebody else, no locks there
        _log.warning("%s cannot be used as a cache (%s); nothing is kept.", path.parent, error)
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def put(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make the file at `path`: whole or not at all. Makes room for it.

    A full disk leaves the run as it is, and nothing is kept.
    """
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        write(part)
        part.replace(path)
        make_room(path)
    except OSError as error:
        _log.warning("%s cannot be kept (%s).", path, error)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def touch(path: Path) -> None:
    """Note that a file was used now."""
    with suppress(OSError):  # of another user
        os.utime(path)


def limit() -> int:
    """Bytes that all that was measured may take.

    Raises:
        InputError: `LIGHTNING_INVERSION_CACHE_GB` is no number.
    """
    named = os.environ.get(LIMIT_ENVIRONMENT)
    try:
        gigabytes = float(named) if named else LIMIT_GB
        if not 0 <= gigabytes < float("inf"):
            raise ValueError
    except ValueError as error:
        raise InputError(
            f"{LIMIT_ENVIRONMENT} must be a number of gigabytes, 0 or more, and is {named!r}."
        ) from error
    return int(gigabytes * 1e9)


def make_room(newest: Path | None = None) -> None:
    """Remove the measured files that were unused for longest, until the rest is within the limit.

    Args:
        newest: a file that stays, even where it is larger than the limit by itself.
    """
    files = sorted(measured_files(), key=lambda entry: entry.used)
    size, most = sum(entry.size for entry in files), limit()
    for entry in files:
        if size <= most:
            return
        if entry.path != newest:
            remove(entry.path)
            size -= entry.size


@dataclass(frozen=True)
class Entry:
    """A file or folder of the cache.

    Attributes:
        path: where it lies.
        size: in bytes.
        used: when it was last used, in seconds since 1970.
    """

    path: Path
    size: int
    used: float

    @classmethod
    def of(cls, path: Path) -> Entry:
        """The entry of a path; of size 0 where it is gone."""
        try:
            files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
            sizes = [one.stat() for one in files]
            used = max((one.st_mtime for one in sizes), default=path.stat().st_mtime)
        except OSError:  # another process removed it
            return cls(path, 0, 0.0)
        return cls(path, sum(one.st_size for one in sizes), used)

    def about(self) -> dict[str, Any]:
        """What a measured file says of itself; empty where it is damaged."""
        try:
            check_regular(self.path)
            with self.path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = read_json(file.read(min(length, _LONGEST_HEADER)))
            about = read_json(header["__metadata__"]["about"])
        except (OSError, ValueError, LookupError, TypeError, struct.error):
            return {}
        return about if isinstance(about, dict) else {}


def measured_files() -> list[Entry]:
    """All that was measured."""
    return [Entry.of(path) for path in sorted(measured_folder().glob(f"*{SUFFIX}"))]


def models() -> list[Entry]:
    """The folders beside: converted models."""
    folders = (path for path in sorted(cache_root().iterdir()) if path.is_dir())
    return [Entry.of(path) for path in folders if path.name != measured_folder().name]


def remove(path: Path) -> None:
    """Remove a file or folder of the cache, and its lock; another process may have been faster."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    for gone in (path, path.with_name(f"{path.name}.lock")):
        with suppress(OSError):
            gone.unlink(missing_ok=True)


def in_words(kind: str) -> str:
    """The name of a class as plain words: ``linear probe`` for ``LinearProbe``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", kind.lstrip("_")).lower()


def described(about: dict[str, Any]) -> str:
    """What a measured file is of, in a few words."""
    parts = [str(about.get("model", "?"))]
    if "layers" in about:
        parts.append("depth " + ",".join(map(str, about["layers"])))
    if about.get("features"):
        parts.append(f"features {about['features']}")
    parts += [name.replace("_", " ") for name in ("final_norm", "centred") if about.get(name)]
    if about.get("channel"):
        parts.append(str(about["channel"]))
    return ", ".join(parts)


def as_json(value: Any) -> str:
    """JSON with sorted keys; what JSON has no form for is written as text."""
    return json.dumps(value, sort_keys=True, default=str)
