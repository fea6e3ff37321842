"""Tokens as text: each its own piece, whole characters together, and nothing invisible."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Piece:
    """A stretch of text, and the tokens it is made of: several where a character needs several.

    Args:
        text: as it reads; the pieces of a text joined are what its tokens decode to.
        tokens: their positions, consecutive.
    """

    text: str
    tokens: tuple[int, ...]


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[Piece]:
    """Cut a text at the tokens whose ends are also ends of characters.

    Tokens are decoded where they stand: some tokenizers write a word differently at the start of a
    text, and an emoji of three tokens is no character before the third.
    """
    found: list[Piece] = []
    start = 0
    for end in range(1, len(ids) + 1):
        context = max(0, start - 4)  # as much as decides how a piece is written
        before = _decode(tokenizer, ids[context:start])
        text = _decode(tokenizer, ids[context:end])[len(before) :]
        # No character has more than four bytes, so four unfinished tokens are simply no text.
        if text.endswith(_UNFINISHED) and end - start < 4 and end < len(ids):
            continue
        found.append(Piece(text, tuple(range(start, end))))
        start = end
    return found


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """One token alone."""
    return _decode(tokenizer, [token])


def visible(text: str) -> str:
    """`text` with a mark for each character that has no shape or would rearrange the rest.

    A line break is marked and kept; joiners and variation selectors, which belong to an emoji or a
    script, stay.
    """
    return "".join(_visible(character) for character in text)


def one_line(text: str) -> str:
    """As `visible`, in one line, spaces marked too: for tables and lists of tokens."""
    return visible(text).replace("\n", "").replace(" ", "·")


def _visible(character: str) -> str:
    if character == "\n":
        return "↵\n"
    if character == "\t":
        return "⇥\t"
    if character in "\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}":
        return character
    if ord(character) < 32:
        return chr(0x2400 + ord(character))
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and not (
        0xE0020 <= ord(character) <= 0xE007F  # the tags of flags
    ):
        return f"⟨U+{ord(character):04X}⟩"
    return character
