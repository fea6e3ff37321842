"""Results -> the table: its numbers are those of the rows."""

import json
import math
from pathlib import Path

import pytest

from lightning_inversion.report.labels import labels_of
from lightning_inversion.report.load import load_results
from lightning_inversion.report.tables import (
    as_json,
    interval,
    markdown,
    summarize,
)
from tests.report.rows import row, write_run


def test_the_tables_hold_the_numbers_of_the_rows(runs: Path) -> None:
    table = summarize(load_results([runs]))
    lines = json.loads(as_json(table))
    assert [(line["command"], line["depth"]) for line in lines] == [
        ("fit", 1),
        ("fit", 4),
        ("predict", 4),
    ]
    rows = [json.loads(line) for path in (runs / "4-0", runs / "4-1")
            for line in (path / "results.jsonl").read_text().splitlines()]  # fmt: skip
    deep = lines[1]
    mean = sum(made["token_accuracy"] for made in rows) / len(rows)
    assert deep["tokens right"] == pytest.approx(mean)
    assert deep["tokens right low"] < mean < deep["tokens right high"]
    verified = sum(made["verified_tokens"] / 6 for made in rows) / len(rows)
    assert deep["verified"] == pytest.approx(verified)
    assert (deep["seeds"], deep["verified and wrong"]) == (2, 0)
    text = markdown(table).splitlines()
    assert len(text) == 2 + 3
    assert len({line.count("|") for line in text}) == 1
    assert "1.000 |" in text[2]


def test_the_interval_is_of_other_prompts_not_of_other_seeds(tmp_path: Path) -> None:
    """It must not shrink because the same prompts ran with more seeds."""

    def width(seeds: int) -> float:
        rows = [row(i, seed=s, prompt=f"p{i}", token_accuracy=float(i % 2))
                for i in range(10) for s in range(seeds)]  # fmt: skip
        folder = write_run(tmp_path / str(seeds), rows)
        (line,) = summarize(load_results([folder])).to_dict("records")
        assert (line["tokens right"], line["prompts"], line["seeds"]) == (0.5, 10, seeds)
        return float(line["tokens right high"] - line["tokens right low"])

    assert width(1) == pytest.approx(width(8))
    assert 0.3 < width(1) < 0.9  # a binomial of 10 has 0.6


def test_an_interval_needs_values_that_differ() -> None:
    assert interval([0.5, 0.5, math.nan]) == (0.5, 0.5)
    assert all(map(math.isnan, interval([math.nan])))


def test_what_was_measured_stands_before_the_settings(tmp_path: Path) -> None:
    for objective in ("L1", "L2"):
        write_run(tmp_path / objective, [row(0, objective=objective)])
        write_run(tmp_path / f"{objective}-2", [row(0, objective=objective, depth=2)])
    head = [*summarize(load_results([tmp_path]))]
    assert head.index("depth") < head.index("tokens right") < head.index("objective")


def test_the_seconds_of_a_fit_are_those_of_its_batch(runs: Path) -> None:
    for line in json.loads(as_json(summarize(load_results([runs])))):
        of_batch = line["command"] == "fit"
        assert line["seconds (batch, median)"] == (1.25 if of_batch else None)
        assert line["seconds (median)"] == (None if of_batch else 1.25)


def test_names_cannot_break_a_table(tmp_path: Path) -> None:
    for number, model in enumerate(("a|b\n\x1b[31m", "$x$\u202e")):
        write_run(tmp_path / str(number), [row(0, model=model)])
    table = summarize(load_results([tmp_path]))
    assert [line.split(" | ")[0] for line in markdown(table).splitlines()[2:]] == [
        "| a\\|b↵␛[31m",
        "| $x$⟨U+202E⟩",
    ]


def test_a_label_has_numbers_whole_and_classes_short(tmp_path: Path) -> None:
    for rate in (0.25, 0.5):
        folder = write_run(tmp_path / str(rate), [row(0)])
        (folder / "config.yaml").write_text(f"model: {{optimizer: {{lr: {rate}}}}}")
    assert [*labels_of(load_results([tmp_path]).settings)] == ["lr 0.25", "lr 0.5"]
