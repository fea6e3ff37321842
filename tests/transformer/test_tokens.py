"""Token texts: whole characters, nothing lost; tokens that options name."""

from __future__ import annotations

import copy
import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from lightning_inversion.attribution.replacement import Replacement
from lightning_inversion.errors import InputError
from lightning_inversion.transformer.tokens import decoded, named_token, shown_tokens, token_texts
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


@pytest.fixture(scope="module")
def byte_fallback() -> PreTrainedTokenizerFast:
    """A tokenizer as Llama's and Gemma's: what is in no piece is written as bytes, `<0xE2>`."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abchTe.sky", "▁s"]
    vocabulary = {piece: token for token, piece in enumerate(dict.fromkeys(pieces))}
    model = models.BPE(vocabulary, [("▁", "s")], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


@pytest.mark.parametrize("text", ["The sky €a", "€€€€", "日本語の文", "👧👧日 b", "  a"])
def test_characters_written_as_bytes_are_whole(
    byte_fallback: PreTrainedTokenizerFast, text: str
) -> None:
    ids = byte_fallback(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(byte_fallback, ids)
    assert "".join(texts) == text
    characters = [character for character in text if ord(character) > 127]
    assert [piece for piece in texts if piece and ord(piece[-1]) > 127] == characters


def test_any_bytes_join_to_what_they_decode_to(byte_fallback: PreTrainedTokenizerFast) -> None:
    draw = random.Random(0)
    names = ["<0xE2>", "<0x82>", "<0xAC>", "<0xFF>", "<0xF0>", "<0x41>", "▁s", "a", "<s>"]
    tokens = byte_fallback.convert_tokens_to_ids(names)
    for _ in range(300):
        ids = draw.choices(tokens, k=draw.randint(1, 12))
        assert "".join(token_texts(byte_fallback, ids)) == decoded(byte_fallback, ids)


def test_shown_tokens_are_of_one_line(tokenizer: PreTrainedTokenizerFast) -> None:
    assert shown_tokens(tokenizer, tokenizer("a\n\r")["input_ids"]) == ["a", "\\n", "\\r"]
    assert shown_tokens(None, [7, 8]) == ["[7]", "[8]"]


@pytest.mark.parametrize("name", ["id:300", "id:-1", "id:" + "9" * 5000, "two words", "", "\udcff"])
def test_a_name_of_no_token_is_refused(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    assert named_token(tokenizer, "id:7", "token", 300) == 7
    with pytest.raises(InputError, match=r"^--token"):
        named_token(tokenizer, name, "token", 300)


@pytest.mark.parametrize("name", ["id:290", "<extra>"])
def test_a_token_beyond_the_embedding_is_refused(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["<extra>"])
    with pytest.raises(InputError, match=r"is not the id of|has embeddings for tokens 0 to"):
        named_token(larger, name, "token", 290)
    larger.pad_token = "<extra>"
    assert Replacement.named(larger, "pad", 290).token == larger.eos_token_id
