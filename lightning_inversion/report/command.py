"""``lightning-inversion report``: folders of runs -> tables, figures and a page."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_inversion.errors import InputError
from lightning_inversion.files import check_writable, printable, visible

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from lightning_inversion.report.canvas import FigureStyle
    from lightning_inversion.report.load import Loaded

_log = logging.getLogger(__name__)


def add_report_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    parser.add_argument("--label", nargs="+", type=str, default=[], metavar="NAME")
    parser.add_argument("--title", type=str, default="", metavar="TEXT")
    parser.add_argument("--max_prompts", type=int, default=20, metavar="N")
    parser.add_argument(
        "--figure_size", type=float, nargs=2, default=[3.4, 3.2], metavar=("WIDTH", "HEIGHT")
    )
    parser.add_argument("--font_size", type=float, default=9.0, metavar="PT")


def run_report(options: Namespace) -> int:
    """Run the command; returns the exit code.

    Args:
        options: what a parser with `add_report_arguments` parsed.

    Raises:
        InputError: the options are wrong, or there is nothing to report.
    """
    from lightning_inversion.report.canvas import FigureStyle
    from lightning_inversion.report.load import load_results

    first = options.runs[0]
    # Beside the runs by default, so that it replaces no other report.
    out = options.out or (first.parent if first.is_file() else first) / "report"
    if options.max_prompts < 0:
        raise InputError(f"--max_prompts must not be negative, and is {options.max_prompts}.")
    if options.label and len(options.label) != len(options.runs):
        raise InputError(
            f"--label has {len(options.label)} names for {len(options.runs)} RUNS; give one for "
            "each, or none."
        )
    if not all(0 < number < 100 for number in (*options.figure_size, options.font_size)):
        raise InputError("--figure_size and --font_size must be above 0 and below 100.")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {str(out)!r} is a file; give a folder.")
    check_writable(out, "--out", folder=True)
    loaded = load_results(options.runs, options.label)
    for path, reason in loaded.skipped:
        _log.warning("Skipped %s: %s", visible(str(path)), visible(reason))
    for path, state in loaded.unfinished:
        _log.warning("Not finished: %s, %s", visible(str(path)), state)
    style = FigureStyle(options.figure_size[0], options.figure_size[1], options.font_size)
    paths = write_files(loaded, out, options.title, options.max_prompts, style)
    print(printable((out / "table.md").read_text(encoding="utf-8")))
    for path in paths:
        print(printable(str(path)))
    return 0


def write_files(
    loaded: Loaded,
    out: Path,
    title: str = "",
    max_prompts: int = 20,
    style: FigureStyle | None = None,
) -> list[Path]:
    """Write every file of a report; returns their paths, the page first.

    Args:
        loaded: the results.
        out: the folder, made if it is not there.
        title: of the page; '' for one that names the model.
        max_prompts: recovered prompts shown for each experiment.
        style: the size of the figures.
    """
    from lightning_inversion.report.figures import draw
    from lightning_inversion.report.page import render_page
    from lightning_inversion.report.tables import as_json, markdown, summarize

    out.mkdir(parents=True, exist_ok=True)
    table, figures = summarize(loaded), draw(loaded, style)
    contents = {
        "report.html": render_page(loaded, table, figures, title, max_prompts, csv="table.csv"),
        "table.md": markdown(table),
        "table.csv": table.to_csv(index=False),
        "table.json": as_json(table),
    }
    for name, content in contents.items():
        (out / name).write_text(content, encoding="utf-8")
    drawn = [path for figure in figures for path in figure.save(out / "figures")]
    return [*(out / name for name in contents), *drawn]
