"""Prompts -> batches. An epoch is one batch of prompts, a step is one iteration on it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_inversion.errors import InputError
from lightning_inversion.prompt_files import read_prompts
from lightning_inversion.transformer.loading import TransformerSpec


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of one epoch.

    Attributes:
        index: each row's number in the data set, from 0.
        prompts: the texts.
        ids: ``[B, T]`` tokens, 0 in the padding on the right.
        mask: ``[B, T]`` bool, True at a token.
    """

    index: tuple[int, ...]
    prompts: tuple[str, ...]
    ids: Tensor
    mask: Tensor

    @property
    def lengths(self) -> list[int]:
        """Tokens in each row."""
        return [int(n) for n in self.mask.sum(1)]

    def to(self, device: torch.device, **_: Any) -> "PromptBatch":
        """This batch on ``device``; itself if it is there already."""
        if self.ids.device == device:
            return self
        return replace(self, ids=self.ids.to(device), mask=self.mask.to(device))

    @classmethod
    def collate(cls, rows: Sequence[tuple[int, str, list[int]]]) -> "PromptBatch":
        """Rows of (index, text, token ids), padded on the right to the longest."""
        longest = max(len(ids) for _, _, ids in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for row, (_, _, tokens) in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = True
        return cls(tuple(r[0] for r in rows), tuple(r[1] for r in rows), ids, mask)


class Iterations:
    """A loader whose epoch is one batch, given once for each iteration.

    It has a state because Lightning asks that of a loader which is left in the middle of an epoch;
    the place itself is kept by Lightning's own loop.
    """

    def __init__(
        self, batches: Sequence[PromptBatch], iterations: int, epoch: Callable[[], int]
    ) -> None:
        self.batches, self.iterations, self.epoch = batches, iterations, epoch

    def __len__(self) -> int:
        return self.iterations

    def __iter__(self) -> Iterator[PromptBatch]:
        batch = self.batches[self.epoch()]
        for _ in range(self.iterations):
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Nothing to remember."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to remember."""


class PromptDataModule(LightningDataModule):
    """Prompts to be recovered, from the command line, a text file or JSONL.

    Args:
        prompts: texts; quote them in YAML, where a bare yes or 12 is not a string.
        file: a text file with one prompt a line, or a .jsonl file whose lines have a key "prompt".
        tokenizer: the model whose tokenizer is used; the command line takes model.transformer's.
        revision: revision of that model on the hub.
        special_tokens: let the tokenizer add its special tokens (a BOS, say).
        repeat: rows of each prompt, one after another; each row starts from noise of its own.
        batch_size: rows in one batch, hence in one epoch; null takes them all together.
        iterations: iterations of an epoch; the command line takes model.iterations.
    """

    def __init__(
        self,
        prompts: list[str] | None = None,
        file: str | None = None,
        tokenizer: str = TransformerSpec.model,
        revision: str | None = None,
        special_tokens: bool = False,
        batch_size: int | None = None,
        iterations: int = 500,
        repeat: int = 1,
    ) -> None:
        super().__init__()
        if (prompts is None) == (file is None):
            given = "neither was" if prompts is None else "both were"
            raise InputError(f"Give either --data.prompts or --data.file; {given} given.")
        if batch_size is not None and batch_size < 1:
            raise InputError(f"--data.batch_size must be at least 1, and is {batch_size}.")
        if repeat < 1:
            raise InputError(f"--data.repeat must be at least 1, and is {repeat}.")
        texts = read_prompts(Path(file), "--data.file") if file else list(prompts or ())
        for number, text in enumerate(texts, start=1):
            if not text.strip():
                raise InputError(f"--data.prompts, prompt {number} is empty; give it a text.")
        if not texts:
            raise InputError("--data.prompts holds no prompt; give one or more.")
        self.texts = [text for text in texts for _ in range(repeat)]
        self.tokenizer, self.revision, self.special_tokens = tokenizer, revision, special_tokens
        self.batch_size, self.iterations = batch_size, iterations
        self.batches: list[PromptBatch] = []

    def setup(self, stage: str | None = None) -> None:
        """Tokenise every prompt, before the model is loaded; an epoch for each batch."""
        if not self.batches:
            rows = self._tokenized()
            size = self.batch_size or len(rows)
            starts = range(0, len(rows), size)
            self.batches = [PromptBatch.collate(rows[start : start + size]) for start in starts]
        if self.trainer is not None:
            limit = self.trainer.max_epochs
            epochs = len(self.batches) if limit in (None, -1) else min(limit, len(self.batches))
            self.trainer.fit_loop.max_epochs = epochs

    def _tokenized(self) -> list[tuple[int, str, list[int]]]:
        spec = TransformerSpec(model=self.tokenizer, revision=self.revision)
        tokenizer = spec.load_tokenizer()
        longest = getattr(spec.config(), "max_position_embeddings", None)
        rows = []
        for index, text in enumerate(self.texts):
            ids = tokenizer(text, add_special_tokens=self.special_tokens)["input_ids"]
            if not ids:
                raise InputError(f"Prompt {index + 1} ({text!r}) has no tokens; remove it.")
            if longest is not None and len(ids) > longest:
                raise InputError(
                    f"Prompt {index + 1} ({text[:30]!r}...) has {len(ids)} tokens, and the model "
                    f"reads at most {longest}; shorten it."
                )
            rows.append((index, text, list(ids)))
        return rows

    def train_dataloader(self) -> Iterations:
        """The batch of the current epoch, once for each iteration."""
        return Iterations(self.batches, self.iterations, lambda: self._current_epoch)

    @property
    def _current_epoch(self) -> int:
        assert self.trainer is not None
        return self.trainer.current_epoch

    def val_dataloader(self) -> Iterations:
        """One step for ``validate``, which reads its rows from the checkpoint; none for ``fit``."""
        validating = self.trainer is not None and self.trainer.state.fn == TrainerFn.VALIDATING
        return Iterations(self.batches, int(validating), lambda: 0)
