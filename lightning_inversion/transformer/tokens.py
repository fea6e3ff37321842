"""Tokens as text, and texts as tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from lightning_inversion.errors import InputError
from lightning_inversion.files import visible

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_BYTE = re.compile("<0x[0-9A-F]{2}>")


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token where it stands; joined, the text that all of them decode to.

    Where a character is split over several tokens, the first of them has all of it and the others
    have "": a character then begins at the token where it begins, and no text is lost. Tokens are
    decoded in context, because some tokenizers write a word differently at the start of a text.
    """
    texts = [""] * len(ids)
    broken = _broken_bytes(tokenizer, ids)
    starts = [0]  # of the tokens that have a text: a context begins there, with a whole character
    for end in range(1, len(ids) + 1):
        start = starts[-1]
        if start in broken:
            texts[start] = _UNFINISHED
            starts.append(end)
            continue
        context = starts[max(0, len(starts) - 5)]  # as much as decides how a token is written
        before = decoded(tokenizer, ids[context:start])
        text = decoded(tokenizer, ids[context:end])[len(before) :]
        # No character has more than four bytes: four unfinished tokens are not part of one.
        unfinished = text.endswith(_UNFINISHED) and end - start < 4
        if unfinished and end < len(ids) and end not in broken:
            continue
        texts[start] = text
        starts.append(end)
    return texts


def _broken_bytes(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> set[int]:
    """Positions of single bytes (`<0xE2>`) in a run of them that is no UTF-8.

    Each of them is decoded to one replacement character, those of whole characters too.
    """
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    broken: set[int] = set()
    for is_byte, run in groupby(
        enumerate(pieces), key=lambda piece: bool(_BYTE.fullmatch(str(piece[1])))
    ):
        if is_byte:
            positions, names = zip(*run, strict=True)
            try:
                bytes(int(name[3:5], 16) for name in names).decode()
            except UnicodeDecodeError:
                broken.update(positions)
    return broken


def shown_tokens(tokenizer: PreTrainedTokenizerBase | None, ids: Sequence[int]) -> list[str]:
    """As `token_texts`, in one line and `visible`; without a tokenizer, the ids in brackets."""
    if tokenizer is None:
        return [f"[{token}]" for token in ids]
    texts = token_texts(tokenizer, ids)
    return [visible(text.replace("\n", "\\n").replace("\r", "\\r")) for text in texts]


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The text of one token, decoded by itself."""
    return decoded(tokenizer, [token])


def named_token(tokenizer: PreTrainedTokenizerBase, name: str, option: str, vocabulary: int) -> int:
    """The id of one token.

    Args:
        tokenizer: of the model.
        name: the token's text, or id:NUMBER.
        option: the option of the command line that names it, for messages.
        vocabulary: tokens that the model has embeddings for.

    Raises:
        InputError: the name is not that of one token, or the model has no such token.
    """
    if name.startswith("id:"):
        number = name.removeprefix("id:")
        known = min(len(tokenizer), vocabulary)
        if not number.isdecimal() or len(number) > 9 or int(number) >= known:
            raise InputError(
                f"--{option} {name!r} is not the id of a token; "
                f"give a number from id:0 to id:{known - 1}."
            )
        return int(number)
    if not is_text(name):
        raise InputError(f"--{option} {name!r} has a byte that is no UTF-8; correct it.")
    ids = tokenizer.encode(name, add_special_tokens=False)
    if len(ids) == 1 and ids[0] >= vocabulary:
        raise InputError(
            f"--{option} {name!r} is token {ids[0]}, and the model has embeddings for tokens 0 to "
            f"{vocabulary - 1}; give another."
        )
    if len(ids) == 1:
        return int(ids[0])
    parts = ", ".join(repr(token_text(tokenizer, part)) for part in ids[:8])
    raise InputError(
        f"--{option} {name!r} is {len(ids)} tokens ({parts}), and must be one; "
        "give one of them, with the space at the beginning of a word."
    )


def is_text(text: str) -> bool:
    """Whether a text can be tokenised: it has no half of a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of all tokens together; special tokens and spaces stay as they are."""
    text = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text


def is_text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str) -> bool:
    """Whether tokens decode to this text, with special tokens or without them.

    A tokenizer that lower-cases, or that has one token for all unknown words, loses text.
    """
    if decoded(tokenizer, ids) == text:
        return True
    plain = tokenizer.decode(
        list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return bool(plain == text)
