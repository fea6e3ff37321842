"""Options: their contradictions, the preset, and the command line that repeats them."""

from __future__ import annotations

import shlex

import pytest

from lightning_inversion.attribution.config import Choices, Display, command_line, with_preset
from lightning_inversion.errors import InputError


@pytest.mark.parametrize(
    ("choices", "option"),
    [
        ({"weight": 1.5}, "--weight"),
        ({"steps": 0}, "--steps"),
        ({"batch_size": 0}, "--batch_size"),
        ({"depth": 2, "token": "s"}, "--token"),
        ({"depth": 2, "method": "integrated"}, "--method"),
        ({"depth": 2, "distance": "l1_probs"}, "--distance"),
        ({"depth": 2, "scalar": "prob"}, "--scalar"),
        ({"distance": "relative_features"}, "--depth"),
        ({"token": "s", "every_token": True}, "--every_token"),
        ({"token": "s", "scalar": "sum_logits"}, "--token"),
        ({"token": "s", "method": "occlusion", "distance": "l1_logits"}, "--token"),
        ({"against": "e", "scalar": "sum_logits"}, "--against"),
    ],
)
def test_contradictions_name_the_option(choices: dict[str, object], option: str) -> None:
    with pytest.raises(InputError, match=option):
        Choices(**choices)


def test_a_preset_cannot_be_contradicted() -> None:
    with pytest.raises(InputError, match="--scalar prob contradicts --preset original"):
        with_preset("original", Choices(scalar="prob"), Display())
    choices, _ = with_preset("original", Choices(method="gradient"), Display())
    assert choices.method == "gradient"


def test_signed_sums_are_the_default_where_they_mean_something() -> None:
    assert Choices().reduction == "l1"
    assert Choices(method="integrated").reduction == "sum"
    assert Choices(depth=2).reduction == "sum"
    assert Choices(depth=2, reduce="l2").reduction == "l2"


def test_the_command_line_gives_the_text_back() -> None:
    text = "it's <b> $HOME & `x`"
    words = shlex.split(
        command_line(text, Choices(against=" s"), Display(), None, {"model": "a b"})
    )
    assert words[-1] == text
    assert "--against= s" in words
    assert "--model=a b" in words
    hidden = command_line("a\n'\u202e", Choices(), Display(), None, {})
    assert hidden.endswith(r"$'a\n\'\U0000202E'")
    assert command_line("-x", Choices(), Display(), None, {}).endswith(" -- -x")


@pytest.mark.parametrize("text", ["a" * 501, "a\0", "-"])
def test_a_text_that_is_no_argument_is_read_from_a_file(text: str) -> None:
    assert command_line(text, Choices(), Display(), None, {}).endswith(" - < text.txt")
