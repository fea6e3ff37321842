"""Rows -> table, figures, page: the numbers are those of the rows, and all is escaped."""

import csv
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lightning_inversion.errors import InputError
from lightning_inversion.report import figures
from lightning_inversion.report.command import run
from lightning_inversion.report.curves import curves_along, label_of, numeric_settings, width_of
from lightning_inversion.report.figures import _critical, draw
from lightning_inversion.report.load import Reading, read
from lightning_inversion.report.page import findings, page
from lightning_inversion.report.statistics import grouped, mean_of
from lightning_inversion.report.tables import Line, as_json, comma_separated, lines_of, markdown
from tests.report.rows import WORDS, predicted, row, write_run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two depths by two seeds of fit, worse below, and one depth of predict."""
    for depth, right in ((1, 1.0), (4, 0.5)):
        for seed in (0, 1):
            rows = [row(i, depth=depth, seed=seed, right=right) for i in range(8)]
            write_run(tmp_path / "runs" / f"{depth}-{seed}", rows)
    write_run(tmp_path / "runs" / "p", [predicted(i, depth=4) for i in range(8)])
    return tmp_path / "runs"


def test_the_tables_say_what_the_rows_say(runs: Path) -> None:
    table = lines_of(grouped(read([runs]).results))
    lines = list(csv.DictReader(io.StringIO(comma_separated(table))))
    assert len(lines) == 3
    rows = [json.loads(line) for path in (runs / "4-0", runs / "4-1")
            for line in (path / "results.jsonl").read_text().splitlines()]  # fmt: skip
    (deep,) = [line for line in lines if (line["depth"], line["command"]) == ("4", "fit")]
    mean = sum(made["token_accuracy"] for made in rows) / len(rows)
    assert float(deep["tokens right"]) == pytest.approx(mean)
    assert float(deep["tokens right low"]) < mean < float(deep["tokens right high"])
    verified = sum(made["verified_tokens"] / 6 for made in rows) / len(rows)
    assert float(deep["verified"]) == pytest.approx(verified)
    assert (deep["seeds"], deep["verified and wrong"]) == ("2", "0")
    assert [line["tokens right"] for line in json.loads(as_json(table))] == [
        pytest.approx(float(line["tokens right"])) for line in lines
    ]
    text = markdown(table).splitlines()
    assert len(text) == 2 + 3
    assert len({line.count("|") for line in text}) == 1


def test_prompts_are_drawn_with_all_their_seeds(tmp_path: Path) -> None:
    """The interval must not shrink because the same prompts ran with more seeds."""

    def width(seeds: int) -> float:
        rows = [row(i, seed=s, prompt=f"p{i}", token_accuracy=float(i % 2))
                for i in range(10) for s in range(seeds)]  # fmt: skip
        folder = write_run(tmp_path / str(seeds), rows)
        mean = mean_of(read([folder]).results, lambda r: r.token_accuracy)
        assert mean is not None
        assert mean.value == 0.5
        return mean.high - mean.low

    assert width(1) == pytest.approx(width(8))
    assert 0.3 < width(1) < 0.9  # a binomial of 10 has 0.6


def test_curves_and_the_critical_width(tmp_path: Path) -> None:
    for width, right in ((72, 0.0), (144, 0.4), (288, 1.0), (432, 1.0)):
        rows = [row(i, right=right, features=f"0:{width}") for i in range(6)]
        write_run(tmp_path / str(width), rows)
    results = read([tmp_path]).results
    (curve,) = curves_along(results, "features", lambda r: r.token_accuracy, width_of)
    assert curve.x == (72, 144, 288, 432)
    assert curve.means[-1].value == 1
    assert numeric_settings(results) == []
    assert _critical([curve]) == (288,)


@pytest.fixture
def canvases(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The figures that a test draws, as matplotlib has them, by name; no file is made of them."""
    seen: dict[str, Any] = {}

    def kept(name: str, title: str, canvas: Any) -> figures.Figure:
        canvas.draw_without_rendering()
        seen[name] = canvas
        return figures.Figure(name, title, b"", b"")

    monkeypatch.setattr(figures, "_drawn", kept)
    return seen


