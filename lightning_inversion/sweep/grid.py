"""Axes -> cells: which options each run of a sweep gets, and what its folder is called."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from lightning_inversion.cli.options import SHORT
from lightning_inversion.errors import InputError
from lightning_inversion.files import is_plain_name

COMMANDS = ("fit", "predict")
"""What a sweep can run."""
SEED = "seed_everything"
MAX_CELLS = 10_000
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
        arguments: what follows the command, except for where the run goes.
        values: what sets it apart, by the axes' names.
    """

    name: str
    command: str
    arguments: tuple[str, ...]
    values: dict[str, str] = field(hash=False)

    @property
    def seed(self) -> int | None:
        """The seed that its arguments give, where it is a plain number that any run can have."""
        given = [one for one in self.arguments if one.startswith(f"--{SEED}=")]
        text = given[-1].partition("=")[2] if given else ""
        return int(text) if re.fullmatch(r"0|[1-9][0-9]{0,8}", text) else None

    def apart_from_seed(self) -> tuple[str, tuple[str, ...]]:
        """What it has in common with the same run of another seed."""
        seed = f"--{SEED}={self.seed}"
        plain = self.seed is not None
        return self.command, tuple(x for x in self.arguments if not (plain and x == seed))

    @classmethod
    def from_record(cls, record: Any) -> Cell:
        """The cell that a JSON object describes.

        Raises:
            ValueError: it describes none.
        """
        try:
            cell = cls(**{**record, "arguments": tuple(map(str, record["arguments"]))})
            plain = is_plain_name(cell.name) and isinstance(cell.values, dict)
        except (TypeError, LookupError) as error:
            raise ValueError(f"a cell cannot be read ({error})") from error
        if not plain or cell.command not in COMMANDS:
            raise ValueError(f"{cell.name!r} is not the name of a run of {' or '.join(COMMANDS)}")
        return cell


def cells_of(command: str, arguments: Sequence[str], axes: Sequence[Axis]) -> tuple[Cell, ...]:
    """A command with its options over the product of the axes, each cell with a name of its own.

    Args:
        command: fit or predict.
        arguments: options of every cell.
        axes: the last varies fastest; seeds stand outermost, so that every setting is seen early.

    Raises:
        InputError: a key or a value is given twice, or there are more than `MAX_CELLS`.
    """
    _check_twice("--over", [axis.key for axis in axes])
    for axis in axes:
        _check_twice(f"--over {axis.key}", axis.values)
    check_count(math.prod(len(axis.values) for axis in axes), "--over and --seeds")
    axes = sorted(axes, key=lambda axis: axis.key != SEED)
    names = [axis.name for axis in axes]
    shown = [
        axis.name if names.count(axis.name) == 1 else axis.key.replace(".", "_") for axis in axes
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
        cells.append(Cell(name, command, (*configs, *arguments, *others), ordered))
    return _with_own_names(cells)


def check_count(count: int, options: str) -> None:
    """Raise InputError for more than `MAX_CELLS` cells, which `options` give."""
    if count > MAX_CELLS:
        raise InputError(f"{options} give {count} cells; at most {MAX_CELLS} are run.")


def _with_own_names(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Cells whose name is too long, or another's too, get a digest after it."""
    twice = _repeated([cell.name for cell in cells])
    return tuple(
        replace(cell, name=f"{cell.name[:_NAME_LENGTH]}-{_digest(cell.arguments)}")
        if cell.name in twice or len(cell.name) > _NAME_LENGTH
        else cell
        for cell in cells
    )


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
            f"--over {text!r} is not key=value,value; write it as --over depth=1,2,4, for example."
        )
    return Axis(key_of(key.strip().removeprefix("--"), model_keys), tuple(parts))


def key_of(name: str, model_keys: frozenset[str]) -> str:
    """The key of a config that --over names, in short or without "model." before it."""
    if f"--{name}" in SHORT:
        return SHORT[f"--{name}"].removeprefix("--")
    return f"model.{name}" if name.partition(".")[0] in model_keys else name


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
    if twice := _repeated(given):
        raise InputError(f"{option} has {min(twice)} twice; leave one of them out.")


def _repeated(words: Sequence[str]) -> set[str]:
    return {word for word, count in Counter(words).items() if count > 1}
