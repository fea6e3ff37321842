"""The means of a run, and its table."""

from __future__ import annotations

import dataclasses

import pytest
import tokenizers
import transformers as hf
from tokenizers import models, normalizers, pre_tokenizers

from lightning_inversion.callbacks.summary import mean, print_rows
from lightning_inversion.results import ResultRow
from lightning_inversion.transformer.tokens import is_text_of


def fitted(index: int, right: bool) -> ResultRow:
    ids = [1, 2, 3][: 1 + index % 3]
    read = ids if right else [ids[0], *[9 for _ in ids[1:]]]
    return ResultRow(
        index=index, recovered=f"text {index}", verified=read == ids, verified_tokens=1,
        token_accuracy=1.0, iterations=5, ids=ids, recovered_ids=read,
        top_k_ids=[[token, 7] for token in read], token_states=["unresolved"] * len(ids),
    )  # fmt: skip


def test_prompts_of_unequal_length_count_alike() -> None:
    averages = mean([fitted(index, right=index != 1) for index in range(300)])
    assert averages["token_accuracy"] == pytest.approx((299 + 1 / 2) / 300)
    assert averages["top_k_accuracy"] == pytest.approx((299 + 1 / 2) / 300)
    assert averages["exact_match"] == pytest.approx(299 / 300)
    assert averages["iterations"] == 5


def test_a_runs_mean_is_the_mean_of_its_rows() -> None:
    rows = [
        ResultRow(
            index=0, ids=[1, 2], recovered_ids=recovered, top_k_ids=[[1, 9], [9, 2]],
            verified=exact, iterations=3, exact=exact, token_states=["unresolved"] * 2,
        )
        for recovered, exact in (([1, 2], True), ([1, 9], False), ([9, 9], False))
    ]  # fmt: skip
    rows.append(ResultRow(index=3, error="is empty; give it a text."))
    means = mean(rows)
    assert means["token_accuracy"] == pytest.approx(0.5)
    assert means["exact_match"] == pytest.approx(1 / 3)
    assert means["top_k_accuracy"] == pytest.approx(1)
    assert means["hamming"] == pytest.approx(0)
    assert means["verified"] == pytest.approx(1 / 3)
    assert mean(rows[3:]) == {}


def test_of_many_rows_the_doubtful_ones_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([fitted(index, right=index != 299) for index in range(300)])
    printed = capsys.readouterr().out
    assert "text 299" in printed
    assert "text 48 " in printed
    assert "text 49 " not in printed
    assert "... and 250 more, all of them verified" in printed
    assert "verified 0.997 of 300 prompts" in printed
    print_rows([fitted(index, right=index % 3 == 0) for index in range(90)])
    assert "... and 40 more, 10 of them not verified" in capsys.readouterr().out


def test_prompts_that_were_not_run_are_not_counted(capsys: pytest.CaptureFixture[str]) -> None:
    bad = ResultRow(index=1, command="predict", error="is empty; give it a text.")
    print_rows([fitted(0, right=True), bad])
    printed = capsys.readouterr().out
    assert "(not run: is empty; give it a text.)" in printed
    assert "verified 1.000 of 1 prompt; 1 not run" in printed


def test_a_tokenizer_that_loses_text_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [dataclasses.replace(fitted(index, True), exact=True) for index in range(3)]
    print_rows([dataclasses.replace(row, same_text=True) for row in rows])
    assert "loses text" not in capsys.readouterr().out
    print_rows([*rows[:2], dataclasses.replace(rows[2], same_text=False)])
    told = " ".join(capsys.readouterr().out.split())
    assert "of 1 prompts all tokens are right, and their text is not the prompt's" in told


@pytest.mark.parametrize(("text", "kept"), [("a b", True), ("A b", False), ("a c", False)])
def test_right_tokens_may_not_be_the_text(text: str, kept: bool) -> None:
    """Of a tokenizer that lower-cases, and has one token for all unknown words."""
    words = models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]")
    built = tokenizers.Tokenizer(words)
    built.normalizer = normalizers.Lowercase()
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=built, unk_token="[UNK]")
    assert is_text_of(tokenizer, tokenizer(text)["input_ids"], text) == kept
