"""Tokens as text: each its own piece, whole characters together."""

from __future__ import annotations

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


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token where it stands; the first token of a character has all of it."""
    texts = [""] * len(ids)
    for piece in pieces(tokenizer, ids):
        texts[piece.tokens[0]] = piece.text
    return texts


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """One token alone."""
    return _decode(tokenizer, [token])


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of all tokens together."""
    text = tokenizer.decode(list(ids))
    assert isinstance(text, str)
    return text


def shown_tokens(tokenizer: PreTrainedTokenizerBase | None, ids: Sequence[int]) -> list[str]:
    """Each token in one line, as result rows have it; the ids themselves without a tokenizer."""
    if tokenizer is None:
        return [f"[{token}]" for token in ids]
    texts = token_texts(tokenizer, ids)
    return [text.replace("\n", "\\n").replace("\r", "\\r") for text in texts]
