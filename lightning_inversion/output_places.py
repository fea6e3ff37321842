"""Where files go: whether they can be written, before the work, and why they could not, after."""

import errno
import os
import tempfile
from pathlib import Path

from lightning_inversion.errors import InputError

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
