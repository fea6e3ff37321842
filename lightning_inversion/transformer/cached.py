"""A tensor that is computed once and kept in the cache folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_inversion.files import cached_folder
from lightning_inversion.untrusted import check_regular

_FILE, _NAME = "tensor.safetensors", "tensor"


def cached_tensor(
    key: str, build: Callable[[], Tensor], shape: tuple[int, ...], fits: Callable[[Tensor], bool]
) -> Tensor:
    """The tensor under `key`; it is built again where its file is damaged.

    Args:
        key: of the cache's folder for it.
        build: computes it.
        shape: that it must have.
        fits: whether a tensor that was read can be what `build` gave.
    """

    def read(folder: Path) -> Tensor | None:
        try:
            check_regular(folder / _FILE)
            tensor = load_file(folder / _FILE)[_NAME]
            return tensor if tensor.shape == shape and fits(tensor) else None
        except (OSError, SafetensorError, LookupError, ValueError, RuntimeError):
            return None

    def write(folder: Path) -> None:
        save_file({_NAME: build().contiguous()}, folder / _FILE)

    found = read(cached_folder(key, write, lambda folder: read(folder) is not None))
    return build() if found is None else found


def is_finite(tensor: Tensor) -> bool:
    """Whether it is float32 and all its numbers are finite."""
    return tensor.dtype == torch.float32 and bool(tensor.isfinite().all())
