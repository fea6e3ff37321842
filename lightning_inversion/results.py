"""``ResultRow``: the one schema of ``results.jsonl``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

from lightning_inversion.errors import InputError
from lightning_inversion.files import Record, append_records, check_of, read_records, sort_records

SCHEMA = 4
"""Version of a row's keys."""
FILE = "results.jsonl"
"""The rows of a run, in its folder."""
FITTED = "config.yaml"
"""The settings of a fit, in its run's folder."""
PREDICTED = "predict.yaml"
"""The settings of a predict, in its run's folder."""
CERTIFICATE = "certificate.json"
"""What the certificates of a predict's rows rest on, in its run's folder: a certificate without
tokens, which each row adds."""
RECOVERED = 0.9
"""The mean token accuracy from which a prompt counts as recovered."""


def _setting(default: Any = None) -> Any:
    return field(default=default, metadata={"kind": "setting"})


def _outcome(default: Any = None) -> Any:
    return field(default=default, metadata={"kind": "outcome"})


def _per_token() -> Any:
    return field(default_factory=list, metadata={"kind": "outcome"})


def _version() -> Any:
    return field(default=None, metadata={"kind": "version"})


@dataclass(kw_only=True)
class ResultRow:
    """What one run recovered of one prompt, and the settings that made it.

    Every field is a setting, an outcome or a version of a package. Rows with equal settings are
    results of one experiment; versions are kept and not compared. A field that a command does not
    have keeps its default. Lists have one entry per token, from the first position on.

    Raises:
        TypeError: a key that the schema does not have.
    """

    schema: int = field(default=SCHEMA, metadata={"kind": "version"})
    index: int = field(metadata={"kind": "outcome"})
    """Number of the prompt in the data set, from 0."""
    prompt: str | None = _outcome()
    """None where only its hidden states are known."""
    error: str | None = _outcome()
    """Why the prompt could not be run; None where it was."""

    recovered: str | None = _outcome()
    """The decoded tokens as text; None without a tokenizer."""
    recovered_tokens: list[str] | None = _outcome()
    """The text of each token."""
    recovered_ids: list[int] = _per_token()
    recovered_scores: list[float | None] = _per_token()
    """The decoder's score of each best token (``fit``)."""
    top_k_ids: list[list[int]] = _per_token()
    """The k best tokens of each position, best first (``fit``)."""
    alternatives: list[list[int]] = _per_token()
    """The best candidates where a token is not verified, itself first; of a group its members
    (``predict``)."""
    refuted: list[list[int]] = _per_token()
    """Other tokens that fit as well as a verified one, but for the next row (``predict``)."""
    ids: list[int] | None = _outcome()
    """The prompt's own tokens; None where they are not known."""

    exact: bool | None = _outcome()
    """Whether all tokens are right; None without ``ids``, as the accuracies are."""
    same_text: bool | None = _outcome()
    """Whether the recovered text is the prompt: right tokens of a tokenizer that loses text are
    not. None where the prompt or its text is not known."""
    token_accuracy: float | None = _outcome()
    top_k_accuracy: float | None = _outcome()
    hamming: float | None = _outcome()

    verified: bool = _outcome(False)
    """Whether every token that was not given is verified."""
    verified_tokens: int = _outcome(0)
    """How many tokens are verified; tokens that were given do not count."""
    token_verified: list[bool] = _per_token()
    """False for a token that was given."""
    token_states: list[str] = _per_token()
    """What is shown of each token: given, verified, conditional (it reproduces the target after
    tokens that are not all verified), group (others reproduce it too), read (off its row, after
    tokens that are not known) or unresolved. Empty where a fit did not compare them."""
    unresolved: list[int] = _per_token()
    """Positions that are neither given nor verified."""
    duplicates: list[int] = _per_token()
    """Positions whose token has the same embedding as another token."""
    token_residuals: list[float | None] = _per_token()
    """Distance to the target in std of each feature; None where it is not finite or was given."""
    thresholds: list[float | None] = _per_token()
    """The residual up to which a token passes; None where it was given."""
    rivals: list[int | None] = _per_token()
    """The nearest other token that was compared with each (``predict``)."""
    margins: list[float | None] = _per_token()
    """How many times as far as the token its nearest rival is; None without one (``predict``)."""
    risks: list[float | None] = _per_token()
    """A bound for the chance that another token is right, under told noise (``predict``)."""
    probabilities: list[float | None] = _per_token()
    """Of each token that was read; None of others (``predict``)."""
    known_tokens: int = _outcome(0)
    """How many tokens were given at the beginning."""
    order: list[int] = _per_token()
    """The number of each token's row in the file, where that order was unknown (``predict``)."""

    candidates: list[int] = _per_token()
    """Tokens run for each position (``predict``)."""
    proposers: list[str] = _per_token()
    """What proposed each token (``predict``)."""
    token_seconds: list[float] = _per_token()
    forwards: int | None = _outcome()
    """Forwards of the truncated model that the prompt took part in (``predict``)."""
    distance_ratio: float | None = _outcome()
    """||O(a_g) - O(a)|| / ||O(a') - O(a)||, the source's stopping criterion (``fit``)."""
    criterion_met: bool | None = _outcome()
    criterion_met_at: int | None = _outcome()
    iterations: int | None = _outcome()
    """Iterations until the row stopped (``fit``)."""
    seconds: float = _outcome(0.0)

    command: Literal["fit", "predict"] = field(default="fit", metadata={"kind": "setting"})
    model: str | None = _setting()
    revision: str | None = _setting()
    weights: str | None = _setting()
    weights_seed: int | None = _setting()
    quantization: str | None = _setting()
    embedding: str | None = _setting()
    embedding_seed: int | None = _setting()
    depth: int | None = _setting()
    layers: list[int] | None = _setting()
    features: str | None = _setting()
    final_norm: bool | None = _setting()
    centred: bool | None = _setting()
    """True where the features lost their mean over the features."""
    storage: str | None = _setting()
    """What happened to the features after the model: noise, rounding; None for nothing."""
    output: str | None = _setting()
    """keys_values, keys or values where these are the features; None for hidden states."""
    mlp: bool | None = _setting()
    norms: bool | None = _setting()
    residuals: bool | None = _setting()
    positions: str | None = _setting()
    causal: bool | None = _setting()
    repeat_first: bool | None = _setting()
    dtype: str | None = _setting()
    attention: str | None = _setting()
    learnable: str | None = _setting()
    initializer: str | None = _setting()
    objective: str | None = _setting()
    decoder: str | None = _setting()
    schedule: str | None = _setting()
    policy: str | None = _setting()
    iterations_limit: int | None = _setting()
    top_k: int | None = _setting()
    seed: int | None = _outcome()
    """Rows of several seeds are results of one experiment."""

    fingerprint: str | None = _version()
    """sha256 of what the row answers: its prompt or hidden states, and the settings of its run."""
    weights_sha256: str | None = _version()
    version: str | None = _version()
    version_torch: str | None = _version()
    version_lightning: str | None = _version()
    version_transformers: str | None = _version()
    version_python: str | None = _version()

    def settings(self) -> dict[str, Any]:
        """The settings; rows with equal ones are results of one experiment."""
        return {name: getattr(self, name) for name in names("setting")}

    def to_record(self) -> Record:
        """The row as it is written: every field, in the order of the schema."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_record(cls, record: Any) -> ResultRow:
        """The row of a record that was read.

        Raises:
            ValueError: it is no row of this schema; the message completes "the row ...".
        """
        if not isinstance(record, dict):
            raise ValueError("is no JSON object")
        schema = record.get("schema")
        if schema != SCHEMA:
            raise ValueError(f"has schema {schema!r}, and {SCHEMA} is read")
        for key, value in record.items():
            check = _checks().get(key)
            if check is None:
                raise ValueError(f"has an unknown key {key!r}")
            if not check(value):
                raise ValueError(f"has a {key} of the wrong type")
        if not isinstance(record.get("index"), int) or record["index"] < 0:
            raise ValueError("has no index")
        return cls(**record)


@cache
def names(kind: Literal["setting", "outcome", "version"]) -> tuple[str, ...]:
    """The fields of one kind, in the order of the schema."""
    return tuple(f.name for f in fields(ResultRow) if f.metadata["kind"] == kind)


@cache
def _checks() -> dict[str, Callable[[Any], bool]]:
    """For each field the test of a value's type; built once, because rows hold many values."""
    return {name: check_of(wanted) for name, wanted in get_type_hints(ResultRow).items()}


