"""A bar with a count for what takes a while before there is a result to show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

T = TypeVar("T")


def counted(parts: Sequence[T], what: str) -> Iterator[T]:
    """Each part in turn, with a bar on stderr where it is a terminal; it goes when they are done.

    Args:
        parts: what is worked on.
        what: is done, in a word or two.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from parts
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        yield from bar.track(parts, description=what)
