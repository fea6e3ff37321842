"""The batches of one process: those that no other process takes and that are not finished."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from lightning_inversion.data.batch import PromptBatch


class BatchQueue:
    """The batches that this process runs.

    Args:
        batches: all of them, the same in every process.
        finished: numbers of the prompts whose rows are on disk; may grow.
        claim: takes a batch by its number; False where another process has it.

    Attributes:
        current: the batch of this epoch; None when there is no more.
    """

    def __init__(
        self,
        batches: Sequence[PromptBatch] = (),
        finished: set[int] | frozenset[int] = frozenset(),
        claim: Callable[[int], bool] = lambda number: True,
    ) -> None:
        self.batches, self.finished = batches, finished
        self.current: PromptBatch | None = None
        self._claim = claim
        self._next = 0
        self._taken: set[int] = set()
        self._mine: list[PromptBatch] = []
        self._most: int | None = None

    def take(self) -> PromptBatch | None:
        """The next batch for this process; None when all are taken or finished."""
        while not self._mine:
            if self._next == len(self.batches):
                return None
            number, batch = self._next, self.batches[self._next]
            self._next += 1
            if not self.finished.issuperset(batch.index) and self._take(number):
                self._mine.append(batch)
        while self._most is not None and self._mine[0].size > self._most:
            if len(self._mine[0].index) == 1:
                break
            self._mine[:1] = self._mine[0].halves()
        return self._mine.pop(0)

    def advance(self) -> PromptBatch | None:
        """The next batch, which is the current one now."""
        self.current = self.take()
        return self.current

    def halve(self) -> int | None:
        """Put the current batch back as two halves; if it is one prompt, its number: it is out."""
        assert self.current is not None
        batch, self.current = self.current, None
        if len(batch.index) == 1:
            return batch.index[0]
        halves = batch.halves()
        self._mine[:0] = halves
        self._most = halves[1].size
        return None

    def restore(self, prompts: Collection[int]) -> bool:
        """Take the batch of these prompts, before another process can; False if there is none."""
        rows = set(prompts)
        for number, batch in enumerate(self.batches):
            if rows <= set(batch.index) and self._take(number):
                inside = [row for row, one in enumerate(batch.index) if one in rows]
                others = [row for row, one in enumerate(batch.index) if one not in rows]
                parts = (inside, others) if others else (inside,)  # it had been halved
                self._mine = [batch.rows(part) for part in parts]
                return True
        return False

    def _take(self, number: int) -> bool:
        if number in self._taken:
            return False
        self._taken.add(number)
        return self._claim(number)


class Iterations:
    """A loader whose epoch is one batch, given once for each iteration.

    It has a state because Lightning asks that of a loader which is left in the middle of an epoch;
    Lightning's own loop keeps the position.
    """

    def __init__(self, batch: Callable[[], PromptBatch | None], iterations: int) -> None:
        self.batch, self.iterations = batch, iterations

    def __len__(self) -> int:
        return self.iterations

    def __iter__(self) -> Iterator[PromptBatch]:
        batch = self.batch()
        for _ in range(self.iterations if batch is not None else 0):
            assert batch is not None
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Nothing: Lightning's loop keeps the position."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing was stored, so nothing is restored."""


class Batches:
    """A loader that gives each batch once, to the process that takes it first."""

    def __init__(self, take: Callable[[], PromptBatch | None]) -> None:
        self.take = take

    def __iter__(self) -> Iterator[PromptBatch]:
        while (batch := self.take()) is not None:
            yield batch