def read_rows(path: Path | str) -> list[ResultRow]:
    """The rows of a run, in the order of the prompts; [] where there is no file.

    Raises:
        InputError: a line is no row; names the file and what is wrong.
    """
    rows = []
    for record in read_records(Path(path)):
        try:
            rows.append(ResultRow.from_record(record))
        except ValueError as error:
            raise InputError(
                f"{str(path)!r}: the row of prompt {record['index'] + 1} {error}; "
                "remove its line and run again."
            ) from error
    return rows


def check_rows(path: Path, fingerprints: Sequence[str]) -> list[ResultRow]:
    """The rows of a run, all of which must answer what the run asks.

    Args:
        path: of the rows.
        fingerprints: of each prompt of the run.

    Raises:
        InputError: a row is of another prompt, model or setting, or the file cannot be read.
    """
    rows = read_rows(path)
    for row in rows:
        if row.index >= len(fingerprints) or row.fingerprint != fingerprints[row.index]:
            raise InputError(
                f"{str(path)!r} holds a row of another prompt {row.index + 1}, or of a run with "
                "other settings; restore them, or give the run another folder."
            )
    return rows


def append_rows(path: Path, rows: Sequence[ResultRow]) -> None:
    """Append rows, each whole or not at all; see ``files.append_records``."""
    append_records(path, [row.to_record() for row in rows])


def sort_rows(path: Path) -> list[ResultRow]:
    """Put the rows of a finished run in the order of the prompts, and return them."""
    sort_records(path)
    return read_rows(path)


def critical_width(accuracies: Mapping[int, float]) -> int | None:
    """The smallest width from which on every mean counts as recovered; None if there is none.

    Args:
        accuracies: the mean token accuracy of each number of features, in any order.
    """
    failed = max((width for width, mean in accuracies.items() if mean < RECOVERED), default=0)
    return min((width for width in accuracies if width > failed), default=None)
