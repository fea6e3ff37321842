"""Results -> figures: the lines that are drawn, and whether they can be read."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lightning_inversion.report import canvas, figures, layers
from lightning_inversion.report.figures import (
    draw,
    numeric_settings,
    points_along,
)
from lightning_inversion.report.load import load_results
from lightning_inversion.results import critical_width
from tests.report.rows import predicted, row, write_run


@pytest.fixture
def canvases(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The figures that a test draws, as matplotlib has them, by name; no file is made of them."""
    seen: dict[str, Any] = {}

    def kept(name: str, title: str, drawn: Any, style: Any = None, labels: Any = None) -> Any:
        if labels is not None:
            canvas.draw_legend(drawn, labels)
        seen[name] = drawn
        return canvas.RenderedFigure(name, title, b"", b"")

    monkeypatch.setattr(figures, "rendered", kept)
    monkeypatch.setattr(layers, "rendered", kept)
    return seen


def test_a_line_along_the_width_has_its_critical_width(
    tmp_path: Path, canvases: dict[str, Any]
) -> None:
    for width, right in ((72, 0.0), (144, 0.4), (288, 1.0), (432, 1.0)):
        rows = [row(i, right=right, features=f"0:{width}") for i in range(6)]
        write_run(tmp_path / str(width), rows)
    loaded = load_results([tmp_path])
    points, labels = points_along(loaded, "features")
    assert sorted(points["x"].unique()) == [72, 144, 288, 432]
    assert [*labels] == [""]
    assert numeric_settings(loaded.settings) == []
    draw(loaded)
    assert [*canvases] == ["bandwidth"]
    (number,) = (text.get_text() for text in canvases["bandwidth"].axes[0].texts)
    assert number == "288"


@pytest.mark.parametrize(
    ("means", "width"),
    [([0, 0.9, 1], 20), ([1, 0.5, 0.95], 30), ([1, 1, 0], None), ([1, 1, 1], 10)],
)
def test_the_critical_width_is_the_one_from_which_on_all_recover(means, width) -> None:
    assert critical_width(dict(zip([10, 20, 30], means, strict=True))) == width


@pytest.mark.usefixtures("canvases")
def test_any_numeric_setting_has_a_figure(tmp_path: Path) -> None:
    for limit, right in ((10, 0.0), (20, 1.0)):
        write_run(tmp_path / str(limit), [row(0, right=right, iterations_limit=limit)])
    loaded = load_results([tmp_path])
    assert numeric_settings(loaded.settings) == ["iterations_limit"]
    assert [figure.name for figure in draw(loaded)] == ["by_iterations_limit"]


@pytest.mark.usefixtures("canvases")
def test_a_key_of_a_config_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    for number in (1, 2):
        run = write_run(tmp_path / str(number), [row(0)])
        (run / "config.yaml").write_text(f"model: {{../../x: {number}}}")
    assert [figure.name for figure in draw(load_results([tmp_path]))] == ["by_______x"]


def test_lines_that_differ_in_other_settings_are_not_averaged(tmp_path: Path) -> None:
    for number, folder in enumerate(("x/a", "y/a")):
        for depth in (1, 2):
            run = write_run(tmp_path / folder / str(depth), [row(0, depth=depth, right=number)])
            (run / "config.yaml").write_text(f"model: {{objective: {{file: {folder}}}}}")
    points, labels = points_along(load_results([tmp_path]), "depth")
    assert [*labels] == ["file a (1)", "file a (2)"]
    assert [*points["token_accuracy"]] == [0, 0, 1, 1]


def test_a_legend_stays_within_its_figure(tmp_path: Path, canvases: dict[str, Any]) -> None:
    for number in range(5):
        for depth in (1, 2):
            policy = f"TokenRecovery({'+'.join(['LanguageModelPrior'] * (5 + number))})"
            rows = [predicted(i, depth=depth, policy=policy, dtype="many" * 9) for i in range(2)]
            write_run(tmp_path / f"{number}-{depth}", rows)
    draw(load_results([tmp_path]))
    assert set(canvases) == {"depth", "candidates"}
    for drawn in canvases.values():
        drawn.draw_without_rendering()
        (legend,) = drawn.legends
        box, page = legend.get_window_extent(), drawn.bbox
        assert page.x0 <= box.x0
        assert box.x1 <= page.x1
        assert page.y0 <= box.y0
        assert "many" not in legend.get_texts()[0].get_text()  # the same in all lines
        height = drawn.axes[0].get_window_extent().height / drawn.dpi
        assert height > 1, "the legend has taken the room of the axes"


def test_rows_that_ran_no_candidate_are_in_no_figure_of_candidates(
    tmp_path: Path, canvases: dict[str, Any]
) -> None:
    read = predicted(0, depth=2, policy="Reading")
    read["candidates"] = [0] * len(read["candidates"])
    write_run(tmp_path / "read", [read])
    draw(load_results([tmp_path]))
    assert "candidates" not in canvases
    write_run(tmp_path / "searched", [searched := predicted(1)])
    draw(load_results([tmp_path]))
    assert (
        f"n = {len(searched['candidates'])} tokens" in canvases["candidates"].axes[0].get_xlabel()
    )


def test_names_are_drawn_as_they_are(tmp_path: Path, canvases: dict[str, Any]) -> None:
    names = ["_hidden", "costs $5 and $6", r"a\$b", "rtl\u202e\x07"]
    for number, model in enumerate(names):
        for depth in (1, 2):
            run = tmp_path / f"{number}-{depth}"
            write_run(run, [predicted(0, depth=depth, model=model)])
    draw(load_results([tmp_path]))
    (legend,) = canvases["depth"].legends
    drawn = list(legend.get_texts())
    assert [text.get_text() for text in drawn] == [*names[:3], "rtl⟨U+202E⟩␇"]
    assert not any(text.get_parse_math() for text in drawn)