@pytest.mark.usefixtures("canvases")
def test_any_numeric_setting_has_a_curve(tmp_path: Path) -> None:
    for noise, right in ((0.0, 1.0), (0.1, 0.6), (0.5, 0.0)):
        rows = [row(i, right=right, noise=noise) for i in range(6)]
        write_run(tmp_path / str(noise), rows)
    reading = read([tmp_path])
    assert numeric_settings(reading.results) == ["noise"]
    assert [figure.name for figure in draw(reading)] == ["by_noise"]


def test_what_came_of_a_run_stands_before_its_settings(tmp_path: Path) -> None:
    for objective in ("L1", "L2"):
        write_run(tmp_path / objective, [row(0, objective=objective)])
        write_run(tmp_path / f"{objective}-2", [row(0, objective=objective, depth=2)])
    head = list(lines_of(grouped(read([tmp_path]).results))[0])
    assert head.index("depth") < head.index("tokens right") < head.index("objective")


def test_the_seconds_of_a_fit_are_those_of_its_batch(runs: Path) -> None:
    for line in lines_of(grouped(read([runs]).results)):
        of_batch = line["command"] == "fit"
        assert line["seconds (batch, median)"] == (1.25 if of_batch else None)
        assert line["seconds (median)"] == (None if of_batch else 1.25)


def test_a_legend_stays_within_its_figure(tmp_path: Path, canvases: dict[str, Any]) -> None:
    for number in range(5):
        for depth in (1, 2):
            policy = f"TokenRecovery({'+'.join(['LanguageModelPrior'] * (5 + number))})"
            more = {"policy": policy, "note": "many words " * 12}
            rows = [predicted(i, depth=depth) | more for i in range(2)]
            write_run(tmp_path / f"{number}-{depth}", rows)
    draw(read([tmp_path]))
    assert set(canvases) == {"depth", "candidates"}
    for canvas in canvases.values():
        (legend,) = canvas.legends
        box, page = legend.get_window_extent(), canvas.bbox
        assert page.x0 <= box.x0
        assert box.x1 <= page.x1
        assert page.y0 <= box.y0
        assert "many words" not in legend.get_texts()[0].get_text()  # the same in all lines
        height = canvas.axes[0].get_window_extent().height / canvas.dpi
        assert height > 1, "the legend has taken the room of the axes"


def test_axes_can_be_read(runs: Path, canvases: dict[str, Any]) -> None:
    draw(read([runs]))
    for axes in (*canvases["depth"].axes, *canvases["candidates"].axes):
        assert axes.get_ylim() == pytest.approx((-0.05, 1.05))
    ticks = [label.get_text() for label in canvases["candidates"].axes[0].get_xticklabels()]
    assert {"1", "10"} <= set(ticks)
    assert all(float(tick) for tick in ticks)


def test_a_label_keeps_a_number_whole() -> None:
    assert label_of({"optimizer.lr": 0.25}, ["optimizer.lr"]) == "lr 0.25"


@pytest.mark.usefixtures("canvases")
def test_a_figure_scrolls_at_its_own_size(runs: Path) -> None:
    drawn = draw(read([runs]))
    text = page(*_read(runs), drawn, "", 0)
    assert len(re.findall(r'<div class="scroll"[^>]*><img src="data:', text)) == len(drawn) == 2
    assert "figure img { display: block; max-width: none;" in text


