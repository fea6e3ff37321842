"""Prompts as text: files of them, and their tokens."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_inversion.errors import InputError
from lightning_inversion.files import other_format
from lightning_inversion.transformer.blocks import most_positions, text_config
from lightning_inversion.transformer.tokens import is_text
from lightning_inversion.untrusted import RepeatedKeyError, read_file, read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
_JSON_LINES = (".jsonl", ".ndjson", ".jsonlines", ".jl")
_TEXT = (".txt", ".md")
_SURELY_TOO_LONG = 64
"""Letters for each token that a model reads, beyond which the beginning is tokenised first."""


def read_prompts(path: Path, option: str) -> list[str]:
    """The prompts of a text file (one a line) or a file of JSON lines (key "prompt"): .jsonl,
    .ndjson, .jsonlines or .jl.

    Lines end at newlines alone; a byte-order mark at the beginning is dropped.

    Args:
        path: of the file; empty lines at its end do not count, others are empty prompts.
        option: of the command line that named it, for messages.

    Raises:
        InputError: names the option and the file, and the line where one is at fault.
    """
    where = f"{option} {str(path)!r}"
    if kind := other_format(path, *_JSON_LINES, *_TEXT):
        raise InputError(
            f"{where} is a {kind} file; give a text file with one prompt per line, or a .jsonl "
            'file with a key "prompt".'
        )
    try:
        lines = read_file(path).decode("utf-8-sig").split("\n")
        if any("\0" in line for line in lines):  # UTF-16 of English letters is UTF-8 as well
            raise ValueError("it has NUL characters, as UTF-16 has")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} cannot be read: it is not UTF-8 text.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{where} cannot be read: {reason}; give a text file or a .jsonl file."
        ) from error
    lines = [line.removesuffix("\r") for line in lines]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise InputError(f"{where} holds no text.")
    if path.suffix.lower() not in _JSON_LINES:
        return lines
    return [_prompt_of(line, f"{where}, line {n}") for n, line in enumerate(lines, start=1)]


def _prompt_of(line: str, where: str) -> str:
    try:
        record = read_json(line)
        prompt = record["prompt"]
    except RepeatedKeyError as error:
        raise InputError(f"{where}: {error}; leave one of them out.") from error
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f'{where} is not a JSON object with a key "prompt".') from error
    if not isinstance(prompt, str):
        raise InputError(f'{where}: "prompt" is {json.dumps(prompt)[:60]}, not a string; quote it.')
    return prompt


_PLACEHOLDERS = [
    f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index")
]


@dataclass(frozen=True)
class ModelLimits:
    """What a model can run: so many ``tokens`` (None: any number), ids below ``vocabulary``.

    ``placeholders`` are ids in whose place an image, a video or a sound is put.
    """

    tokens: int | None
    vocabulary: int
    placeholders: frozenset[int] = frozenset()

    @classmethod
    def of(cls, config: PretrainedConfig) -> ModelLimits:
        """The limits in a model's configuration.

        Raises:
            InputError: it is of no language model.
        """
        language = text_config(config)
        named = (getattr(config, name, None) for name in _PLACEHOLDERS)
        placeholders = frozenset(token for token in named if isinstance(token, int))
        if not hasattr(language, "vocab_size"):
            raise InputError(
                f"--model.transformer.model: a model of type {config.model_type} has no "
                "vocabulary; choose a causal language model."
            )
        return cls(most_positions(config), language.vocab_size, placeholders)

    def check(self, ids: list[int]) -> None:
        """Raise InputError, "has ...; ...", if the model cannot run tokens ``ids``."""
        self.check_length(len(ids))
        if ids and not 0 <= min(ids) <= max(ids) < self.vocabulary:
            wrong = next(token for token in ids if not 0 <= token < self.vocabulary)
            raise InputError(
                f"has token {wrong}, and the model has embeddings for tokens 0 to "
                f"{self.vocabulary - 1}; remove it."
            )
        if seen := self.placeholders.intersection(ids):
            raise InputError(
                f"has token {min(seen)}, whose place an image or a sound takes; remove it."
            )

    def check_length(self, length: int) -> None:
        """Raise InputError, "has ...; ...", if the model cannot run so many tokens."""
        if self.tokens is not None and length > self.tokens:
            raise InputError(
                f"has {length} tokens, and the model reads at most {self.tokens}; shorten it."
            )


def tokenize(
    prompt: str, tokenizer: PreTrainedTokenizerBase, limits: ModelLimits, special_tokens: bool
) -> list[int]:
    """The tokens of a prompt that the model can run.

    Raises:
        InputError: why it cannot be run and the way out, without a subject: "is empty; ...".
    """
    if not isinstance(prompt, str):  # a caller's: files hold texts alone
        raise InputError(f"is a {type(prompt).__name__}; give a text.")
    if not prompt:
        raise InputError("is empty; give it a text.")
    if not is_text(prompt):
        raise InputError("has half of a surrogate pair, which is no character; correct it.")
    beginning = prompt[: _SURELY_TOO_LONG * (limits.tokens or len(prompt))]
    if limits.tokens is not None and len(beginning) < len(prompt):
        length = len(tokenizer(beginning, add_special_tokens=False)["input_ids"])
        if length > 2 * limits.tokens:  # the rest of the text cannot make it short
            raise InputError(
                f"has over {length} tokens, and the model reads at most {limits.tokens}; "
                "shorten it."
            )
    ids = list(tokenizer(prompt, add_special_tokens=special_tokens)["input_ids"])
    if not ids:
        raise InputError("has no tokens; remove it.")
    limits.check(ids)
    return ids


def tokenize_each(
    prompts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    limits: ModelLimits,
    special_tokens: bool,
) -> tuple[dict[int, list[int]], dict[int, str]]:
    """The tokens of each prompt that the model can run, by its index, and why it cannot run others.

    One prompt that cannot be run never costs the user the others: see ``warn_of_bad``.
    """
    ids, bad = {}, {}
    for index, prompt in enumerate(prompts):
        try:
            ids[index] = tokenize(prompt, tokenizer, limits, special_tokens)
        except InputError as error:
            bad[index] = str(error)
    return ids, bad


def warn_of_bad(bad: Mapping[int, str], count: int, option: str, others: str = "run") -> None:
    """Name the prompts that cannot be run.

    Args:
        bad: why each of them cannot, by its index, as of ``tokenize_each``.
        count: of all prompts.
        option: of the command line that named the prompts.
        others: what is done with the others, as a participle.

    Raises:
        InputError: there are no others.
    """
    if len(bad) == count:
        raise InputError(f"{option}, prompt {min(bad) + 1} {bad[min(bad)]}")
    for index, reason in bad.items():
        _log.warning("prompt %d %s The others are %s.", index + 1, reason, others)


def writable(prompt: str) -> str:
    """The prompt with ? in place of what UTF-8 cannot write."""
    return prompt.encode(errors="replace").decode()
