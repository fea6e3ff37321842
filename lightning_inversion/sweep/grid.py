"""Axes -> cells: which options each run of a sweep gets, and what its folder is called."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from lightning_inversion.errors import InputError

SEED = "seed_everything"
_NAME_LENGTH = 120
_OPENING, _CLOSING = "[{(", "]})"


@dataclass(frozen=True)
class Axis:
    """A key of the config and the values it takes, each as it is written on the command line."""

    key: str
    values: tuple[str, ...]

    @property
    def name(self) -> str:
        """The last word of the key."""
        return "seed" if self.key == SEED else self.key.rpartition(".")[2]


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: of its folder, unique in the sweep.
        command: fit or predict.
        arguments: what follows the command, but for where the run goes.
        values: what sets it apart, by the axes' names.
    """

    name: str
    command: str
    arguments: tuple[str, ...]
    values: dict[str, str] = field(hash=False)


@dataclass(frozen=True)
class Part:
    """A grid: one command with its options, over the product of its axes.

    Attributes:
        command: fit or predict.
        arguments: options of every cell.
        axes: the last varies fastest.
        name: set before the names of its cells; '' for the only part of a sweep.
    """

    command: str
    arguments: tuple[str, ...]
    axes: tuple[Axis, ...]
    name: str = ""

    def cells(self) -> list[Cell]:
        """The product of the axes, seeds outermost: every setting is seen early.

        Raises:
            InputError: a key stands twice, or a value does.
        """
        _check_twice("--over", [axis.key for axis in self.axes])
        for axis in self.axes:
            _check_twice(f"--over {axis.key}", axis.values)
        axes = sorted(self.axes, key=lambda axis: axis.key != SEED)
        names = [axis.name for axis in axes]
        shown = [
            axis.name if names.count(axis.name) == 1 else axis.key.replace(".", "_")
            for axis in axes
        ]
        cells = []
        for values in product(*(axis.values for axis in axes)):
            options = [f"--{axis.key}={value}" for axis, value in zip(axes, values, strict=True)]
            # A config comes before the options that are set beside it.
            configs = [option for option in options if option.startswith("--config=")]
            others = [option for option in options if not option.startswith("--config=")]
            chosen = dict(zip(shown, values, strict=True))
            ordered = {axis: chosen[axis] for axis in sorted(chosen, key=lambda a: a == "seed")}
            name = ",".join(f"{key}={short(value)}" for key, value in ordered.items())
            cells.append(
                Cell(
                    "-".join(part for part in (self.name, name) if part) or "only",
                    self.command,
                    (*configs, *self.arguments, *others),
                    {**({"part": self.name} if self.name else {}), **ordered},
                )
            )
        return cells


def cells_of(parts: Sequence[Part]) -> list[Cell]:
    """The cells of every part, in order, each with a name of its own."""
    cells = [cell for part in parts for cell in part.cells()]
    names = [cell.name for cell in cells]
    return [
        cell
        if names.count(cell.name) == 1 and len(cell.name) <= _NAME_LENGTH
        else Cell(
            f"{cell.name[:_NAME_LENGTH]}-{_digest(cell.arguments)}",
            cell.command,
            cell.arguments,
            cell.values,
        )
        for cell in cells
    ]


def read_axis(text: str, model_keys: frozenset[str]) -> Axis:
    """An axis as the command line writes it: ``key=value,value``.

    Commas within brackets or quotes belong to a value: ``transformer.layers=[1,2],[1,2,3]``.

    Args:
        text: of one --over.
        model_keys: the words under ``model.``, which may be left out before them.

    Raises:
        InputError: there is no key or no value.
    """
    key, equals, values = text.partition("=")
    parts = split_values(values)
    if not equals or not key.strip() or not all(parts):
        raise InputError(
            f"--over {text!r} is not key=value,value; "
            "write it as --over transformer.depth=1,2,4, for example."
        )
    return axis_of(key.strip().removeprefix("--"), parts, model_keys)


def axis_of(key: str, values: Sequence[Any], model_keys: frozenset[str]) -> Axis:
    """An axis of a key, whose ``model.`` may be left out, and of values of any kind."""
    full = f"model.{key}" if key.partition(".")[0] in model_keys else key
    return Axis(full, tuple(written(value) for value in values))


def written(value: Any) -> str:
    """A value as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def split_values(text: str) -> list[str]:
    """The pieces between commas that stand outside of brackets and quotes.

    Example:
        >>> split_values("[1,2],[1,2,3]")
        ['[1,2]', '[1,2,3]']
    """
    pieces, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in _OPENING) - (character in _CLOSING)
        if character == "," and not quote and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return [piece.strip() for piece in pieces]


def short(value: str) -> str:
    """A value as a part of a folder's name: the last word of a path or class, no odd characters."""
    last = value.rstrip("/").rpartition("/")[2]
    if re.fullmatch(r"[A-Za-z_][\w.]*\.[A-Z]\w*", last) and "/" not in value:
        last = last.rpartition(".")[2]
    return re.sub(r"[^\w.+-]+", "-", last).strip("-.") or _digest([value])


def _digest(words: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(words)).encode()).hexdigest()[:6]


def _check_twice(option: str, given: Sequence[str]) -> None:
    twice = sorted({word for word in given if given.count(word) > 1})
    if twice:
        raise InputError(f"{option} has {twice[0]} twice; leave one of them out.")
