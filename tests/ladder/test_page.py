"""The ladder's tables and figures, from rows."""

import json
from pathlib import Path

import pandas as pd
import pytest

from lightning_inversion.ladder.frames import frame_of
from lightning_inversion.ladder.intervals import t_interval
from lightning_inversion.ladder.intervention_tables import (
    by_width_table,
    effects,
    gain_table,
    intervention_table,
    room_bins_table,
    room_ranks_table,
    size_table,
)
from lightning_inversion.ladder.page import (
    channel_table,
    rate_table,
    room_table,
    tables_of,
    training_table,
    write,
)
from lightning_inversion.replication.tables import fill

CONFIGS = Path(__file__).parents[2] / "configs"
RUNG = {"shape": "gpt2", "width": 64, "blocks": 2, "vocabulary": 1024}
NUMBERS = (
    "tuned_nearest", "probe_top1", "probe_read_bits", "recovery_right", "recovery_verified",
    "loss", "nearest_wrong", "embedding_condition", "anisotropy", "row_norm_variation",
    "block_gain", "massive_first", "massive_later", "jacobian_largest_later",
    "jacobian_median_later", "jacobian_condition_later", "probe_bits", "theory_right", "from_mean",
    "tuned_room", "tuned_direction", "tuned_nearest_direction", "tuned_by_direction",
    "tuned_in_64", "tuned_far_apart", "tuned_as_few", "tuned_random_error",
)  # fmt: skip


