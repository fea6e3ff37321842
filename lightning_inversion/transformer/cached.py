"""A tensor that is computed once and kept in the cache folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_inversion.files import cached_folder
from lightning_inversion.untrusted import check_regular

_FILE, _NAME, _DIGEST = "tensor.safetensors", "tensor", "sha256"


def cached_tensor(
    key: str, build: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """The tensor under `key`; it is built again where its file is damaged.

    Args:
        key: of the cache's folder for it.
        build: computes it.
        shape: that it must have.
        dtype: that it must have.
    """

    def read(folder: Path) -> Tensor | None:
        try:
            check_regular(folder / _FILE)
            with safe_open(folder / _FILE, framework="pt") as stored:
                tensor: Tensor = stored.get_tensor(_NAME)
                digest = (stored.metadata() or {})[_DIGEST]
        except (OSError, SafetensorError, LookupError, ValueError, RuntimeError):
            return None
        whole = tensor.shape == shape and tensor.dtype == dtype and _digest(tensor) == digest
        return tensor if whole else None

    def write(folder: Path) -> None:
        tensor = build().contiguous()
        save_file({_NAME: tensor}, folder / _FILE, {_DIGEST: _digest(tensor)})

    found = read(cached_folder(key, write, lambda folder: read(folder) is not None))
    return build() if found is None else found


def _digest(tensor: Tensor) -> str:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()
