"""The command: what it writes, and what it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_inversion.__main__ import main
from lightning_inversion.report import figures


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "draw", lambda loaded, style: [])


@pytest.mark.usefixtures("no_figures")
def test_a_report_is_written_among_the_runs_given_first(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(runs / "1-0"), str(runs / "p")]) == 0
    assert main(["report", str(runs / "1-1" / "results.jsonl")]) == 0
    assert sorted(tmp_path.rglob("report.html")) == [
        runs / "1-0" / "report" / "report.html",
        runs / "1-1" / "report" / "report.html",
    ]


@pytest.mark.usefixtures("no_figures")
def test_what_the_user_called_the_runs_heads_their_results(
    runs: Path, tmp_path: Path, capsys
) -> None:
    folders = [str(runs / "1-0"), str(runs / "1-1")]
    assert main(["report", *folders, "--out", str(tmp_path), "--label", "<old>", "new"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<summary>&lt;old&gt; <span" in page
    assert "<summary>new <span" in page
    assert "| <old> |" in capsys.readouterr().out


@pytest.mark.usefixtures("no_figures")
def test_unfinished_runs_are_named(runs: Path, tmp_path: Path, capsys) -> None:
    settings = "model: {}\ndata: {prompts: [a, b, c], repeat: 3}\n"
    (runs / "1-0" / "config.yaml").write_text(settings)
    (runs / "4-0" / "config.yaml").write_text("model: {}\ndata: {prompts: [a]}\n")
    (runs / "begun").mkdir()
    (runs / "begun" / "predict.yaml").write_text("model: {}\ndata: {targets: x}\n")
    (runs / "config.yaml").write_text("of: something else\n")
    assert main(["report", str(runs), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"Not finished: {runs / '1-0'}, 8 of 9 prompts",
        f"Not finished: {runs / 'begun'}, 0 of its prompts",
    ]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "2 runs have not finished" in page
    assert '<a href="table.csv">' in page


@pytest.mark.integration  # a process
def test_a_report_is_written_whole_and_needs_neither_torch_nor_lightning(
    runs: Path, tmp_path: Path
) -> None:
    (runs / "foreign.jsonl").write_text("{}\n")
    out = tmp_path / "out"
    code = (
        "import sys\nfrom lightning_inversion.__main__ import main\n"
        "main(['report', '--help'])\n"
        "assert 'pandas' not in sys.modules, 'help would be slow'\n"
        f"main(['report', {str(runs)!r}, '--out', {str(out)!r}])\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'lightning', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "foreign.jsonl: line 1 is not a row of results" in done.stderr
    assert "| fit" in done.stdout
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert written == {
        "report.html", "table.md", "table.csv", "table.json", "figures/depth.png",
        "figures/depth.svg", "figures/candidates.png", "figures/candidates.svg",
    }  # fmt: skip
    assert all(str(out / name) in done.stdout for name in written)
    head, *lines = (out / "table.csv").read_text().splitlines()
    assert head.startswith("command,depth,prompts,tokens right,tokens right low,")
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "'nowhere' does not exist"),
        ([], "RUNS must be given"),
        (["{runs}", "--max_prompts=-1"], "--max_prompts must not be negative"),
        (["{runs}", "--out={runs}/p/results.jsonl"], "is a file; give a folder"),
        (["{runs}", "--out=/proc/x"], "--out '/proc/x' cannot be written"),
        (["{runs}", "--texts=3"], "--texts"),
        (["{runs}", "--label", "a", "b"], "--label has 2 names for 1 RUNS"),
        (["{runs}", "--font_size=0"], "--font_size must be above 0"),
    ],
)
def test_wrong_use(arguments: list[str], sentence: str, runs: Path, capsys) -> None:
    assert main(["report", *(argument.format(runs=runs) for argument in arguments)]) == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert message.count("\n") == 1
