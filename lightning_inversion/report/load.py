"""Files of results, wherever they lie -> one slim record a prompt; what is not ours is named.

A row of ``results.jsonl`` holds several lists a token. Ten thousand of them fit into memory because
a record keeps one letter a token instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_inversion.errors import InputError

SCHEMA = 4
"""The newest version of a row's keys that is understood."""
NEEDED = {"index", "recovered", "model", "depth"}
"""Keys without which a row is not a row of ours."""
OUTCOMES = {
    "schema", "index", "prompt", "recovered", "recovered_tokens", "recovered_ids",
    "recovered_scores", "ids", "exact", "token_accuracy", "top_k_accuracy", "top_k_ids", "hamming",
    "verified", "verified_tokens", "unresolved", "relative_residuals",
    "token_residuals", "thresholds", "known_tokens", "forwards", "margins", "candidates", "orders",
    "token_seconds", "alternatives", "duplicates", "threshold", "distance_ratio",
    "criterion_met", "criterion_met_at", "iterations", "seconds", "present", "range", "error",
    "settings", "seed", "weights_sha256",
}  # fmt: skip
"""Keys that say what came of a prompt; the others say what was set."""
_PARTS_OF_A_CONFIG = (
    "model", "learning_rate", "token_by_token", "position_by_position", "stopping", "recovery",
)  # fmt: skip
_PLACE_OF_A_CLASS = re.compile(r"(?<='class_path': ')[\w.]+\.")
_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

VERIFIED, TWIN, RIGHT, IN_TOP_K, WRONG, UNKNOWN, FALSE = "ctrkwux"
"""Marks of a token: verified by running it; verified, one of several that nothing tells apart; right;
wrong with the right one among the best; wrong; not verified, and nobody knows the prompt; verified and
yet wrong, which must never be."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one prompt in one run.

    Attributes:
        run: the file it stands in.
        settings: what was set, by name; shared between the prompts of a run.
        prompt: the text, None where it is not known.
        recovered: what was read.
        tokens: the pieces of ``recovered``; () where the row does not hold them.
        marks: a letter for each token.
        candidates: tokens that were run before each was named; () where it is not counted.
    """

    run: str
    settings: dict[str, Any]
    index: int
    seed: int | None
    prompt: str | None
    recovered: str
    tokens: tuple[str, ...]
    marks: str
    candidates: tuple[int, ...]
    token_accuracy: float | None
    exact: bool | None
    top_k_accuracy: float | None
    verified: bool | None
    iterations: int | None
    seconds: float | None

    @property
    def verified_share(self) -> float | None:
        """The share of tokens that are verified; None where nothing was tried."""
        if self.verified is None or not self.marks:
            return None
        return sum(mark in (VERIFIED, TWIN, FALSE) for mark in self.marks) / len(self.marks)


@dataclass
class Reading:
    """All that was found.

    Attributes:
        results: in the order of the files.
        files: that results were read from.
        skipped: a file, or a part of it, and why it was left out.
    """

    results: list[Result] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)


def read(paths: Iterable[Path]) -> Reading:
    """Every result in files and, at any depth, in folders.

    Args:
        paths: of .jsonl files and of folders; the same file counts once.

    Raises:
        InputError: a path does not exist, or there is no result in any of them.
    """
    reading = Reading()
    given = list(paths)
    configs = _Configs()
    for path in _files(given):
        rows = list(_rows(path, reading))
        if not rows:
            continue
        reading.files.append(path)
        name = "predict.yaml" if rows[0].get("command") == "predict" else "config.yaml"
        beside = configs.of(path.with_name(name))
        known: dict[str, dict[str, Any]] = {}
        for row in rows:
            reading.results.append(_result(row, str(path), beside, known))
    if not reading.results:
        named = ", ".join(map(str, given))
        why = "".join(f"; {path}: {reason}" for path, reason in reading.skipped[:3])
        raise InputError(f"No results in {named}{why}. Give folders of runs, or results.jsonl.")
    _keep_what_differs(reading.results)
    return reading


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    seen = set()
    for path in paths:
        if not path.exists():
            raise InputError(f"{str(path)!r} does not exist; give a folder of runs, or a file.")
        found = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
        for file in found:
            if file.resolve() not in seen:
                seen.add(file.resolve())
                yield file


