"""Files of results -> a table of prompts and a table of settings; what is no result is named.

A row of ``results.jsonl`` holds several lists with an entry a token. Ten thousand rows fit into
memory because the table keeps one letter per token instead.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pandas as pd

from lightning_inversion.errors import InputError
from lightning_inversion.files import visible
from lightning_inversion.report.labels import LABEL
from lightning_inversion.report.unfinished import settings_of, unfinished_runs
from lightning_inversion.results import FITTED, PREDICTED, ResultRow, names
from lightning_inversion.untrusted import check_regular, read_json

VERIFIED, DUPLICATE, RIGHT, IN_TOP_K, WRONG, GIVEN, FALSE = "vdrkwgx"
"""Marks of a token: verified; verified, and another token has the same embedding; right, not
verified; wrong, the right one among the best k; wrong; given; verified and yet wrong, which must
never be."""
CONDITIONAL, GROUP, READ, UNKNOWN = "coeu"
"""Marks of a token that is not verified, where the prompt is not known: it reproduces the target
after tokens that are not all verified; others reproduce it too; it was read off its row, and not
run; none of these."""
_UNSCORED = {"conditional": CONDITIONAL, "group": GROUP, "read": READ}
CURVES = {"match/distance": "distance", "match/distance_ratio": "distance ratio"}
"""Tags of a run's event files that are read, and what a report calls them."""

_ALWAYS = ("command", "model", "depth")
_OF_ONE_COMMAND = {
    *("learnable", "initializer", "objective", "decoder", "schedule", "iterations_limit", "top_k"),
    "policy",
}
"""Settings of a row that only ``fit``, or only ``predict``, has."""
_PARTS_OF_A_CONFIG = ("model", "learning_rate", "stopping")
_IN_THE_ROW = {"learnable.initializer": "initializer", "iterations": "iterations_limit"}
"""Keys of a config that a row holds under another name."""
_MEASURED = (
    *("seed", "token_accuracy", "exact", "top_k_accuracy", "verified_share"),
    *("iterations", "seconds"),
)

Settings = dict[str, Any]


@dataclass
class Loaded:
    """All results that were found.

    Attributes:
        results: one row for each prompt of each run. ``run`` is its file, ``experiment`` its row in
            ``settings``, ``key`` identifies the prompt (its text, or its number where the text is
            not known), ``tokens`` and ``marks`` have one entry per token, ``verified_share`` counts
            tokens that were not given. The other columns are fields of ``ResultRow``.
        settings: one row per experiment, in the order of depth: what differs between them, with the
            command, the model and the depth; None where a setting does not apply.
        files: that results were read from.
        skipped: a file, and why it or a row of it was left out.
        unfinished: the folder of a run that has not ended, and how far it is.
    """

    results: pd.DataFrame
    settings: pd.DataFrame
    files: list[Path]
    skipped: list[tuple[Path, str]]
    unfinished: list[tuple[Path, str]] = field(default_factory=list)


def load_results(paths: Iterable[Path], labels: Sequence[str] = ()) -> Loaded:
    """Every result in files and, at any depth, in folders.

    Args:
        paths: of result files and of folders; the same file counts once.
        labels: a name for the results of each path, or none.

    Raises:
        InputError: a path does not exist, or no path has a result.
    """
    given = list(paths)
    files: list[Path] = []
    skipped: list[tuple[Path, str]] = []
    records: list[dict[str, Any]] = []
    numbers: dict[frozenset[tuple[str, Any]], int] = {}
    experiments: list[Settings] = []
    counts: dict[Path, int] = {}
    for path, label in _result_files(given, labels).items():
        known: dict[str, int] = {}
        before = len(records) + len(skipped)
        for row in _rows(path, skipped):
            own = row.settings()
            as_written = repr(own)
            if as_written not in known:
                settings = _all_settings(own, path.parent)
                settings.update({LABEL: visible(label)} if label else {})
                number = numbers.setdefault(frozenset(settings.items()), len(numbers))
                if number == len(experiments):
                    experiments.append(settings)
                known[as_written] = number
            records.append(_record(row, str(path), known[as_written]))
        counts[path] = len(records) + len(skipped) - before
        if known:
            files.append(path)
    if not records:
        reasons = "".join(f"; {path}: {reason}" for path, reason in skipped[:3])
        raise InputError(
            f"No results in {', '.join(map(str, given))}{reasons}. "
            "Give folders of runs, or results.jsonl."
        )
    results = pd.DataFrame(records, dtype=object)
    for name in _MEASURED:
        results[name] = results[name].astype(float).replace([math.inf, -math.inf], math.nan)
    results["experiment"] = results["experiment"].astype(int)
    unfinished = unfinished_runs(given, counts)
    return Loaded(results, _what_differs(experiments), files, skipped, unfinished)