def row(index: int, seed: int, share: float, tuned: float, **more: object) -> dict[str, object]:
    numbers = dict.fromkeys(NUMBERS, 0.5 + index / 100)
    return {"index": index, "model": f"gpt2-w64-b2-v1024-s{seed}", **RUNG, "seed": seed,
            "share": share, "rate": 1.0, "learning_rate": 0.006, "depth": 1,
            "printed": tuned, "tuned": tuned, "recovery_false": 0,
            "printed_step": 0.1, **numbers, "tuned_step": 1 / (index + 2), **more}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rows of three seeds, by whose blocks half of the effect of training is restored."""
    ends = [(seed, share) for seed in range(3) for share in (0.0, 1.0)]
    cells = [row(n, seed, share, 0.9 - 0.8 * share + seed / 100, block_gain=0.5 + 9 * share + n/99)
             for n, (seed, share) in enumerate(ends)]  # fmt: skip
    changes = [
        row(2 * n + k, seed, share, value, intervention=name, block_gain=2.0)
        for n, (seed, share) in enumerate(ends)
        for k, (name, value) in enumerate(
            (("none", 0.9 - 0.8 * share), ("blocks of the other size", 0.5)))
    ]  # fmt: skip
    kept = {8: 0.0, 16: 0.3, 32: 0.5, 64: 0.6}
    channel = [row(n, 0, 1.0, right, kept=few) for n, (few, right) in enumerate(kept.items())]
    survival = [row(0, 0, 1.0, 0.5, channel="whole")]
    for name, rows in (("cells", cells), ("interventions", changes), ("channel", channel),
                       ("survival", survival)):  # fmt: skip
        text = "".join(json.dumps(one) + "\n" for one in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def test_intervals_are_students() -> None:
    low, high = t_interval([0.4, 0.5, 0.6])
    half = 4.302653 * 0.1 / 3**0.5
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half))
    assert t_interval([0.9, 1.0])[1] == 1.0


def test_effects_are_shares_of_the_difference(folder: Path) -> None:
    cells = frame_of(folder / "cells.jsonl")
    assert training_table(cells).count("apart") == 2  # printed and tuned; nearest is the same
    shares = effects(frame_of(folder / "interventions.jsonl"))
    assert len(shares) == 3
    assert shares["restored"].to_list() == pytest.approx([0.4] * 3)
    assert shares["removed"].to_list() == pytest.approx([0.4] * 3)
    assert shares["effect"].to_list() == pytest.approx([0.8] * 3)
    rows = frame_of(folder / "interventions.jsonl")
    table = intervention_table(rows, shares)
    assert "| blocks of the other size | 3 | 0.50 | 0.50 | 0.50 |  | 0.50 | 0.50 |" in table
    assert "| recipe | 0.60 | 16 | 16 | 64 |" in channel_table(frame_of(folder / "channel.jsonl"))


def test_the_size_of_the_blocks_has_tables(folder: Path) -> None:
    cells, rows = (frame_of(folder / f"{name}.jsonl") for name in ("cells", "interventions"))
    by_width = by_width_table(rows)
    assert "| trained | none | 0.10 |" in by_width
    assert "| trained | blocks of the other size | 0.50 [+0.40, +0.40] |" in by_width
    assert "| untrained | blocks of the other size | 0.50 [-0.40, -0.40] |" in by_width
    line = size_table(cells, rows).splitlines()[-1].split(" | ")
    assert line[1] == "0.5"
    assert line[3:5] == ["", "0.50 [0.50, 0.50]"]  # no row of the blocks times 0.35
    lines = gain_table(cells, rows).splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == ["3 (0)", "6 (3)", "3 (3)", "0 (0)"]
    assert "| 1 to 3 | 6 (3) | 0.50 [0.50, 0.50] |" in lines[1]


def test_the_room_has_a_table(folder: Path) -> None:
    lines = room_table(frame_of(folder / "cells.jsonl")).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| GPT-2, V 1024, 0% | 64 | 0.52 | 0.52 | 0.52 [")


def test_what_is_read_is_told_by_the_room(folder: Path) -> None:
    cells, rows = (frame_of(folder / f"{name}.jsonl") for name in ("cells", "interventions"))
    cells["tuned_room"], rows["tuned_room"] = -0.5, 3.5
    lines = [line.split(" | ") for line in room_bins_table(cells, rows).splitlines()[2:]]
    assert lines[0][:2] == ["| at most 1", "6 (3)"]
    assert lines[3][:2] == ["| 3 to 4", "6 (3)"]  # the rows without a change are cells' own
    assert all(line[1] == "0 (0)" for line in lines[1:3] + lines[4:])


def test_what_goes_with_the_room_is_ranked(folder: Path) -> None:
    cells, rows = (frame_of(folder / f"{name}.jsonl") for name in ("cells", "interventions"))
    cells["tuned_direction"] = -cells["block_gain"]
    lines = [line.split(" | ") for line in room_ranks_table(cells, rows).splitlines()[2:]]
    assert [line[1] for line in lines] == ["12", "3", "3", "3"]
    assert lines[1][2:] == ["+1.00", "+1.00", "-1.00 |"]


def test_rates_have_a_table_and_no_place_in_the_others(folder: Path) -> None:
    with (folder / "cells.jsonl").open("a", encoding="utf-8") as file:
        for seed in range(3):
            slow = row(6 + seed, seed, 1.0, 0.7, rate=0.5, learning_rate=0.003)
            file.write(json.dumps({**slow, "model": f"{slow['model']}-r0.5"}) + "\n")
    lines = rate_table(frame_of(folder / "cells.jsonl")).splitlines()[2:]
    assert [line.split(" | ")[2] for line in lines] == ["0.003", "0.006 (the plan's)"]
    assert "0.91 [0.89, 0.93] | 0.70 [0.70, 0.70]" in lines[0]
    tables = tables_of(folder)
    assert tables["rate ranks"].splitlines()[0] == "| suspect | all rates (6) | the plan's (3) |"
    assert "| learning rate | -0.93 |" in tables["rate ranks"]  # the slower ones are read better
    assert "0.70" not in tables["training"] + tables["width"] + tables["sizes"]
    assert sum(int(line.split(" | ")[1].split()[0])
               for line in tables["room bins"].splitlines()[2:]) == 6 + 6 + 3  # fmt: skip


def test_a_model_without_an_effect_has_no_share() -> None:
    rows = [row(n, 0, share, 0.5, intervention="none") for n, share in enumerate((0.0, 1.0))]
    assert effects(pd.DataFrame(rows)).empty


def test_the_page_and_its_figures_are_written(folder: Path) -> None:
    names = (
        "training",
        "readers",
        "width",
        "slopes",
        "suspects",
        "room",
        "room bins",
        "room ranks",
        "rates",
        "rate ranks",
        "interventions",
        "interventions by width",
        "sizes",
        "gain",
        "channel",
        "survival",
    )
    page = folder / "LADDER.md"
    page.write_text("\n".join(f"<!-- rows: {name} -->\n<!-- end -->" for name in names))
    (folder / "images").mkdir()
    written = write(folder, page)
    assert [path.name for path in written] == [
        "LADDER.md", "ladder-training.png", "ladder-width.png", "ladder-mechanism.png",
        "ladder-interventions.png", "ladder-gain.png", "ladder-rates.png",
        "ladder-room.png", "ladder-channel.png",
    ]  # fmt: skip
    assert all(path.stat().st_size > 100 for path in written)
    assert "GPT-2 64, 2 blocks, V 1024" in page.read_text()


def test_the_committed_page_is_rebuilt_from_the_rows() -> None:
    page = CONFIGS / "LADDER.md"
    assert fill(page.read_text("utf-8"), tables_of(CONFIGS / "ladder")) == page.read_text("utf-8")
