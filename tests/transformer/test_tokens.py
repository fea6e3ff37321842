"""Token texts: whole characters, nothing lost; tokens that options name."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from lightning_inversion.errors import InputError
from lightning_inversion.transformer.tokens import named_token, shown_tokens, token_texts
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.mark.parametrize("text", ["The sky is blue.", "Ça va 👩\u200d👧 très", "שלום\n\t👧"])
def test_texts_of_tokens_join_to_the_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert "".join(token_texts(tokenizer, tokenizer(text)["input_ids"])) == text


def test_the_first_token_of_a_character_has_all_of_it(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("é👧!")["input_ids"]
    assert token_texts(tokenizer, ids) == ["é", "", "👧", "", "", "", "!"]


def test_bytes_that_are_no_character_do_not_hold_back_what_follows(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    byte = tokenizer.convert_tokens_to_ids("ð")  # 0xf0, which begins a character of four bytes
    texts = token_texts(tokenizer, [byte] * 9)
    assert [position for position, text in enumerate(texts) if text] == [0, 4, 8]
    assert "".join(texts) == "\N{REPLACEMENT CHARACTER}" * 9


def test_shown_tokens_are_of_one_line(tokenizer: PreTrainedTokenizerFast) -> None:
    assert shown_tokens(tokenizer, tokenizer("a\n\r")["input_ids"]) == ["a", "\\n", "\\r"]
    assert shown_tokens(None, [7, 8]) == ["[7]", "[8]"]


@pytest.mark.parametrize("name", ["id:300", "id:-1", "id:" + "9" * 5000, "two words", ""])
def test_a_name_of_no_token_is_refused(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    assert named_token(tokenizer, "id:7", "token") == 7
    with pytest.raises(InputError, match=r"^--token"):
        named_token(tokenizer, name, "token")
