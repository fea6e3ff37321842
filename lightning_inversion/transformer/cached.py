"""What is measured once of a model and kept: dataclasses of tensors and plain values, in files.

A file is found by content: what it was measured of, and the code that measures. It holds a hash of
everything in it, and is made again where that is wrong. Whether a value was measured now or kept
makes no difference, not in a bit.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_inversion.cache import (
    SUFFIX,
    as_json,
    limit,
    measured_folder,
    measuring_alone,
    put,
    touch,
)
from lightning_inversion.files import as_os_error
from lightning_inversion.untrusted import check_regular, read_json

_log = logging.getLogger(__name__)
T = TypeVar("T")
_MEASURE = (
    *("recovery/*.py", "proposers/*.py", "verification/*.py", "transformer/*.py"),
    "data/storage.py",
)
"""The parts of the package whose code decides what is measured."""


def kept(
    kind: type[T],
    identity: Mapping[str, Any],
    build: Callable[[], T],
    device: torch.device | str = "cpu",
) -> T:
    """The value that ``build`` computes, from a file where it was computed before.

    Args:
        kind: a dataclass whose fields are tensors, other such dataclasses, or what JSON holds.
        identity: all that the value depends on but for the code; a ``description`` in it is shown
            by ``lightning-inversion cache``, and is no part of what the value is found by.
        build: computes the value; called by one process at a time.
        device: where the tensors are to be.
    """
    limit()  # a wrong one is an error before anything is measured
    try:
        folder = measured_folder()
    except OSError as error:
        _log.warning("there is no folder for a cache (%s); nothing is kept.", error)
        return build()
    of = {name: value for name, value in identity.items() if name != "description"}
    text = as_json({"kind": kind.__qualname__, **of})
    digest = hashlib.sha256(text.encode()).hexdigest()[:24]
    path = folder / f"{kind.__name__}-{digest}-{method()}{SUFFIX}"
    found = _read(kind, path, text, device)
    if found is not None:
        return found
    with measuring_alone(path) as may_write:
        found = _read(kind, path, text, device) if may_write else None
        if found is not None:  # another process measured it while this one waited
            return found
        if path.exists():
            _log.warning("%s is damaged and is made again.", path)
        elif any(folder.glob(f"{kind.__name__}-{digest}-*{SUFFIX}")):
            _tell_of_another_version()
        tensors, plain = _parts(build())
        if may_write:
            about = as_json(identity.get("description", {}))
            metadata = {"about": about, "plain": as_json(plain), "identity": text}
            metadata["sha256"] = _digest(tensors, metadata)
            put(path, lambda part: _save(tensors, part, metadata))
    made = _whole(kind, tensors, plain, device)
    assert as_json(_parts(made)[1]) == as_json(plain), f"{kind.__name__} cannot be kept"
    return made


@cache
def _tell_of_another_version() -> None:
    """Once in a process: each thing that was measured would repeat it."""
    _log.info("what another version of the package measured is measured again.")


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    with as_os_error():
        save_file(tensors, path, metadata)


@cache
def method() -> str:
    """A hash of the code that measures: whatever changes it, what was measured is made again."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256(version("lightning-inversion").encode())
    for file in sorted(one for pattern in _MEASURE for one in package.glob(pattern)):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


method()  # of the code as it is loaded: files may change while a process runs


def _read(kind: type[T], path: Path, identity: str, device: torch.device | str) -> T | None:
    """What a file holds; None where there is none, or it is damaged."""
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as stored:
            metadata = dict(stored.metadata() or {})
            # Copied: memory of a file is not aligned, which changes how sums round.
            tensors = {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118
        if metadata.pop("sha256") != _digest(tensors, metadata) or metadata["identity"] != identity:
            return None
        value = _whole(kind, tensors, read_json(metadata["plain"]), device)
    except (OSError, SafetensorError, LookupError, ValueError, TypeError, RuntimeError):
        return None
    touch(path)
    return value


def _parts(value: Any, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a dataclass, and its other values, by the names of their fields."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for field in fields(value):
        part, name = getattr(value, field.name), prefix + field.name
        if isinstance(part, Tensor):
            tensors[name] = part.detach().cpu().contiguous().clone()
        elif is_dataclass(part):
            more = _parts(part, f"{name}.")
            tensors.update(more[0])
            plain.update(more[1])
        else:
            plain[name] = part
    return tensors, plain


def _whole(
    kind: type[T],
    tensors: Mapping[str, Tensor],
    plain: Mapping[str, Any],
    device: torch.device | str,
    prefix: str = "",
) -> T:
    """The dataclass that has these parts.

    Raises:
        LookupError: a field is missing.
    """
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]  # a dataclass
        name = prefix + field.name
        if name in tensors:
            values[field.name] = tensors[name].to(device)
        elif name in plain:
            values[field.name] = plain[name]
        else:
            hint = hints[field.name]
            inner = next(one for one in (hint, *get_args(hint)) if is_dataclass(one))
            values[field.name] = _whole(inner, tensors, plain, device, f"{name}.")  # type: ignore[arg-type]
    return kind(**values)


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(as_json(metadata).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