def test_a_report_is_written_among_the_runs_given_first(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run([str(runs / "1-0"), str(runs / "p")]) == 0
    assert run([str(runs / "1-1" / "results.jsonl")]) == 0
    assert sorted(tmp_path.rglob("report.html")) == [
        runs / "1-0" / "report" / "report.html",
        runs / "1-1" / "report" / "report.html",
    ]


def test_a_report_is_written_whole(runs: Path, tmp_path: Path, capsys) -> None:
    (runs / "foreign.jsonl").write_text("{}\n")
    out = tmp_path / "out"
    assert run([str(runs), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "foreign.jsonl: line 1 is not a row of results" in said.err
    assert "| fit" in said.out
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert written == {
        "report.html", "table.md", "table.csv", "table.json", "figures/depth.png",
        "figures/depth.svg", "figures/candidates.png", "figures/candidates.svg",
    }  # fmt: skip
    assert (out / "figures" / "depth.png").read_bytes().startswith(b"\x89PNG")
    again = tmp_path / "again"
    assert run([str(runs), "--out", str(again)]) == 0
    for name in written:
        assert (again / name).read_bytes() == (out / name).read_bytes(), name


def _read(folder: Path) -> tuple[Reading, list[Line]]:
    reading = read([folder])
    return reading, lines_of(grouped(reading.results))


class _Page(HTMLParser):
    """Every tag and address of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_fetches_nothing_and_escapes_everything(tmp_path: Path) -> None:
    bad = '<script>alert("x")</script>\n\u202e|& '
    more = {"prompt": bad, "recovered": bad, "model": bad, "objective": bad, "exact": False}
    rows = [row(0, recovered_tokens=[bad] * 6, **more), row(1, depth=2)]
    write_run(tmp_path / "<b>", rows)
    text = page(*_read(tmp_path), [], "", 5)
    parsed = _Page(text)
    assert "script" not in parsed.tags
    assert "b" not in parsed.tags
    assert '<script>alert("x")</script>↵' in parsed.text
    assert "\u202e" not in parsed.text.replace(bad, "")
    assert parsed.addresses == []
    assert "default-src 'none'" in text


def test_the_page_marks_tokens_and_limits_texts(tmp_path: Path) -> None:
    rows = [row(i, right=0.5) for i in range(30)]
    write_run(tmp_path, rows)
    text = page(*_read(tmp_path), [], "Mine", 10)
    assert "<title>Mine</title>" in text
    shown = rows[:10]
    verified = sum(made["verified_tokens"] for made in shown)
    assert text.count('class="tok c"') == verified + 1  # and one in the legend
    assert text.count('class="tok w"') == 60 - verified + 1
    assert "20 more in the files" in text
    none = page(*_read(tmp_path), [], "Mine", 0)
    assert 'class="tok' not in none


def test_findings_count_proofs_and_say_so_where_one_is_wrong(tmp_path: Path) -> None:
    write_run(tmp_path / "good", [row(0), row(1)])
    (_, _, proofs) = findings(read([tmp_path]).results)
    assert proofs == "12 of 12 tokens are verified by running them; none of these is wrong."
    wrong = row(2)
    wrong["recovered_ids"] = [(token + 1) % len(WORDS) for token in wrong["ids"]]
    write_run(tmp_path / "bad", [wrong])
    (_, _, proofs) = findings(read([tmp_path]).results)
    assert "6 of these are wrong" in proofs


def test_what_is_the_same_in_all_settings_is_said_once(tmp_path: Path) -> None:
    for depth in (1, 2, 3):
        write_run(tmp_path / str(depth), [row(i, depth=depth) for i in range(2)])
    said = findings(read([tmp_path]).results)[1]
    assert said == "100% of the tokens are read in all 3 settings; 6 of 6 texts are exact."
    write_run(tmp_path / "unknown", [predicted(0, depth=4, prompt=None, ids=None)])
    unknown = tmp_path / "unknown" / "results.jsonl"
    made = json.loads(unknown.read_text())
    unknown.write_text(json.dumps({**made, "token_accuracy": None, "exact": None}) + "\n")
    said = findings(read([tmp_path]).results)[1]
    assert "in the 3 of 4 settings whose prompts are known; 6 of 6 texts" in said
    write_run(tmp_path / "bad", [row(0, depth=5, right=0.0)])
    said = findings(read([tmp_path]).results)[1]
    assert said.startswith("Between 0% (fit, depth 5) and 100% (fit, depth 1) of the tokens")
    assert said.endswith("6 of 7 texts are exact.")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "'nowhere' does not exist"),
        ([], "report: the following arguments are required: runs"),
        (["{runs}", "--texts=-1"], "--texts must not be negative"),
        (["{runs}", "--out={runs}/p/results.jsonl"], "is a file; give a folder"),
    ],
)
def test_wrong_use(arguments, sentence, runs: Path) -> None:
    with pytest.raises(InputError) as error:
        run([argument.format(runs=runs) for argument in arguments])
    assert sentence in str(error.value)


def test_a_report_needs_neither_torch_nor_lightning(runs: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom lightning_inversion.report.command import run\n"
        f"run([{str(runs)!r}, '--out', {str(tmp_path / 'o')!r}])\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'lightning', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_folder_that_cannot_be_made_is_refused_before_the_runs_are_read(runs: Path) -> None:
    with pytest.raises(InputError, match="--out '/proc/x' cannot be written"):
        run([str(runs), "--out", "/proc/x"])
