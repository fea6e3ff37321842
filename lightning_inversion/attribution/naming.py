"""The tokens that options name: the target, what it is compared with, the replacement."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_inversion.attribution.model import Reader
from lightning_inversion.errors import InputError
from lightning_inversion.transformer.tokens import token_text

_SPECIAL = ("pad", "eos", "unk", "bos")


@dataclass(frozen=True)
class Replacement:
    """What an occluded token becomes.

    Args:
        name: as it is said in the output.
        token: its id; None for the zero vector.
        note: what the user did not ask for, if anything.
    """

    name: str
    token: int | None
    note: str = ""

    def vector(self, reader: Reader) -> Tensor:
        """[D]."""
        vector = reader.embed(torch.tensor([self.token or 0]))[0]
        return torch.zeros_like(vector) if self.token is None else vector


def named_token(tokenizer: PreTrainedTokenizerBase, name: str, option: str) -> int:
    """The id of one token, given as its text or as id:NUMBER.

    Raises:
        InputError: it is not one token.
    """
    if name.startswith("id:"):
        number = name.removeprefix("id:")
        if not number.isdecimal() or int(number) >= len(tokenizer):
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
        f"--{option} {name!r} is {len(ids)} tokens ({parts}), and has to be one; "
        f"give one of them, mind the space at the beginning of a word."
    )


def replacement_for(tokenizer: PreTrainedTokenizerBase, name: str) -> Replacement:
    """What `name` means to this tokenizer.

    'pad', 'eos', 'unk', 'bos' fall back to the next of them that the tokenizer has, and say so.

    Raises:
        InputError: the tokenizer has none of them, or `name` is not one token.
    """
    if name == "zero":
        return Replacement("a zero vector", None)
    if name not in _SPECIAL:
        token = named_token(tokenizer, name, "replacement")
        return Replacement(repr(token_text(tokenizer, token)), token)
    for special in (name, *(other for other in _SPECIAL if other != name)):
        token = getattr(tokenizer, f"{special}_token_id")
        if token is not None:
            text = f"{special} {token_text(tokenizer, token)!r}"
            note = (
                "" if special == name else f"The tokenizer has no {name} token: {special} is used."
            )
            return Replacement(text, token, note)
    raise InputError(
        f"--replacement {name}: the tokenizer has none of {', '.join(_SPECIAL)}; "
        "give the text of a token, or zero."
    )
