"""One batch of prompts, or of captured targets whose prompts are not known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_inversion.data.targets import Captured


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of one epoch, known or not.

    Attributes:
        index: each row's number in the data set, from 0.
        prompts: the texts; None where only their features are known.
        ids: ``[B, T]`` tokens, 0 in the padding on the right; None where they are not known.
        mask: ``[B, T]`` bool, True at a token.
        target: ``[B, T, F]`` captured features, 0 in the padding and nan where none were stored;
            None where the prompts are run for them.
        known_prefix: tokens with which every text is known to begin.
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
    def collate(cls, rows: Sequence[tuple[int, str, list[int]]]) -> PromptBatch:
        """Rows of (index, text, token ids), padded on the right to the longest."""
        longest = max(len(ids) for _, _, ids in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for row, (_, _, tokens) in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = True
        return cls(tuple(r[0] for r in rows), tuple(r[1] for r in rows), ids, mask)

    @classmethod
    def of_captured(cls, rows: Sequence[tuple[int, int]], captured: Captured) -> PromptBatch:
        """Rows of (index, number of a captured text), padded on the right to the longest."""
        texts = [text for _, text in rows]
        longest = max(captured.lengths[text] for text in texts)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        target = torch.zeros(len(rows), longest, captured.width)
        ids = None if captured.ids is None else torch.zeros(mask.shape, dtype=torch.long)
        for row, text in enumerate(texts):
            length = captured.lengths[text]
            mask[row, :length] = True
            target[row, :length] = captured.target(text)
            if ids is not None and captured.ids is not None:
                ids[row, :length] = torch.tensor(captured.ids[text])
        prompts: Sequence[str | None] = captured.prompts or [None] * len(captured.targets)
        return cls(
            tuple(index for index, _ in rows), tuple(prompts[text] for text in texts),
            ids, mask, target, captured.known_prefix,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
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
    def of_state(cls, stored: Mapping[str, Any]) -> PromptBatch:
        """The batch of a checkpoint."""
        return cls(
            tuple(stored["index"]), tuple(stored["prompts"]), stored["ids"], stored["mask"],
            stored.get("target"), tuple(stored.get("known_prefix", ())),
        )  # fmt: skip
