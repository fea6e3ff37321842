"""Tokens as text, and texts as tokens."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lightning_inversion.errors import InputError
from lightning_inversion.files import visible

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token where it stands; joined, the text that all of them decode to.

    Where a character is split over several tokens, the first of them has all of it and the others
    have "": a character then begins at the token where it begins, and no text is lost. Tokens are
    decoded in context, because some tokenizers write a word differently at the start of a text.
    """
    texts = [""] * len(ids)
    start = 0
    for end in range(1, len(ids) + 1):
        context = max(0, start - 4)  # as much as decides how a token is written
        before = decoded(tokenizer, ids[context:start])
        text = decoded(tokenizer, ids[context:end])[len(before) :]
        # No character has more than four bytes: four unfinished tokens are not part of one.
        if text.endswith(_UNFINISHED) and end - start < 4 and end < len(ids):
            continue
        texts[start] = text
        start = end
    return texts


def shown_tokens(tokenizer: PreTrainedTokenizerBase | None, ids: Sequence[int]) -> list[str]:
    """As `token_texts`, in one line and `visible`; without a tokenizer, the ids in brackets."""
    if tokenizer is None:
        return [f"[{token}]" for token in ids]
    texts = token_texts(tokenizer, ids)
    return [visible(text.replace("\n", "\\n").replace("\r", "\\r")) for text in texts]


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The text of one token, decoded by itself."""
    return decoded(tokenizer, [token])


def named_token(tokenizer: PreTrainedTokenizerBase, name: str, option: str) -> int:
    """The id of one token.

    Args:
        tokenizer: of the model.
        name: the token's text, or id:NUMBER.
        option: the option of the command line that names it, for messages.

    Raises:
        InputError: the name is not that of one token.
    """
    if name.startswith("id:"):
        number = name.removeprefix("id:")
        if not number.isdecimal() or len(number) > 9 or int(number) >= len(tokenizer):
            raise InputError(
                f"--{option} {name!r} is not the id of a token; "
                f"give a number from id:0 to id:{len(tokenizer) - 1}."
            )
        return int(number)
    ids = tokenizer.encode(name, add_special_tokens=False)
    if len(ids) == 1:
        return int(ids[0])
    parts = ", ".join(repr(token_text(tokenizer, part)) for part in ids[:8])
    raise InputError(
        f"--{option} {name!r} is {len(ids)} tokens ({parts}), and must be one; "
        "give one of them, with the space at the beginning of a word."
    )


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of all tokens together; special tokens and spaces stay as they are."""
    text = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text
