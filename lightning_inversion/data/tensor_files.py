"""Files of tensors, as other tools write them: safetensors, NumPy's, PyTorch's, JSON, and folders.

The kind is read from the first bytes, whatever the file is called. Nothing is ever unpickled:
PyTorch's files load with ``weights_only=True``, NumPy's with ``allow_pickle=False``.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from lightning_inversion.data.names import natural, tells_depth
from lightning_inversion.errors import InputError
from lightning_inversion.untrusted import check_regular, read_file, read_json

_NUMPY, _ZIP, _PICKLE = b"\x93NUMPY", b"PK\x03\x04", b"\x80"
_SUFFIXES = (".safetensors", ".npy", ".npz", ".pt", ".pth", ".bin")
_OTHERS = {
    b"\x89HDF": "an HDF5 file", b"PAR1": "a Parquet file", b"ARROW1": "an Arrow file",
    b"\x1f\x8b": "packed by gzip", b"GGUF": "a model's file", b"\xfd7zXZ": "packed by xz",
    b"\x28\xb5\x2f\xfd": "packed by zstd", b"BZh": "packed by bzip2", b"MATLAB": "a MATLAB file",
}  # fmt: skip
"""How files begin that are not read."""
_ZARR = (".zarray", ".zgroup", "zarr.json")
_DAMAGED = (
    *(ValueError, EOFError, MemoryError, KeyError, NotImplementedError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error),
)
"""What NumPy and zipfile raise for wrong bytes, a compression or encryption they do not know."""
KINDS = "a .safetensors, .npy, .npz, .pt or .json file of tensors"


def read_tensors(path: Path, where: str) -> tuple[Any, dict[str, str]]:
    """What a file holds, a tensor or tensors in dicts and lists; the metadata of safetensors.

    A folder is what SIPIT writes (``manifest.json`` and ``tensors/prompt.pt``, read as one dict),
    or files of one tensor or of one layer each, read as a dict of their names, or of one prompt or
    more each, read as a list in the order of their names.

    Args:
        path: of the file or folder.
        where: names it in messages.

    Raises:
        InputError: it cannot be read as tensors.
    """
    if path.is_dir():
        return _read_folder(path, where), {}
    try:
        check_regular(path)
        with path.open("rb") as file:
            begins = file.read(6)
        if begins == _NUMPY:
            return np.load(path, allow_pickle=False, mmap_mode="r"), {}
        if begins.startswith(_ZIP):
            return _read_zip(path, where), {}
        if begins.startswith(_PICKLE):
            return _read_torch(path, where), {}
        # The size of a safetensors header may be the code of a brace; zeros come after it.
        if begins.lstrip()[:1] in (b"[", b"{") and b"\0" not in begins:
            return _read_json(path, where), {}
        for magic, kind in _OTHERS.items():
            if begins.startswith(magic):
                raise InputError(f"{where} is {kind}; give {KINDS}.")
        if begins and begins.isascii() and " ".join(begins.decode().split()).isprintable():
            raise InputError(f"{where} is text; give {KINDS}.")
        with safe_open(path, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            return tensors, dict(stored.metadata() or {})
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error.strerror or error}.") from error
    except SafetensorError as error:
        raise InputError(f"{where} is damaged, or none of {KINDS}; write it again.") from error
    except InputError:
        raise
    except _DAMAGED as error:
        if "pickle" in str(error).lower() or "Python objects" in str(error):
            raise InputError(
                f"{where} holds Python objects, which are not loaded; save plain arrays of numbers."
            ) from error
        raise InputError(f"{where} is damaged; write it again.") from error


def _read_zip(path: Path, where: str) -> Any:
    """A .npz file, or a .pt file, which is a zip as well."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    needed = sum(entry.file_size for entry in entries)
    if needed > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise InputError(f"{where} unpacks to {needed} bytes, more than the memory; split it.")
    if any(entry.filename.endswith("data.pkl") for entry in entries):
        return _read_torch(path, where)
    if not any(entry.filename.endswith(".npy") for entry in entries):
        raise InputError(f"{where} is a zip without arrays; give {KINDS}.")
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _read_json(path: Path, where: str) -> Any:
    """Nested lists of numbers, alone or in objects, as servers answer; of JSON Lines a list."""
    text = read_file(path)
    try:
        return read_json(text)
    except ValueError:
        lines = text.splitlines()
    try:
        return [read_json(line) for line in lines if line.strip()]
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error}); write it again.") from error


def _read_torch(path: Path, where: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # on damaged bytes torch fails in many ways
        if "weights_only" in str(error) or "Weights only" in str(error):
            raise InputError(
                f"{where} holds more than tensors, and loading it could run code; save the tensors "
                "alone, in a tuple or a dict."
            ) from error
        raise InputError(f"{where} is damaged; write it again.") from error


def _read_folder(path: Path, where: str) -> Any:
    prompt = path / "tensors" / "prompt.pt"
    if prompt.is_file():
        manifest = path / "manifest.json"
        try:
            told = read_json(read_file(manifest)) if manifest.exists() else {}
        except (OSError, ValueError) as error:
            raise InputError(f"{where}: its manifest.json is not JSON; correct it.") from error
        held, _ = read_tensors(prompt, f"{where}, {str(prompt.relative_to(path))!r}")
        known = {key: told[key] for key in ("layer_idx",) if key in told}
        return {**known, **held} if isinstance(held, dict) else {**known, "hidden_states": held}
    files = [file for file in path.iterdir() if file.suffix in _SUFFIXES]
    files.sort(key=lambda file: natural(file.name))
    if any((path / name).exists() for name in _ZARR):
        raise InputError(f"{where} is a Zarr store; give {KINDS}.")
    if not files:
        raise InputError(f"{where} is a folder without files of tensors; give {KINDS}.")
    held = {file.name: read_tensors(file, f"{where}, {file.name!r}")[0] for file in files}
    stems = [file.stem for file in files]
    tell = all(map(tells_depth, stems))
    bare = all(isinstance(own, torch.Tensor | np.ndarray) for own in held.values())
    if len(set(stems)) == len(stems) and (tell or bare):
        return dict(zip(stems, held.values(), strict=True))
    dicts = all(isinstance(own, dict) for own in held.values())
    names = [name for own in held.values() for name in own] if dicts else []
    if names and len(set(names)) == len(names) and all(map(tells_depth, names)):
        return {name: own[name] for own in held.values() for name in own}  # some layers each
    return list(held.values())
