"""Files and folders: writable places, claims, the cache, and text that is safe to show."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from lightning_inversion.errors import InputError


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process has the claim; it ends with the block, or with the process.

    Args:
        path: of a file that stands for the work and holds nothing; its folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    with suppress(Timeout):
        lock.acquire(timeout=0)
    try:
        yield lock.is_locked
    finally:
        lock.release()


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""No room is left."""


def check_writable(path: Path, option: str, folder: bool = False) -> None:
    """Refuse a place where nothing can be written, and leave nothing there.

    Args:
        path: the file or folder to be; folders on the way to it need not exist.
        option: that names it, for the message.
        folder: whether it is to be a folder.

    Raises:
        InputError: it cannot be made there.
    """
    where = f"{option} {str(path)!r}"
    place = path.absolute()
    try:
        while not place.exists():
            place = place.parent
        if place.is_dir():
            with tempfile.TemporaryFile(dir=place):  # permissions alone do not tell, in /proc say
                return
        writable = os.access(place, os.W_OK)
    except OSError as error:
        raise InputError(
            f"{where} cannot be written ({error.strerror}); give another place."
        ) from error
    if folder or place != path.absolute():
        raise InputError(f"{where} cannot be a place for files: {place} is a file; give a folder.")
    if not writable:
        raise InputError(f"{where} may not be written; give another place.")


def ended_by(error: OSError) -> str | None:
    """One sentence on what could not be read or written; None where no file is to blame."""
    if error.errno in FULL:
        return f"nothing more can be written ({error.strerror}); make room and go on."
    if error.filename is not None:
        return f"{str(error.filename)!r} failed: {error.strerror}; the run has ended."
    return None


def readable_time(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.5 h``; never none at all."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def visible(text: str) -> str:
    """`text` with a mark for each character that has no shape or would rearrange the rest.

    A line break is marked and kept; joiners and variation selectors, which belong to an emoji or a
    script, stay.
    """
    return "".join(_visible(character) for character in text)


def one_line(text: str) -> str:
    """As `visible`, in one line, spaces marked too: for tables and lists of tokens."""
    return visible(text).replace("\n", "").replace(" ", "·")


def _visible(character: str) -> str:
    if character == "\n":
        return "↵\n"
    if character == "\t":
        return "⇥\t"
    if character in "\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}":
        return character
    if ord(character) < 32:
        return chr(0x2400 + ord(character))
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and not (
        0xE0020 <= ord(character) <= 0xE007F  # the tags of flags
    ):
        return f"⟨U+{ord(character):04X}⟩"
    return character


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
