"""The result of `attribute`: scores that can be shown as a page, on a terminal, in a notebook."""

from __future__ import annotations

from dataclasses import asdict, dataclass
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
