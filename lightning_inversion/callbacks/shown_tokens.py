"""Tokens as a display shows them."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lightning_inversion.transformer.tokens import token_texts


def shown_tokens(tokenizer: PreTrainedTokenizerBase | None, ids: Sequence[int]) -> list[str]:
    """A piece of one line for each token of a text, as its row of results will have it.

    The first token of a character has all of it, the others have nothing; without a tokenizer the
    ids stand for themselves.
    """
    if tokenizer is None:
        return [f"[{token}]" for token in ids]
    texts = token_texts(tokenizer, ids)
    return [text.replace("\n", "\\n").replace("\r", "\\r") for text in texts]
