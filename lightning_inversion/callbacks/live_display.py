"""A progress bar, and what stands below it, live where there is a terminal."""

from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class LiveDisplay(Callback):
    """What a run shows on stderr while it goes on; leaves the terminal in order, however it ends.

    Args:
        unit: what the bar counts.
        show: False leaves the display out.
    """

    def __init__(self, unit: str, show: bool) -> None:
        self.show = show
        self.console = Console(stderr=True)
        self._live: Live | None = None
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(),
            console=self.console,
        )

    def _open(self, trainer: Trainer) -> None:
        """Start it, in the first process and where there is a terminal."""
        wanted = self.show and self.console.is_terminal and trainer.is_global_zero
        if wanted and self._live is None:
            self._live = Live(self._bar, console=self.console, refresh_per_second=4)
            self._live.start()

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the terminal in order."""
        self._close()
