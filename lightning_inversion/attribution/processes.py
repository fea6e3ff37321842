"""Texts handed out to other processes of this machine, each as it asks for one.

So a process whose texts are short takes more of them. The processes share the file of the rows and
nothing else: none can hold another one up, whenever it is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait

import torch

from lightning_inversion.attribution.request import Request
from lightning_inversion.attribution.rows import RowFile
from lightning_inversion.errors import InputError, ProcessLostError

# A fork would share the threads and the CUDA context of this process, which torch forbids.
_SPAWN = multiprocessing.get_context("spawn")


def run_in_processes(
    request: Request, rows: RowFile, processes: int, written: Callable[[RowFile], None]
) -> None:
    """Run every text that has no row yet, each in one of the processes, which appends its row.

    Args:
        request: what is asked of each text.
        rows: of the texts.
        processes: to start; none is left when this returns or raises, or when this process dies.
        written: is called after each row.

    Raises:
        ProcessLostError: a process died; the rows that it wrote are kept.
        InputError: a text is too long for the model, or the model cannot be had.
    """
    waiting = iter(rows.missing)
    with _started(request, rows, processes) as workers:
        while rows.missing:
            heard = wait([worker.connection for worker in workers])
            for worker in workers:
                if worker.connection not in heard:
                    continue
                finished = worker.answer()
                if finished is not None:
                    rows.finished.add(finished)
                    written(rows)
                index = next(waiting, None)
                if index is not None:
                    worker.give(index)


class _Worker:
    """A started process, as the one that started it sees it."""

    def __init__(self, number: int, request: Request, rows: RowFile) -> None:
        self.number = number
        self.connection, theirs = _SPAWN.Pipe()
        # daemon: it is ended when this process ends, even if by an exception.
        self.process = _SPAWN.Process(target=_work, args=(theirs, request, rows), daemon=True)
        self.process.start()
        theirs.close()  # the other process alone holds its end, which so closes with it

    def answer(self) -> int | None:
        """The text whose row it has written; None where it asks for its first one."""
        with self._noticing_its_death():
            answer = self.connection.recv()
        if isinstance(answer, Exception):
            raise answer
        assert answer is None or isinstance(answer, int)
        return answer

    def give(self, index: int) -> None:
        """Hand it a text."""
        with self._noticing_its_death():
            self.connection.send(index)

    @contextmanager
    def _noticing_its_death(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError) as error:
            self.process.join()
            raise ProcessLostError(
                f"process {self.number} ended with exit code {self.process.exitcode}"
            ) from error


@contextmanager
def _started(request: Request, rows: RowFile, processes: int) -> Iterator[list[_Worker]]:
    """So many processes, of which none is left behind."""
    workers: list[_Worker] = []
    try:
        with _interrupts_ignored():
            for number in range(1, processes + 1):
                workers.append(_Worker(number, request, rows))
        yield workers
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join()


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """What starts meanwhile ignores Ctrl-C, which a terminal sends to all: the first one answers.

    It is inherited, because a started process cannot ask for it before it has imported torch.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(connection: Connection, request: Request, rows: RowFile) -> None:
    """What a started process does: it asks for a text, appends its row, and asks for another."""
    _end_with_the_first()
    torch.set_num_threads(1)
    try:
        model, tokenizer = request.spec.load_causal_lm()
        connection.send(None)
        for index in _given(connection):
            # Several processes that tell of their forwards at once would be read by nobody.
            result = request.result(model, tokenizer, rows.texts[index], say=lambda _: None)
            rows.append(index, result.to_dict())
            connection.send(index)
    except InputError as error:
        connection.send(error)
    except OSError as error:  # a full disk, which the first process says in a sentence
        connection.send(OSError(error.errno, error.strerror, error.filename))


def _given(connection: Connection) -> Iterator[int]:
    """The texts that the first process hands out, until it has ended."""
    with suppress(EOFError):
        while True:
            yield connection.recv()


def _end_with_the_first() -> None:
    """End this process at once when the one that started it has ended, however it did."""
    first = multiprocessing.parent_process()
    assert first is not None

    def watch() -> None:
        first.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
