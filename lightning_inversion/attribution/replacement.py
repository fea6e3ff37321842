"""What an occluded token becomes, and where integrated gradients begin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_inversion.attribution.model import Reader
from lightning_inversion.errors import InputError
from lightning_inversion.transformer.tokens import named_token, token_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPECIAL = ("pad", "eos", "unk", "bos")


@dataclass(frozen=True)
class Replacement:
    """What an occluded token becomes.

    Args:
        name: in the output.
        token: its id; None for the zero vector.
        note: a fallback that was taken, or "".
    """

    name: str
    token: int | None
    note: str = ""

    @classmethod
    def named(cls, tokenizer: PreTrainedTokenizerBase, name: str, vocabulary: int) -> Replacement:
        """The replacement that an option names; 'pad', 'eos', 'unk', 'bos' fall back to each other.

        Args:
            tokenizer: of the model.
            name: one of these, 'zero', or that of a token.
            vocabulary: tokens that the model has embeddings for; a tokenizer may have more.

        Raises:
            InputError: the tokenizer has none of them, or `name` is not one token.
        """
        if name == "zero":
            return cls("a zero vector", None)
        if name not in _SPECIAL:
            token = named_token(tokenizer, name, "replacement", vocabulary)
            return cls(repr(token_text(tokenizer, token)), token)
        for special in (name, *(other for other in _SPECIAL if other != name)):
            token_or_none = getattr(tokenizer, f"{special}_token_id")
            if token_or_none is not None and token_or_none < vocabulary:
                note = f"The model has no {name} token: {special} is used."
                text = f"{special} {token_text(tokenizer, token_or_none)!r}"
                return cls(text, token_or_none, "" if special == name else note)
        raise InputError(
            f"--replacement {name}: the tokenizer has none of {', '.join(_SPECIAL)}; "
            "give the text of a token, or zero."
        )

    def vector(self, reader: Reader) -> Tensor:
        """The vector [D] that replaces a token's."""
        vector = reader.embed(torch.tensor([self.token or 0]))[0]
        return torch.zeros_like(vector) if self.token is None else vector
