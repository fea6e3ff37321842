"""The result of `attribute`: scores that can be shown as a page, on a terminal, in a notebook."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_inversion.attribution import render
from lightning_inversion.attribution.config import Display
from lightning_inversion.attribution.scores import Scores

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True, kw_only=True)
class AttributionResult(Scores):
    """`Scores` and the way to show them.

    Args:
        display: how scores become colours; `dataclasses.replace` gives a result with another.
    """

    display: Display

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "display": asdict(self.display)}

    def to_html(self) -> str:
        """A page in one file: no script, nothing fetched, everything escaped."""
        return render.page(self, self.display)

    def _repr_html_(self) -> str:
        return render.fragment(self, self.display)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from render.terminal_lines(self, self.display)

    def print(self) -> None:
        """Print the coloured text on the terminal."""
        from rich.console import Console

        Console().print(self)

    def log(self, writer: SummaryWriter, tag: str = "attribution", step: int = 0) -> None:
        """Write a table of the tokens and a strip of their colours to TensorBoard."""
        writer.add_text(tag, render.markdown_table(self, self.display), step)
        writer.add_image(tag, render.image_strip(self, self.display), step)


class AttributionResults(tuple[AttributionResult, ...]):
    """The results of several texts, in their order."""

    def to_json(self, indent: int | None = 2) -> str:
        """A list with the ``to_dict`` of each text, as JSON."""
        found = [result.to_dict() for result in self]
        return json.dumps(found, ensure_ascii=False, allow_nan=False, indent=indent)

    def to_records(self) -> list[dict[str, Any]]:
        """The records of all texts; ``text`` counts them from 1."""
        return [
            {"text": number, **record}
            for number, result in enumerate(self, start=1)
            for record in result.to_records()
        ]

    def to_html(self, pages: Sequence[str] = ()) -> str:
        """All texts on one page, in colours; every text sets its own scale.

        Args:
            pages: an address for each text, to which the page links; none without links.
        """
        return render.index([(result, result.display) for result in self], pages)

    def _repr_html_(self) -> str:
        return render.index_fragment([(result, result.display) for result in self])

    def write_pages(self, folder: Path) -> Path:
        """Write a page for each text, and ``index.html`` that links them; returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        digits = len(str(len(self)))
        names = [f"text-{number:0{digits}}.html" for number in range(1, len(self) + 1)]
        for name, result in zip(names, self, strict=True):
            (folder / name).write_text(result.to_html(), encoding="utf-8")
        index = folder / "index.html"
        index.write_text(self.to_html(names), encoding="utf-8")
        return index
