"""Many texts -> one JSON line each, whole or not at all; a killed run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning_inversion.errors import InputError
from lightning_inversion.files import Record, append_records, claimed, read_records


class RowFile:
    """A JSONL file that several runs of one command fill, one after another.

    Args:
        path: of the file, which may be there already.
        texts: of the whole run, in order.
        settings: what decides the scores beside the text.

    Raises:
        InputError: the file holds rows of another run.
    """

    def __init__(self, path: Path, texts: Sequence[str], settings: Record) -> None:
        self.path, self.texts, self.settings = path, texts, settings
        self.finished: set[int] = set()
        for row in read_records(path):
            index = int(row["index"])
            text = texts[index] if 0 <= index < len(texts) else None
            if text is None or row.get("text") != text or row.get("settings") != settings:
                raise InputError(
                    f"--json {str(path)!r} holds rows of other texts or other options; "
                    "give another file, or remove it."
                )
            self.finished.add(index)

    @classmethod
    @contextmanager
    def alone(cls, path: Path, texts: Sequence[str], settings: Record) -> Iterator[RowFile]:
        """The file, while no other run fills it: no text is run twice.

        Raises:
            InputError: another run fills it, or it holds the rows of one.
        """
        with claimed(path.with_name(f".{path.name}.claim")) as ours:
            if not ours:
                raise InputError(
                    f"--json {str(path)!r} is being written by another run; "
                    "wait for its end, or give another file."
                )
            yield cls(path, texts, settings)

    @property
    def missing(self) -> list[int]:
        """The texts without a row, in order."""
        return [index for index in range(len(self.texts)) if index not in self.finished]

    @property
    def standing(self) -> str:
        """How many texts have their row."""
        return f"{len(self.finished)} of {len(self.texts)}"

    def append(self, index: int, row: Record) -> None:
        """Append the row of text `index`; a torn last line is cut off first."""
        append_records(self.path, [{"index": index, "settings": self.settings, **row}])
        self.finished.add(index)
