"""How a command ends: its messages on stderr, and an exit code for each kind of error."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

from lightning_inversion.errors import InputError, ProcessLostError
from lightning_inversion.files import ended_by, printable

_log = logging.getLogger("lightning_inversion")
MOST_LETTERS = 500
"""Letters of an error's sentence."""
_asked_to_end: list[bool] = []
"""Not empty once a SIGTERM has ended a command of this process. Appending takes no lock, which a
second signal could find held."""
_NO_MEMORY = re.compile(r"can't allocate memory|CUDA out of memory|Cannot allocate memory")


def open_streams() -> None:
    """Make stdin, stdout and stderr usable, whatever the process was started with.

    One that is closed is empty and takes all, and its number is no other file's. What an encoding
    lacks is written as an escape.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            nothing = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, nothing)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def exit_code(name: str, command: Callable[[], int | None]) -> int:
    """Run a command; returns its exit code: 0 done, 1 failed, 2 wrong usage.

    An error of the user's or of the machine is logged as one sentence. A fault of the program is
    raised.

    Args:
        name: of the command, in front of the sentence.
        command: returns the exit code, or None for 0.
    """
    with messages_on_stderr():
        try:
            return command() or 0
        except SystemExit as stop:  # of --help and --print_config
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException as error:
            ending = exit_of(error)
            if ending is None:
                raise
            code, sentence = ending
            _log.error("%s: %s", name, shortened(sentence))
            return code


def end_process(code: int) -> NoReturn:
    """End this process with an exit code.

    After a SIGTERM the interpreter is not shut down: what the signal interrupted may hold what a
    thread waits for, and the process would never end.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    if _asked_to_end:
        os._exit(code)
    sys.exit(code)


def shortened(sentence: str) -> str:
    """One line of `MOST_LETTERS` at most: its beginning and its end."""
    line = " ".join(sentence.split())
    half = MOST_LETTERS // 2
    return line if len(line) <= MOST_LETTERS else f"{line[:half]} ... {line[-half:]}"


def exit_of(error: BaseException) -> tuple[int, str] | None:
    """The exit code and the sentence for an exception; None for a fault of the program."""
    if isinstance(error, InputError):
        return 2, str(error)
    if isinstance(error, ProcessLostError):
        return 1, f"{error}; the run has ended."
    if isinstance(error, KeyboardInterrupt):
        return 1, "interrupted."
    if isinstance(error, OSError) and (sentence := ended_by(error)) is not None:
        return 1, sentence
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        return 1, "there is not enough memory; the run has ended."
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return 1, "no further thread can be started; the run has ended."
    return None


class _ToStderr(logging.Handler):
    """Plain lines to whatever stderr is at the time: a sweep redirects it for each cell."""

    def emit(self, record: logging.LogRecord) -> None:
        print(printable(self.format(record)), file=sys.stderr, flush=True)


@contextmanager
def messages_on_stderr() -> Iterator[None]:
    """Write the package's messages to stderr while the block runs."""
    handler, level = _ToStderr(), _log.level
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    try:
        yield
    finally:
        _log.removeHandler(handler)
        _log.setLevel(level)


@contextmanager
def ended_by_sigterm(ending: type[SystemExit] = SystemExit) -> Iterator[None]:
    """Let a SIGTERM end the block at once, so that other processes, locks and bars end too.

    A handler that is set inside the block, as Lightning's, must call this one.

    Args:
        ending: what is raised, with exit code 1.
    """

    def end(*_: Any) -> NoReturn:
        _asked_to_end.append(True)
        raise ending(1)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