def load_curves(results: pd.DataFrame) -> pd.DataFrame:
    """What the runs logged: columns experiment, curve, step and value.

    Event files beside a result file are read in the order in which they were begun, so that a
    resumed run replaces what it logged before.
    """
    points: dict[tuple[int, str, str, int], float] = {}
    for run, experiment in results.groupby("run", sort=False)["experiment"].first().items():
        for path in sorted(Path(run).parent.glob("events.out.tfevents.*"), key=_begun):
            for tag, step, value in _logged(path):
                points[experiment, run, CURVES[tag], step] = value
    rows = [(experiment, curve, step, v) for (experiment, _, curve, step), v in points.items()]
    return pd.DataFrame(rows, columns=["experiment", "curve", "step", "value"])


def _begun(path: Path) -> float:
    """The time in the file's first event; names of one second are not in order."""
    return next((event.wall_time for event in _events(path)), 0.0)


def _events(path: Path) -> Iterator[Any]:
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    if path.is_file():  # a pipe would never end
        yield from LegacyEventFileLoader(str(path)).Load()


def _logged(path: Path) -> Iterator[tuple[str, int, float]]:
    for event in _events(path):
        for value in event.summary.value:
            if value.tag in CURVES:
                yield value.tag, int(event.step), float(value.simple_value)


def _result_files(paths: Sequence[Path], labels: Sequence[str]) -> dict[Path, str]:
    """Each file once, with the label of the path that it was found in."""
    found: dict[Path, tuple[Path, str]] = {}
    for path, label in zip_longest(paths, labels, fillvalue=""):
        assert isinstance(path, Path)
        if not path.exists():
            raise InputError(f"{str(path)!r} does not exist; give a folder of runs, or a file.")
        for file in sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]:
            found.setdefault(Path(os.path.realpath(file)), (file, str(label)))
    return dict(found.values())


def _rows(path: Path, skipped: list[tuple[Path, str]]) -> Iterator[ResultRow]:
    """The rows of a file; the rest is named in ``skipped``, a foreign file once."""
    problems = []
    has_rows = False
    for row in _read_lines(path):
        if isinstance(row, ResultRow):
            has_rows = True
            if row.error is None:
                yield row
                continue
            row = f"prompt {row.index + 1} {row.error}"
        problems.append(row)
    skipped += [(path, problem) for problem in (problems if has_rows else problems[:1])]


def _read_lines(path: Path) -> Iterator[ResultRow | str]:
    """Each line as a row, or why it is none."""
    number = 0
    try:
        check_regular(path)
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    yield "the last line is not whole"
                    return
                try:
                    record = read_json(line)
                except ValueError:
                    yield f"line {number} is not JSON"
                    continue
                if not isinstance(record, dict) or "schema" not in record:
                    yield f"line {number} is not a row of results"
                    continue
                try:
                    yield ResultRow.from_record(record)
                except ValueError as error:
                    yield f"line {number} {error}"
    except OSError as error:
        yield f"cannot be read: {error.strerror}"
        return
    if number == 0:
        yield "is empty"


def _record(row: ResultRow, run: str, experiment: int) -> dict[str, Any]:
    marks = marks_of(row)
    tried = len(marks) - marks.count(GIVEN)
    verified = sum(marks.count(mark) for mark in (VERIFIED, DUPLICATE, FALSE))
    return {
        "run": run,
        "experiment": experiment,
        "index": row.index,
        "seed": row.seed,
        "key": f"#{row.index}" if row.prompt is None else row.prompt,
        "prompt": row.prompt,
        "recovered": row.recovered or "",
        "tokens": tuple(row.recovered_tokens or ()),
        "marks": marks,
        "candidates": tuple(row.candidates[row.known_tokens :]),
        "token_accuracy": row.token_accuracy,
        "exact": row.exact,
        "lost_text": bool(row.exact) and row.same_text is False,
        "top_k_accuracy": row.top_k_accuracy,
        "verified": row.verified,
        "verified_share": verified / tried if tried else None,
        "iterations": row.iterations,
        "seconds": row.seconds,
    }


