"""``lightning-inversion report``: folders of runs -> tables, figures and a page."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from lightning_inversion.errors import InputError
from lightning_inversion.files import check_writable
from lightning_inversion.report.load import Reading, read
from lightning_inversion.report.statistics import grouped
from lightning_inversion.report.tables import as_json, comma_separated, lines_of, markdown

DESCRIPTION = """\
Gather the results of any number of runs: a table (markdown, CSV, JSON), figures (PNG, SVG) and a
page of HTML that needs nothing else. Reads files alone; what is no result is named and skipped."""
EXAMPLES = """\
examples
  lightning-inversion report lightning_logs
  lightning-inversion report lightning_logs/version_0 lightning_logs/version_1 --out compared
"""


def add_report_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument(
        "runs", nargs="+", type=Path, help="folders of runs, at any depth, or result files"
    )
    parser.add_argument(
        "--out", type=Path, help="default, the folder 'report' in the first folder given"
    )
    parser.add_argument("--title", default="", help="of the page")
    parser.add_argument(
        "--texts", type=int, default=20, help="texts shown for each setting; default 20"
    )


def run_report(options: Namespace) -> int:
    """Write a report; returns the exit code.

    Args:
        options: what a parser with `add_report_arguments` parsed.

    Raises:
        InputError: the options are wrong, or there is nothing to report.
    """
    if options.out is None:
        options.out = _place_of(options.runs[0])
    if options.texts < 0:
        raise InputError(f"--texts must not be negative, and is {options.texts}.")
    if options.out.exists() and not options.out.is_dir():
        raise InputError(f"--out {str(options.out)!r} is a file; give a folder.")
    check_writable(options.out, "--out", folder=True)
    reading = read(options.runs)
    for path, reason in reading.skipped:
        print(f"{path}: {reason}", file=sys.stderr)
    written = write(reading, options.out, options.title, options.texts)
    print((options.out / "table.md").read_text(encoding="utf-8"))
    for path in written:
        print(path)
    return 0


def write(reading: Reading, out: Path, title: str = "", texts: int = 20) -> list[Path]:
    """Write every file of a report; returns their paths, the page first.

    Args:
        reading: the results.
        out: the folder, made if it is not there.
        title: of the page; '' for one made of the results.
        texts: recovered texts shown for each setting.
    """
    from lightning_inversion.report.page import page

    out.mkdir(parents=True, exist_ok=True)
    lines = lines_of(grouped(reading.results))
    if find_spec("matplotlib") is None:
        figures = []
        print("No figures: pip install 'lightning-inversion[plots]' has them.", file=sys.stderr)
    else:
        from lightning_inversion.report.figures import draw

        figures = draw(reading)
    contents = {
        "report.html": page(reading, lines, figures, title, texts),
        "table.md": markdown(lines),
        "table.csv": comma_separated(lines),
        "table.json": as_json(lines),
    }
    for name, content in contents.items():
        (out / name).write_text(content, encoding="utf-8")
    drawn = [path for figure in figures for path in figure.save(out / "figures")]
    return [*(out / name for name in contents), *drawn]


def _place_of(runs: Path) -> Path:
    """Where a report of runs goes unless it is said: among them, so that it replaces no other's."""
    return (runs.parent if runs.is_file() else runs) / "report"
