"""``lightning-inversion cache``: what the cache folder holds, and clearing it."""

from __future__ import annotations

from collections import Counter, defaultdict
from datetime import datetime
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from lightning_inversion.cache import (
    Entry,
    cache_root,
    described,
    in_words,
    limit,
    measured_files,
    measured_folder,
    models,
    remove,
)
from lightning_inversion.files import printable

_ACTIONS = ("list", "clear")


def add_cache_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "action", nargs="?", choices=_ACTIONS, default="list", help="list, or clear"
    )
    parser.add_argument("--models", type=bool, default=False, help="clear converted models, too")


def run_cache(options: Namespace) -> int:
    """Run the command; returns the exit code."""
    if options.action == "clear":
        gone = [*measured_files(), *(models() if options.models else [])]
        for entry in gone:
            remove(entry.path)
        for left in measured_folder().iterdir():  # locks, and parts of runs that were killed
            remove(left)
        count = len(gone)
        print(f"{count} removed, {_megabytes(sum(one.size for one in gone))} MB")
        return 0
    console = Console()
    for title, entries, most in (
        ("measured", measured_files(), f" of {_megabytes(limit())}"),
        ("models and other folders", models(), ""),
    ):
        total = _megabytes(sum(entry.size for entry in entries))
        console.print(f"{title}: {total}{most} MB", highlight=False)
        if entries:
            console.print(_table(entries))
    console.print(printable(f"{cache_root()}"), soft_wrap=True, markup=False, highlight=False)
    return 0


def _table(entries: list[Entry]) -> Table:
    """A row for each model and depth, with the kinds of what was measured; the newest first."""
    table = Table()
    for heading, justify in (("of", "left"), ("what", "left"), ("MB", "right"), ("used", "left")):
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    rows: dict[str, list[tuple[str, Entry]]] = defaultdict(list)
    for entry in sorted(entries, key=lambda one: -one.used):
        of, kind = _named(entry.path, entry.about())
        rows[of].append((kind, entry))
    for of, held in rows.items():
        kinds = Counter(kind for kind, _ in held)
        what = ", ".join(kind if n == 1 else f"{n} {kind}" for kind, n in sorted(kinds.items()))
        size = sum(entry.size for _, entry in held)
        used = datetime.fromtimestamp(held[0][1].used).strftime("%Y-%m-%d %H:%M")
        table.add_row(of, what, _megabytes(size), used)
    return table


def _named(path: Path, about: dict[str, object]) -> tuple[str, str]:
    """What a file or folder is of, and its kind."""
    if path.is_dir():
        return printable(path.name), "folder"
    kind = in_words(path.name.partition("-")[0])
    return printable(described(about)) if about else "damaged", printable(kind)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}" if size < 1e8 else f"{size / 1e6:.0f}"
