"""Axes become cells with names and arguments."""

import pytest

from lightning_inversion.errors import InputError
from lightning_inversion.sweep.grid import MAX_CELLS, Axis, Cell, cells_of, read_axis, split_values

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
    assert read_axis("schedule.every=0,5", KEYS).key == "schedule.every"


@pytest.mark.parametrize("text", ["depth", "=1", "depth=", "depth=1,,2"])
def test_an_axis_without_key_or_values_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not key=value,value"):
        read_axis(text, KEYS)


def test_the_product_with_seeds_outermost() -> None:
    axes = [Axis("model.transformer.depth", ("1", "2")), Axis("seed_everything", ("0", "1"))]
    cells = cells_of("fit", ["--data.file=p.txt"], axes)
    assert [cell.name for cell in cells] == [
        "depth=1,seed=0", "depth=2,seed=0", "depth=1,seed=1", "depth=2,seed=1",
    ]  # fmt: skip
    assert cells[1].arguments == (
        "--data.file=p.txt", "--seed_everything=0", "--model.transformer.depth=2",
    )  # fmt: skip
    assert cells[1].values == {"depth": "2", "seed": "0"}


def test_a_config_stands_before_the_options_beside_it() -> None:
    (cell,) = cells_of("fit", ["--model.iterations=5"], [Axis("config", ("a/b.yaml",))])
    assert cell.arguments == ("--config=a/b.yaml", "--model.iterations=5")
    assert cell.name == "config=b.yaml"


def test_names_are_plain_and_differ() -> None:
    values = ("0:72", "0-72", "a.b.Objective", "org/model", "ä[1,2]")
    names = [cell.name for cell in cells_of("fit", [], [Axis("model.x", values)])]
    assert names[0].startswith("x=0-72-")
    assert names[1].startswith("x=0-72-")
    assert names[2:4] == ["x=Objective", "x=model"]
    assert len(set(names)) == len(values)
    assert not any("/" in name or ":" in name for name in names)
    (long,) = cells_of("fit", [], [Axis("model.x", ("y" * 400,))])
    assert len(long.name) < 200


def test_what_stands_twice_is_refused() -> None:
    twice = Axis("model.transformer.depth", ("1", "1"))
    with pytest.raises(InputError, match=r"--over model.transformer.depth has 1 twice"):
        cells_of("fit", [], [twice])
    once = Axis("model.transformer.depth", ("1",))
    with pytest.raises(InputError, match=r"--over has model.transformer.depth twice"):
        cells_of("fit", [], [once, once])


def test_too_many_cells_are_refused_at_once() -> None:
    axes = [Axis(f"model.{key}", tuple(map(str, range(1000)))) for key in "abcd"]
    with pytest.raises(InputError, match=f"give {1000**4} cells; at most {MAX_CELLS}"):
        cells_of("fit", [], axes)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": "../../escape"}, "is not the name of a run"),
        ({"name": ".."}, "is not the name of a run"),
        ({"name": 3}, "cannot be read"),
        ({"command": "rm"}, "of fit or predict"),
        ({"arguments": None}, "cannot be read"),
        ({"values": None}, "is not the name of a run"),
        ({"more": 1}, "cannot be read"),
    ],
    ids=str,
)
def test_a_record_that_is_no_cell_is_refused(change: dict[str, object], reason: str) -> None:
    record = {"name": "x=1", "command": "fit", "arguments": ["--model.x=1"], "values": {"x": "1"}}
    assert Cell.from_record(record).arguments == ("--model.x=1",)
    with pytest.raises(ValueError, match=reason):
        Cell.from_record(record | change)