def marks_of(row: ResultRow) -> str:
    """A letter for each token of a row, '' where it does not hold them."""
    return "".join(_mark(row, position) for position in range(len(row.recovered_ids)))


def _mark(row: ResultRow, position: int) -> str:
    if position < row.known_tokens:
        return GIVEN
    token = row.recovered_ids[position]
    truth = row.ids[position] if row.ids is not None and position < len(row.ids) else None
    if position < len(row.token_verified) and row.token_verified[position]:
        if position in row.duplicates:
            return DUPLICATE
        return VERIFIED if truth in (None, token) else FALSE
    if truth is None:
        state = row.token_states[position] if position < len(row.token_states) else ""
        return _UNSCORED.get(state, UNKNOWN)
    if truth == token:
        return RIGHT
    best = row.top_k_ids[position] if position < len(row.top_k_ids) else ()
    return IN_TOP_K if truth in best else WRONG


def _all_settings(own: Settings, folder: Path) -> Settings:
    """The settings of a row, and those of the config beside its file that the row does not hold."""
    if own["layers"] == [own["depth"]]:
        own["layers"] = None
    is_predict = own["command"] == "predict"
    config = _settings_of(folder / (PREDICTED if is_predict else FITTED))
    beside = {
        key: value
        for key, value in config.items()
        if _IN_THE_ROW.get(key, key) not in (*own, "seed")
        and (key.partition(".")[0] == "recovery") == is_predict
    }
    settings = {**own, **beside}.items()
    return {key: _plain(value) for key, value in settings if value is not None}


def _plain(value: Any) -> str | int | float:
    """A setting that can be compared, written as JSON, and shown in one line."""
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return visible(str(value)).replace("\n", "")


def _settings_of(path: Path) -> Settings:
    """The keys of a config that decide a result, flat; {} where none can be read."""
    config = settings_of(path)
    parts = {part: config[part] for part in _PARTS_OF_A_CONFIG if part in config}
    flat = {key.removeprefix("model."): value for key, value in _flat(parts, "")}
    return {key: value for key, value in flat.items() if not key.startswith("transformer.")}


def _flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Keys joined by dots; a class stands under the key of its part, by its short name."""
    if isinstance(value, dict) and "class_path" in value:
        yield key, str(value["class_path"]).rpartition(".")[2]
        value = value.get("init_args") or {}
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{_plain(name)}" if key else name)
    else:
        yield key, _short_classes(value)


def _short_classes(value: Any) -> Any:
    """A list with its classes as ``Name(option=value)``."""
    if isinstance(value, list):
        return f"[{', '.join(str(_short_classes(inner)) for inner in value)}]"
    if isinstance(value, dict) and "class_path" in value:
        options = (value.get("init_args") or {}).items()
        written = ", ".join(f"{name}={_short_classes(option)}" for name, option in options)
        name = str(value["class_path"]).rpartition(".")[2]
        return f"{name}({written})" if written else name
    return value


def _what_differs(experiments: list[Settings]) -> pd.DataFrame:
    """A row an experiment, without the settings that are the same in all, or follow from others."""
    columns = list(dict.fromkeys([*_ALWAYS, *(key for one in experiments for key in one)]))
    table = pd.DataFrame(experiments, columns=columns, dtype=object)
    table = table.where(table.notna(), None)
    kept = [name for name in table if name not in _ALWAYS and not _is_implied(table, name)]
    return table[[*_ALWAYS, *kept]].sort_values("depth", kind="stable")


def _is_implied(table: pd.DataFrame, name: str) -> bool:
    """Whether a setting is constant, or its command or the part it belongs to decides it."""

    def decided_by(other: str) -> bool:
        values = table.groupby(other, dropna=False)[name].nunique(dropna=False)
        return bool((values == 1).all())

    if table[name].nunique(dropna=False) == 1:
        return True
    of_one_command = name in _OF_ONE_COMMAND or name not in names("setting")
    if of_one_command and table[name].nunique() == 1 and decided_by("command"):
        return True
    part = name.rpartition(".")[0]
    part = _IN_THE_ROW.get(part, part)
    return part in table and decided_by(part)
