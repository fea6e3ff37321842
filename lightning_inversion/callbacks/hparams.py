"""The settings of a run as TensorBoard's HParams shows them: in a few words each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_UNREADABLE = ("weights_sha256", "fingerprint")
_SECTIONS = ("transformer", "model")
"""Whose keys need no section before them."""


def readable_settings(asked: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """Nested settings as flat ones: classes with their arguments, and nothing that is off.

    Args:
        asked: settings of a command, as its ``config.yaml`` has them, or of a row.
        section: that they are in.

    Example:
        >>> optimizer = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.5, "fused": None}}
        >>> readable_settings({"model": {"optimizer": optimizer}, "transformer": {"depth": 4}})
        {'optimizer': 'Adam(lr=0.5)', 'depth': 4}
    """
    flat: dict[str, Any] = {}
    for key, value in asked.items():
        name = f"{section}.{key}" if section else key
        if key in _UNREADABLE or key.startswith("version") or value is None or value is False:
            continue
        if isinstance(value, Mapping) and "class_path" not in value:
            flat.update(readable_settings(value, "" if name in _SECTIONS else name))
        else:
            flat[name] = _value(value)
    return flat


def _value(value: Any) -> Any:
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping) and "class_path" in value:
        name = str(value["class_path"]).rpartition(".")[2]
        arguments = value.get("init_args") or {}
        shown = ", ".join(f"{k}={_value(v)}" for k, v in arguments.items() if v is not None)
        return f"{name}({shown})" if shown else name
    return str(value)
