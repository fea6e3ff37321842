"""A run that is started as a user would start it, and watched by what it writes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


class StartedRun:
    """A command line in processes of its own.

    Args:
        arguments: of the command line.
        rows: the file into which it writes a row a text.
        messages: the file for what it says, each time it is started.
    """

    def __init__(self, arguments: list[str], rows: Path, messages: Path) -> None:
        self.command = [sys.executable, "-m", "lightning_inversion", *arguments]
        self.rows, self.messages = rows, messages

    def start(self, *more: str, limit: Callable[[], None] | None = None) -> subprocess.Popen[bytes]:
        """Start it with ``more`` arguments; ``limit`` is called in the process before it begins."""

        def prepare() -> None:
            # A shell starts what it runs in the background with Ctrl-C ignored, and so the tests.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if limit is not None:
                limit()

        with self.messages.open("ab") as messages:
            return subprocess.Popen(
                [*self.command, *more],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=messages,
                start_new_session=True,  # a group of its own, as a terminal gives it
                preexec_fn=prepare,
            )

    def finish(self, process: subprocess.Popen[bytes]) -> bytes:
        """Wait until it has ended well; returns its rows."""
        assert process.wait(300) == 0, self.messages.read_text()
        return self.rows.read_bytes()

    def lines(self) -> list[bytes]:
        """The whole rows there are now, each of which can be read."""
        whole = self.rows.read_bytes().split(b"\n") if self.rows.exists() else []
        return [line for line in whole[:-1] if json.loads(line)]

    def wait_for(self, lines: int, process: subprocess.Popen[bytes]) -> None:
        """Wait until it has so many rows."""
        self.wait_until(lambda: len(self.lines()) >= lines, process)

    def wait_until(self, true: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
        """Wait until something is true of a run that has not ended."""
        deadline = time.monotonic() + 120
        while not true():
            assert process.poll() is None, self.messages.read_text()
            assert time.monotonic() < deadline, self.messages.read_text()
            time.sleep(0.02)


def wait_until_gone(pids: list[int]) -> None:
    """Wait until processes that the run started have ended, as those that lose it do in time."""
    deadline = time.monotonic() + 20
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, f"{alive} did not end"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Neither gone nor dead and waiting for whoever adopted it to notice."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
