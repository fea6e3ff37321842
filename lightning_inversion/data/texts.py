"""Prompts as text: files of them, and their tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_inversion.errors import InputError
from lightning_inversion.transformer.blocks import text_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_OTHER_FORMATS = (".json", ".csv", ".tsv")


def read_prompts(path: Path, option: str) -> list[str]:
    """The prompts of a text file (one a line) or a .jsonl file (key "prompt").

    Lines end at newlines alone; a byte-order mark at the beginning is dropped.

    Args:
        path: of the file; empty lines at its end do not count, others are empty prompts.
        option: of the command line that named it, for messages.

    Raises:
        InputError: names the option and the file, and the line where one is at fault.
    """
    where = f"{option} {str(path)!r}"
    kind = path.suffix.lower()
    if kind in _OTHER_FORMATS:
        raise InputError(
            f"{where} is a {kind} file; give a text file with one prompt a line, or a .jsonl file "
            'with a key "prompt".'
        )
    try:
        regular = path.is_file() or not path.exists()
        # A pipe is not opened: it may never end.
        lines = path.read_bytes().decode("utf-8-sig").split("\n") if regular else []
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"{where} cannot be read: {reason}.") from error
    if not regular:
        raise InputError(f"{where} is no regular file; give a text file or a .jsonl file.")
    lines = [line.removesuffix("\r") for line in lines]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise InputError(f"{where} holds no text.")
    if kind != ".jsonl":
        return lines
    return [_prompt_of(line, f"{where}, line {n}") for n, line in enumerate(lines, start=1)]


def _prompt_of(line: str, where: str) -> str:
    try:
        record = json.loads(line, object_pairs_hook=_without_repetition)
        prompt = record["prompt"]
    except InputError as error:
        raise InputError(f"{where} {error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f'{where} is not a JSON object with a key "prompt".') from error
    if not isinstance(prompt, str):
        raise InputError(f'{where}: "prompt" is {prompt!r}, not a string; quote it.')
    return prompt


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise InputError("has a key twice; leave one of them out.")
    return record


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
        """The limits in a model's configuration."""
        language = text_config(config)
        longest = getattr(language, "max_position_embeddings", None)
        longest = None if longest == -1 else longest  # XLNet has no limit
        named = (getattr(config, name, None) for name in _PLACEHOLDERS)
        placeholders = frozenset(token for token in named if isinstance(token, int))
        return cls(longest, language.vocab_size, placeholders)

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
    if not prompt:
        raise InputError("is empty; give it a text.")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise InputError("has half of a surrogate pair, which is no character; correct it.")
    ids = list(tokenizer(prompt, add_special_tokens=special_tokens)["input_ids"])
    if not ids:
        raise InputError("has no tokens; remove it.")
    limits.check(ids)
    return ids