def _rows(path: Path, reading: Reading) -> Iterator[dict[str, Any]]:
    """The rows of a file that are ours; the rest is named in ``skipped``."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        reading.skipped.append((path, f"cannot be read: {error.strerror}"))
        return
    last = lines.pop()
    if not lines and not last:
        reading.skipped.append((path, "is empty"))
    for number, line in enumerate(lines, start=1):
        reason = None
        try:
            row = json.loads(line)
        except ValueError:
            reason = "is not JSON"
        else:
            if not isinstance(row, dict) or not row.keys() >= NEEDED:
                reason = "is not a row of results"
            elif int(row.get("schema", SCHEMA)) > SCHEMA:
                reason = f"has schema {row['schema']}, newer than {SCHEMA}"
        if reason is None and row.get("error"):
            reading.skipped.append((path, f"prompt {int(row['index']) + 1} {row['error']}"))
        elif reason is None:
            yield row
        elif number == 1:
            reading.skipped.append((path, f"line 1 {reason}"))
            return
        else:
            reading.skipped.append((path, f"line {number} {reason}; the others are used"))
    if last:
        reading.skipped.append((path, "the last line is not whole; the others are used"))


def _result(
    row: dict[str, Any], run: str, beside: dict[str, Any], known: dict[str, dict[str, Any]]
) -> Result:
    settings = {
        name: value
        for name, value in row.items()
        if name not in OUTCOMES and not name.startswith("version")
    }
    settings.setdefault("command", "fit")
    settings["features"] = row.get("range", row.get("features"))
    if settings.get("layers") == [row["depth"]]:
        del settings["layers"]
    settings = {k: str(v) if isinstance(v, list | dict) else v for k, v in settings.items()}
    key = repr(settings)
    shared = known.setdefault(key, {**settings, **_beside(beside, settings)})
    return Result(
        run=run,
        settings=shared,
        index=int(row["index"]),
        seed=row.get("seed"),
        prompt=row.get("prompt"),
        recovered=row["recovered"] or "",
        tokens=tuple(row.get("recovered_tokens") or ()),
        marks=marks_of(row),
        candidates=tuple(row.get("candidates") or ()),
        token_accuracy=row.get("token_accuracy"),
        exact=row.get("exact"),
        top_k_accuracy=row.get("top_k_accuracy"),
        verified=row.get("verified"),
        iterations=row.get("iterations"),
        seconds=row.get("seconds"),
    )


def marks_of(row: dict[str, Any]) -> str:
    """A letter for each token of a row, '' where it does not hold them."""
    recovered, ids = row.get("recovered_ids") or [], row.get("ids")
    count = len(recovered)
    if row.get("token_verified"):
        verified = [bool(token) for token in row["token_verified"]]
    elif "unresolved" in row:
        unresolved = set(row["unresolved"])
        verified = [token not in unresolved for token in range(count)]
    else:
        verified = [False] * count
    verified += [False] * (count - len(verified))
    first_duplicate = set(row.get("duplicates") or ())
    best = row.get("top_k_ids") or [[]] * count
    return "".join(
        _mark(
            verified[token],
            token in first_duplicate,
            None if ids is None or token >= len(ids) else recovered[token] == ids[token],
            ids is not None and token < len(ids) and ids[token] in best[token],
        )
        for token in range(count)
    )


def _mark(verified: bool, twin: bool, right: bool | None, in_top_k: bool) -> str:
    if verified and right is False and not twin:
        return FALSE
    if verified:
        return TWIN if twin else VERIFIED
    if right is None:
        return UNKNOWN
    if right:
        return RIGHT
    return IN_TOP_K if in_top_k else WRONG


class _Configs:
    """The config.yaml beside a result file, flat; each distinct content is parsed once."""

    def __init__(self) -> None:
        self._parsed: dict[bytes, dict[str, Any]] = {}

    def of(self, path: Path) -> dict[str, Any]:
        """Key -> value of the parts that decide a result; {} where there is none to be read."""
        try:
            text = path.read_bytes()
            if text not in self._parsed:
                config = yaml.load(text, Loader=_YAML)
                parts = {part: config.get(part) for part in _PARTS_OF_A_CONFIG}
                chosen = {part: value for part, value in parts.items() if value is not None}
                self._parsed[text] = dict(_flat(chosen, ""))
        except (OSError, yaml.YAMLError, AttributeError):
            return {}
        return self._parsed[text]


def _flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            below = "" if name in ("init_args", "class_path") else str(name)
            short = name == "class_path" and isinstance(inner, str)
            plain = inner.rpartition(".")[2] if short else inner  # as a row names a class
            yield from _flat(plain, ".".join(part for part in (key, below) if part))
    elif isinstance(value, list):
        yield key.removeprefix("model."), _PLACE_OF_A_CLASS.sub("", str(value))
    else:
        yield key.removeprefix("model."), value


# What a row says itself, under another name.
_SAID = {"learnable.initializer": "start", "seed": "seed", "iterations": "iterations_limit"}


def _beside(config: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """What a config sets beyond what the row says itself; no option of the other command."""
    of_predict = settings["command"] == "predict"
    return {
        key: value
        for key, value in config.items()
        if not key.startswith("transformer.")
        and (key.partition(".")[0] == "recovery") == of_predict
        and _SAID.get(key, key) not in (*settings, "seed")
    }


def _keep_what_differs(results: list[Result]) -> None:
    """Leave in each record's settings what is not the same in all of them, and not implied.

    The model, the depth and the command stay: no report is without them.
    """
    every = list({id(result.settings): result.settings for result in results}.values())
    keys = dict.fromkeys(key for settings in every for key in settings)
    always = ("command", "model", "depth")
    same = {
        key
        for key in keys
        if key not in always
        and (
            len({repr(settings.get(key)) for settings in every}) == 1
            or _of_command(key, every)
            or _follows(key, every)
        )
    }
    for settings in every:
        ordered = [*always, *(key for key in keys if key not in always)]
        kept = {key: settings.get(key) for key in ordered if key not in same}
        settings.clear()
        settings.update(kept)


def _of_command(key: str, every: list[dict[str, Any]]) -> bool:
    """Whether all runs of a command have the key, with one value, and no other run has it."""
    having = [settings for settings in every if key in settings]
    commands = {settings["command"] for settings in having}
    return len({repr(settings[key]) for settings in having}) == 1 and len(having) == sum(
        settings["command"] in commands for settings in every
    )


def _follows(key: str, every: list[dict[str, Any]]) -> bool:
    """Whether what a key belongs to decides it: as ``objective``, ``objective.relative``."""
    whole = _SAID.get(key.rpartition(".")[0], key.rpartition(".")[0])
    having = [settings for settings in every if whole in settings]
    if not having or any(key in settings and whole not in settings for settings in every):
        return False
    pairs = {(repr(settings[whole]), repr(settings.get(key))) for settings in having}
    return len(pairs) == len({settings[whole] for settings in having})
