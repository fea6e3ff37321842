"""Axes become cells with names and arguments; times are guessed from the nearest cells."""

import pytest

from lightning_inversion.errors import InputError
from lightning_inversion.sweep.estimate import estimate, in_words, total
from lightning_inversion.sweep.grid import Axis, Part, cells_of, read_axis, split_values

KEYS = frozenset({"transformer", "objective", "iterations"})


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("1,2,4", ["1", "2", "4"]),
        ("[1,2],[1,2,3]", ["[1,2]", "[1,2,3]"]),
        ('"a,b",c', ['"a,b"', "c"]),
        ('["it, is","so"]', ['["it, is","so"]']),
        ("0:72, 0:144", ["0:72", "0:144"]),
    ],
)
def test_commas_in_brackets_and_quotes_belong_to_a_value(text: str, pieces: list[str]) -> None:
    assert split_values(text) == pieces


def test_model_may_be_left_out() -> None:
    assert read_axis("transformer.depth=1,2", KEYS) == Axis("model.transformer.depth", ("1", "2"))
    assert read_axis("model.objective=L1", KEYS).key == "model.objective"
    assert read_axis("token_by_token.every=0,5", KEYS).key == "token_by_token.every"


@pytest.mark.parametrize("text", ["depth", "=1", "depth=", "depth=1,,2"])
def test_an_axis_without_key_or_values_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not key=value,value"):
        read_axis(text, KEYS)


def test_the_product_with_seeds_outermost() -> None:
    part = Part(
        "fit",
        ("--data.file=p.txt",),
        (Axis("model.transformer.depth", ("1", "2")), Axis("seed_everything", ("0", "1"))),
    )
    cells = cells_of([part])
    assert [cell.name for cell in cells] == [
        "depth=1,seed=0", "depth=2,seed=0", "depth=1,seed=1", "depth=2,seed=1",
    ]  # fmt: skip
    assert cells[1].arguments == (
        "--data.file=p.txt", "--seed_everything=0", "--model.transformer.depth=2",
    )  # fmt: skip
    assert cells[1].values == {"depth": "2", "seed": "0"}


def test_a_config_stands_before_the_options_beside_it() -> None:
    (cell,) = cells_of([Part("fit", ("--model.iterations=5",), (Axis("config", ("a/b.yaml",)),))])
    assert cell.arguments == ("--config=a/b.yaml", "--model.iterations=5")
    assert cell.name == "config=b.yaml"


def test_names_are_plain_and_differ() -> None:
    values = ("0:72", "0-72", "a.b.Objective", "org/model", "ä[1,2]")
    names = [cell.name for cell in cells_of([Part("fit", (), (Axis("model.x", values),))])]
    assert names[0].startswith("x=0-72-")
    assert names[1].startswith("x=0-72-")
    assert names[2:4] == ["x=Objective", "x=model"]
    assert len(set(names)) == len(values)
    assert not any("/" in name or ":" in name for name in names)
    (long,) = cells_of([Part("fit", (), (Axis("model.x", ("y" * 400,)),))])
    assert len(long.name) < 200


def test_what_stands_twice_is_refused() -> None:
    twice = Axis("model.transformer.depth", ("1", "1"))
    with pytest.raises(InputError, match=r"--over model.transformer.depth has 1 twice"):
        Part("fit", (), (twice,)).cells()
    once = Axis("model.transformer.depth", ("1",))
    with pytest.raises(InputError, match=r"--over has model.transformer.depth twice"):
        Part("fit", (), (once, once)).cells()


def test_parts_have_names_of_their_own() -> None:
    axis = (Axis("model.transformer.depth", ("1",)),)
    cells = cells_of([Part("fit", (), axis, "gradient"), Part("predict", (), axis, "exact")])
    assert [cell.name for cell in cells] == ["gradient-depth=1", "exact-depth=1"]
    assert cells[0].values["part"] == "gradient"


def test_time_is_guessed_from_the_cells_most_alike() -> None:
    depths = Axis("model.transformer.depth", ("1", "3"))
    objectives = Axis("model.objective", ("L1", "L2"))
    l1, l2, l1_deep, l2_deep = cells_of([Part("fit", (), (depths, objectives))])
    timed = [(l1, 10.0), (l2, 30.0)]
    assert estimate(l1, timed) == 10
    assert estimate(l1_deep, timed) == 20  # (1 + 3) / (1 + 1) of the shallow one
    assert total([l1_deep, l2_deep], timed) == 80
    assert total([l1_deep, l2_deep], timed, processes=2) == 40
    assert estimate(l1, []) is None
    assert total([l1, l2], []) is None
    (predicted,) = cells_of([Part("predict", (), (Axis("model.transformer.depth", ("1",)),))])
    assert estimate(predicted, timed) is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "not known"),
        (0.2, "about 1 s"),
        (89, "about 89 s"),
        (90, "about 2 min"),
        (600, "10 min"),
        (7200, "2.0 h"),
    ],
)
def test_time_in_words(seconds: float | None, words: str) -> None:
    assert words in in_words(seconds)
