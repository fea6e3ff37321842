"""Files that anybody may have written: JSON and YAML that end in a value or in one error, soon.

Nothing is executed, a pipe is not opened, and what would fill the memory is refused.
"""

from __future__ import annotations

import errno
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

MOST_NODES, MOST_LEVELS = 1_000_000, 100
"""How many values a YAML text may come to, its aliases written out, and how deep they may stand."""
_YAML: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class HostileError(ValueError):
    """A text that would fill the memory, exhaust the stack or never end."""


class RepeatedKeyError(ValueError):
    """A key stands twice in one object: which of its values is meant is not known."""


def check_regular(path: Path) -> None:
    """Raise OSError for a folder, and for a pipe or a device, which may never end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file", str(path))


def read_file(path: Path) -> bytes:
    """The bytes of a regular file; OSError for anything else."""
    check_regular(path)
    return path.read_bytes()


def read_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        RepeatedKeyError: an object has a key twice.
        ValueError: it is none, or nested too deep.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repetition)
    except RecursionError as error:
        raise HostileError("it is nested too deep") from error


def read_yaml(text: str | bytes) -> Any:
    """The value of a YAML text, which runs no code.

    Raises:
        RepeatedKeyError: a mapping has a key twice.
        ValueError: it is none, or `check_yaml` refuses it.
    """
    check_yaml(text)
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except (yaml.YAMLError, TypeError, AttributeError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def check_yaml(text: str | bytes, most_entries: int | None = None) -> None:
    """Refuse a YAML text that would fill the memory or never end: by its aliases, or its depth.

    Args:
        text: of any origin.
        most_entries: how many values a list or mapping may have; any number without.

    Raises:
        HostileError: why it is refused.
        ValueError: it is no YAML.
    """
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []
    entries: list[int] = []
    nodes = 0
    try:
        for event in yaml.parse(text, Loader=_YAML):
            if isinstance(event, yaml.CollectionEndEvent):
                anchor, before = open_nodes.pop()
                entries.pop()
                if anchor is not None:
                    sizes[anchor] = nodes - before
                continue
            if entries and isinstance(event, yaml.NodeEvent):
                entries[-1] += 1
                if most_entries is not None and entries[-1] > most_entries:
                    raise HostileError(f"it has more than {most_entries} values in a list")
            if isinstance(event, yaml.AliasEvent):
                if event.anchor not in sizes:
                    raise HostileError(f"it has an alias *{event.anchor} of nothing, or of itself")
                nodes += sizes[event.anchor]
            elif isinstance(event, yaml.NodeEvent):
                nodes += 1
                if isinstance(event, yaml.CollectionStartEvent):
                    open_nodes.append((event.anchor, nodes - 1))
                    entries.append(0)
                elif event.anchor is not None:
                    sizes[event.anchor] = 1
            if nodes > MOST_NODES or len(open_nodes) > MOST_LEVELS:
                raise HostileError("it is too large or nested too deep")
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


class _PlainLoader(_YAML):  # type: ignore[misc]
    """PyYAML keeps the last of two values with one key; here that is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        pairs = [(key, None) for key in keys if isinstance(key, str)]
        _without_repetition(pairs)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def _without_repetition(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise RepeatedKeyError(f"it has the key {twice!r} twice")
    return record
