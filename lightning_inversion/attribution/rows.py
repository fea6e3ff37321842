"""Many texts -> one JSON line each, whole or not at all; a killed run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_inversion.errors import InputError
from lightning_inversion.result_files import Row, append_rows, read_rows


class RowFile:
    """A JSONL file that several runs of one command fill.

    Args:
        path: of the file, which may be there already.
        texts: of the whole run, in order.
        settings: what decides the scores beside the text.

    Raises:
        InputError: the file holds rows of another run.
    """

    def __init__(self, path: Path, texts: Sequence[str], settings: Row) -> None:
        self.path, self.settings = path, settings
        self.finished: set[int] = set()
        for row in read_rows(path):
            index = int(row["index"])
            text = texts[index] if 0 <= index < len(texts) else None
            if text is None or row.get("text") != text or row.get("settings") != settings:
                raise InputError(
                    f"--json {str(path)!r} holds rows of other texts or other options; "
                    "give another file, or remove it."
                )
            self.finished.add(index)

    def append(self, index: int, row: Row) -> None:
        """Append the row of text `index`; a torn last line is cut off first."""
        append_rows(self.path, [{"index": index, "settings": self.settings, **row}])
        self.finished.add(index)