def test_more_lines_than_can_be_told_apart_are_counted(
    tmp_path: Path, canvases: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "MAX_LINES", 2)
    monkeypatch.setattr(canvas, "MAX_LINES", 2)
    for number in range(4):
        for width in (8, 16):
            run = tmp_path / f"{number}-{width}"
            write_run(run, [row(0, objective=f"L{number}", features=f"0:{width}")])
    draw(load_results([tmp_path]))
    texts = [text.get_text() for text in canvases["bandwidth"].legends[0].get_texts()]
    assert texts == ["L0", "L1 (and 2 more in the table)"]


def points(rows: str) -> pd.DataFrame:
    """A line of each word, a point of each digit of it, over the prompts in brackets' letters."""
    made = [
        (line, x, key)
        for line, word in enumerate(rows.split())
        for x, keys in enumerate(word.split("/"))
        for key in keys
    ]
    return pd.DataFrame(made, columns=["line", "x", "key"])


@pytest.mark.parametrize(
    ("rows", "left", "text"),
    [
        ("abc/ab abc/abc", 4 + 6, "n = 2 to 3 prompts"),
        ("ab/ab", 4, "n = 2 prompts"),
        ("a/ab", 2, "n = 1 prompt"),
        ("a/b", 2, "n = 1 prompt, others at each point"),
    ],
)
def test_a_line_is_of_the_prompts_that_its_points_share(rows: str, left: int, text: str) -> None:
    panel, said = figures.of_shared_prompts(points(rows))
    assert (len(panel), said) == (left, text)


def test_a_prompt_at_several_depths_has_a_picture(tmp_path: Path, canvases: dict[str, Any]) -> None:
    for depth, right in ((1, 1.0), (4, 0.5), (8, 0.0)):
        for objective, factor in (("L1", 0.0), ("Standardized", 1.0)):
            rows = [row(i, depth=depth, right=right * factor, objective=objective, prompt=f"p{i}")
                    for i in range(2)]  # fmt: skip
            write_run(tmp_path / f"{objective}-{depth}", rows)
    shown = layers.rows_by_depth(load_results([tmp_path]))
    assert [*shown] == [1, 4, 8]
    assert {made.key for made in shown.values()} == {"p0"}
    assert [set(shown[1].marks), set(shown[8].marks)] == [{"v"}, {"w"}]  # of the better objective
    draw(load_results([tmp_path]))
    drawn = canvases["layers"]
    assert [label.get_text() for label in drawn.axes[0].get_xticklabels()] == ["1", "4", "8"]
    assert drawn.legends[0].get_texts()[0].get_text() == "verified"


def test_panels_have_the_size_asked_for_and_lie_one_below_the_other_on_a_narrow_screen() -> None:
    style = canvas.FigureStyle(5, 2, 12)
    drawn = style.canvas(3)
    for number in (1, 2, 3):
        drawn.add_subplot(1, 3, number)
    figure = canvas.rendered("x", "X", drawn, style, pd.Series(dtype=object))
    assert b'width="1108.8pt" height="144pt"' in figure.svg
    assert b'width="388.8pt" height="432pt"' in figure.narrow
    assert figure.narrow_source.startswith("data:image/svg+xml")


def test_axes_can_be_read(runs: Path, canvases: dict[str, Any]) -> None:
    draw(load_results([runs]))
    for axes in (*canvases["depth"].axes, *canvases["candidates"].axes):
        assert axes.get_ylim() == pytest.approx((-0.05, 1.05))
    canvases["candidates"].draw_without_rendering()
    ticks = [label.get_text() for label in canvases["candidates"].axes[0].get_xticklabels()]
    assert {"1", "10"} <= set(ticks)
    assert all(float(tick) for tick in ticks)


def test_what_runs_logged_is_drawn_as_the_median_run(
    tmp_path: Path, canvases: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, [row(0)])
    loaded = load_results([tmp_path])
    rows = [(0, "distance", step, v / (1 + step)) for step in (0, 10) for v in (1.0, 2.0, 9.0)]
    columns = ["experiment", "curve", "step", "value"]
    monkeypatch.setattr(figures, "load_curves", lambda _: pd.DataFrame(rows, columns=columns))
    draw(loaded)
    (axes,) = canvases["iterations"].axes
    assert [*axes.lines[0].get_ydata()] == pytest.approx([2, 2 / 11])


def test_a_curve_is_read_from_event_files_and_a_resumed_run_replaces_its_steps(
    tmp_path: Path,
) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    write_run(tmp_path, [row(0)])
    for suffix, points in ((".a", {0: 4.0, 10: 3.0}), (".b", {10: 2.0, 20: 1.0})):
        writer = EventFileWriter(str(tmp_path), filename_suffix=suffix)
        for step, value in points.items():
            for tag in ("match/distance", "other"):
                made = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
                writer.add_event(Event(step=step, summary=made))
        writer.close()
    curves = figures.load_curves(load_results([tmp_path]).results)
    assert [*curves.itertuples(index=False, name=None)] == [
        (0, "distance", 0, 4.0),
        (0, "distance", 10, 2.0),
        (0, "distance", 20, 1.0),
    ]


def test_a_rendered_figure_is_the_same_file_each_time(tmp_path: Path) -> None:
    loaded = load_results([write_run(tmp_path, [predicted(0)])])
    once, again = (draw(loaded) for _ in range(2))
    assert once == again
    assert once[0].png.startswith(b"\x89PNG")
