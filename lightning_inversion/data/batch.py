"""One batch of prompts, or of captured targets whose prompts are not known; what shares a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_inversion.data.targets import Captured


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of one epoch, known or not.

    Attributes:
        index: each row's number in the data set, from 0.
        prompts: None where only their features are known.
        ids: ``[B, T]`` tokens, 0 in the padding on the right; None where they are not known.
        mask: ``[B, T]`` bool, True at a token.
        target: ``[B, T, F]`` captured features, 0 in the padding and nan where none were stored;
            None where the prompts are run for them.
        known_prefix: tokens with which every prompt is known to begin.
    """

    index: tuple[int, ...]
    prompts: tuple[str | None, ...]
    ids: Tensor | None
    mask: Tensor
    target: Tensor | None = None
    known_prefix: tuple[int, ...] = ()

    @property
    def lengths(self) -> list[int]:
        """Tokens in each row."""
        return [int(n) for n in self.mask.sum(1)]

    @property
    def size(self) -> int:
        """Tokens, the padding counted."""
        return self.mask.numel()

    def rows(self, part: Sequence[int]) -> PromptBatch:
        """Some of its rows, without the padding that they do not need."""
        mask = self.mask[list(part)]
        longest = int(mask.sum(1).max())
        return PromptBatch(
            tuple(self.index[row] for row in part),
            tuple(self.prompts[row] for row in part),
            None if self.ids is None else self.ids[list(part), :longest],
            mask[:, :longest],
            None if self.target is None else self.target[list(part), :longest],
            self.known_prefix,
        )

    def halves(self) -> list[PromptBatch]:
        """Two batches of half the rows."""
        middle = len(self.index) // 2
        return [self.rows(range(middle)), self.rows(range(middle, len(self.index)))]

    def to(self, device: torch.device, **_: Any) -> PromptBatch:
        """This batch on ``device``; itself if it is there already."""
        if self.mask.device == device:
            return self
        return replace(
            self,
            ids=None if self.ids is None else self.ids.to(device),
            mask=self.mask.to(device),
            target=None if self.target is None else self.target.to(device),
        )

    @classmethod
    def collate(cls, rows: Sequence[tuple[int, str | None, Sequence[int]]]) -> PromptBatch:
        """Rows of (index, prompt, token ids), padded on the right to the longest."""
        index, prompts, ids = zip(*rows, strict=True)
        mask = _mask([len(tokens) for tokens in ids])
        return cls(index, prompts, _padded([torch.tensor(tokens) for tokens in ids]), mask)

    @classmethod
    def of_captured(cls, rows: Sequence[tuple[int, int]], captured: Captured) -> PromptBatch:
        """Rows of (index, number of a captured prompt), padded on the right to the longest."""
        numbers = [number for _, number in rows]
        prompts: Sequence[str | None] = captured.prompts or [None] * len(captured.targets)
        ids = None
        if captured.ids is not None:
            ids = _padded([torch.tensor(captured.ids[number]) for number in numbers])
        return cls(
            tuple(index for index, _ in rows),
            tuple(prompts[number] for number in numbers),
            ids,
            _mask([captured.lengths[number] for number in numbers]),
            _padded([captured.target(number) for number in numbers]),
            captured.known_prefix,
        )

    def to_checkpoint(self) -> dict[str, Any]:
        """What a checkpoint holds of it: plain values and tensors on the CPU."""
        return {
            "index": list(self.index),
            "prompts": list(self.prompts),
            "ids": None if self.ids is None else self.ids.cpu(),
            "mask": self.mask.cpu(),
            "target": None if self.target is None else self.target.cpu(),
            "known_prefix": list(self.known_prefix),
        }

    @classmethod
    def from_checkpoint(cls, stored: Mapping[str, Any]) -> PromptBatch:
        """The batch of a checkpoint.

        Raises:
            LookupError, TypeError, ValueError: what is stored is no batch.
        """
        batch = cls(
            tuple(stored["index"]), tuple(stored["prompts"]), stored["ids"], stored["mask"],
            stored.get("target"), tuple(stored.get("known_prefix", ())),
        )  # fmt: skip
        numbers = {*batch.index, *batch.known_prefix}
        (rows, width), known = batch.mask.shape, (str, type(None))
        if (
            not all(type(number) is int and number >= 0 for number in numbers)
            or not all(isinstance(prompt, known) for prompt in batch.prompts)
            or not len(batch.index) == len(set(batch.index)) == len(batch.prompts) == rows > 0
            or not min(batch.lengths) > 0
            or not bool((batch.mask == _mask(batch.lengths)).all())
            or not _is_tensor(batch.ids, (rows, width), torch.long)
            or not _is_tensor(batch.target, (rows, width, -1), torch.float32)
        ):
            raise ValueError("the batch of a checkpoint is damaged")
        return batch


def _is_tensor(value: Any, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether it is None, or a tensor of a type and a shape, where -1 is any size."""
    return value is None or (
        isinstance(value, Tensor)
        and value.dtype == dtype
        and value.dim() == len(shape)
        and all(size in (-1, own) for size, own in zip(shape, value.shape, strict=True))
    )


def _mask(lengths: Sequence[int]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def _padded(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True)


def pack(
    lengths: Sequence[int], tokens: int, rows: int | None = None, together: int = 1
) -> list[list[int]]:
    """Groups of row numbers, the longest prompts first, each group in its own order.

    It looks at the lengths alone, so that any number of processes forms the same batches.

    Args:
        lengths: tokens of each row.
        tokens: most tokens of a batch, its padding counted; a longer row is a batch by itself.
        rows: most rows of a batch; None for any number.
        together: that many rows, one after another, are never parted by the budget of tokens.

    >>> pack([3, 9, 4, 8], tokens=18)
    [[1, 3], [0, 2]]
    """
    units = [range(start, start + together) for start in range(0, len(lengths), together)]
    units.sort(key=lambda unit: -lengths[unit[0]])
    batches: list[list[int]] = []
    longest = 0
    for unit in units:
        size = len(batches[-1]) + together if batches else 0
        if not batches or size * longest > tokens or (rows is not None and size > rows):
            batches.append([])
            longest = lengths[unit[0]]
        batches[-1].extend(unit)
    return [part for batch in batches for part in _split_rows(sorted(batch), rows)]


def _split_rows(batch: list[int], rows: int | None) -> list[list[int]]:
    size = rows or len(batch)
    return [batch[start : start + size] for start in range(0, len(batch), size)]
