"""Prompts or captured targets -> batches. An epoch is one batch, a step is one iteration on it."""

import hashlib
import logging
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from lightning_inversion.data.batch import PromptBatch, pack
from lightning_inversion.data.layout import Layout, ModelShape
from lightning_inversion.data.memory import tokens_that_fit
from lightning_inversion.data.queue import Batches, BatchQueue, Iterations
from lightning_inversion.data.request import Order, Request
from lightning_inversion.data.targets import OPTION, Captured
from lightning_inversion.data.texts import (
    ModelLimits,
    read_prompts,
    tokenize_each,
    warn_of_bad,
    writable,
)
from lightning_inversion.errors import InputError
from lightning_inversion.strategy import take
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.selection import Output
from lightning_inversion.transformer.tokens import is_text
from lightning_inversion.verification.noise import NoiseName

_log = logging.getLogger(__name__)

MOST_ROWS = 100_000
"""Rows that repeated prompts may come to: they are listed in memory."""
EFFICIENT = 2048
"""Tokens of a batch beyond which a CPU gains nothing."""


class PromptDataModule(LightningDataModule):
    """Prompts to be recovered, from the command line, a text file or JSONL; or captured targets.

    Prompts of like length share a batch. All processes form the same batches, in the same order,
    the longest prompts first, and each takes the next that nobody has taken and whose rows are
    not finished yet.

    Args:
        prompts: quote them in YAML, where a bare yes or 12 is not a string.
        file: a text file with one prompt per line, or .jsonl whose lines have a key "prompt".
        targets: a file of hidden states instead, from ``lightning-inversion capture`` or another
            tool (.safetensors, .npy, .npz, .pt, or a folder); the prompts need not be known. The
            depth is model.transformer.depth; names such as blocks.7.hook_resid_post choose the
            tensor. FILE.manifest.json beside it may tell what made it, as {"transformer": {"model":
            "gpt2", "depth": 8}, "storage": {"dtype": "bfloat16"}, "prompts": [...], "ids": [...]}.
        layout: what names and shapes in that file leave open.
        known_prefix: tokens or text with which every prompt of that file begins; not verified.
        first_position: the position of its first row; the tokens before it are known_prefix.
        centred: its features lost their mean over the features, as TransformerLens does.
        scale: the factor that its features were multiplied by.
        noise: std of the noise in its features, in the model's units; a token is then verified
            where the chance that another one is right is below one in a million.
        noise_kind: how that noise is distributed.
        largest: the share of each position's features that was kept, the largest by size; the
            others are 0, and noise was added to those that were kept.
        order: unknown where the rows of a prompt are in any order; ``predict`` then finds it first,
            and TokenRecovery verifies the tokens in it.
        logits: they are logits or log-probabilities, from which ``predict`` solves the states
            after the final norm.
        diagnose: where position 0 fits no token, find out why before the search.
        tokenizer: the model whose tokenizer is used; the command line takes model.transformer's.
        revision: revision of that model on the hub.
        depth: of the hidden states in the file; the command line takes model.transformer's.
        layers: several depths instead; the command line takes model.transformer's.
        final_norm: whether they are after the final norm; the command line takes
            model.transformer's.
        output: hidden states, or keys and values; the command line takes model.transformer's.
        special_tokens: let the tokenizer add its special tokens (a BOS, say); a file of captured
            targets lists its own.
        repeat: rows of each prompt, one after another; each row starts from noise of its own.
        tokens_per_batch: tokens of one batch, hence of one epoch, with their padding; auto takes
            as many as are efficient and fit the memory.
        batch_size: rows of one batch at most.
        iterations: iterations of an epoch; the command line takes model.iterations.

    Attributes:
        captured: the features that were read, and where they come from; None for prompts.
        prompts: the prompt of each row; None where it is not known.
        batches: all of them, the same in every process.
        bad: why a prompt cannot be run, by its number; the others are.
        finished: numbers of the prompts whose rows are on disk.
        queue: the batches of this process.
    """

    def __init__(
        self,
        prompts: list[str] | None = None,
        file: str | None = None,
        targets: str | None = None,
        layout: Layout = Layout(),  # noqa: B008 - frozen
        known_prefix: list[int] | str | None = None,
        first_position: int | None = None,
        centred: bool = False,
        scale: float = 1.0,
        noise: float = 0.0,
        noise_kind: NoiseName = "gaussian",
        largest: float = 1.0,
        order: Order = "given",
        logits: bool = False,
        diagnose: bool = True,
        tokenizer: str = TransformerSpec.model,
        revision: str | None = None,
        depth: int | None = TransformerSpec.depth,
        layers: list[int] | None = None,
        final_norm: bool = False,
        output: Output = "hidden_states",
        special_tokens: bool = False,
        tokens_per_batch: int | Literal["auto"] = "auto",
        batch_size: int | None = None,
        iterations: int = 500,
        repeat: int = 1,
    ) -> None:
        super().__init__()
        sources = {"--data.prompts": prompts, "--data.file": file, OPTION: targets}
        given = [option for option, value in sources.items() if value is not None]
        if len(given) != 1:
            raise InputError(
                f"Give one of {', '.join(sources)}; "
                f"{' and '.join(given) or 'none'} {'were' if given else 'was'} given."
            )
        if batch_size is not None and batch_size < 1:
            raise InputError(f"--data.batch_size must be at least 1, and is {batch_size}.")
        if tokens_per_batch != "auto" and tokens_per_batch < 1:
            raise InputError(
                f"--data.tokens_per_batch must be at least 1, or auto, and is {tokens_per_batch}."
            )
        if repeat < 1:
            raise InputError(f"--data.repeat must be at least 1, and is {repeat}.")
        self.tokenizer, self.revision, self.special_tokens = tokenizer, revision, special_tokens
        self.diagnose = diagnose
        request = Request(
            tuple(layers) if layers else None if depth is None else (depth,),
            final_norm, lambda: self._model_shape, layout, first_position,
            self._known(known_prefix), centred, scale, noise, noise_kind, largest, output,
            order, logits,
        )  # fmt: skip
        self.captured = None if targets is None else Captured.read(Path(targets), request)
        self._option = given[0]
        given_prompts: Sequence[str | None]
        if self.captured is not None:
            given_prompts = self.captured.prompts or [None] * len(self.captured.targets)
        else:
            given_prompts = read_prompts(Path(file), self._option) if file else list(prompts or ())
            if not given_prompts:
                raise InputError("--data.prompts holds no prompt; give one or more.")
            if not any(given_prompts):
                raise InputError(f"{self._option}, prompt 1 is empty; give it a text.")
        if repeat > 1 and repeat * len(given_prompts) > MOST_ROWS:
            raise InputError(
                f"--data.repeat {repeat} gives {repeat * len(given_prompts)} rows; at most "
                f"{MOST_ROWS} are run."
            )
        self.prompts: list[str | None] = [one for one in given_prompts for _ in range(repeat)]
        self.repeat = repeat
        self.tokens_per_batch, self.batch_size = tokens_per_batch, batch_size
        self.iterations = iterations
        self.batches: list[PromptBatch] = []
        self.bad: dict[int, str] = {}
        self.finished: set[int] = set()
        self.queue = BatchQueue()
        self._epochs: int | None = None
        self._round = 0

    @cached_property
    def questions(self) -> list[str]:
        """sha256 of what each row is to recover: of the prompt, or of the captured features."""
        if self.captured is not None:
            return [one for one in self.captured.digests() for _ in range(self.repeat)]
        return [
            hashlib.sha256(f"{self.special_tokens} {prompt}".encode(errors="replace")).hexdigest()
            for prompt in self.prompts
        ]

    # -- all batches -------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Tokenise every prompt, before the model is loaded, and form the batches."""
        if not self.batches:
            self.batches = (
                self._prompt_batches()
                if self.captured is None
                else self._captured_batches(self.captured)
            )
            reports = self.trainer is None or self.trainer.is_global_zero
            if reports and self.captured is not None:
                _log.info("%s: %s.", self.captured.name, self.captured.understood)
                for warning in self.captured.warnings:
                    _log.warning("%s", warning)
            if reports or not self.batches:
                warn_of_bad(self.bad, len(self.prompts), self._option)
        self._round += 1
        self.queue = BatchQueue(self.batches, self.finished, self._claim)
        if self.trainer is not None:
            self._epochs = self.trainer.max_epochs

    @cached_property
    def _model_shape(self) -> ModelShape:
        return ModelShape.of(self._spec.config())

    def _known(self, prefix: list[int] | str | None) -> list[int] | None:
        if not isinstance(prefix, str):
            return prefix
        if not is_text(prefix):
            raise InputError("--data.known_prefix has a byte that is no UTF-8; correct it.")
        encoded = self._spec.load_tokenizer()(prefix, add_special_tokens=False)
        return list(encoded["input_ids"])

    @property
    def _spec(self) -> TransformerSpec:
        return TransformerSpec(model=self.tokenizer, revision=self.revision)

    def _prompt_batches(self) -> list[PromptBatch]:
        tokenizer, limits = self._spec.load_tokenizer(), ModelLimits.of(self._spec.config())
        prompts = [prompt or "" for prompt in self.prompts]
        found, self.bad = tokenize_each(prompts, tokenizer, limits, self.special_tokens)
        rows = [(index, prompts[index], ids) for index, ids in found.items()]
        for index in self.bad:
            self.prompts[index] = writable(prompts[index])
        groups = self._packed([len(ids) for _, _, ids in rows])
        return [PromptBatch.collate([rows[row] for row in group]) for group in groups]

    def _captured_batches(self, captured: Captured) -> list[PromptBatch]:
        limits = ModelLimits.of(self._spec.config())
        rows = []
        for index in range(len(self.prompts)):
            number = index // self.repeat
            try:
                limits.check_length(captured.lengths[number])
                limits.check(list(captured.known_prefix))
                if captured.ids is not None:
                    limits.check(list(captured.ids[number]))
                rows.append((index, number))
            except InputError as error:
                self.bad[index] = str(error)
        groups = self._packed([captured.lengths[number] for _, number in rows])
        return [PromptBatch.of_captured([rows[row] for row in group], captured) for group in groups]

    def _packed(self, lengths: list[int]) -> list[list[int]]:
        return pack(lengths, self._budget(), self.batch_size, self.repeat)

    def _budget(self) -> int:
        """Tokens of a batch: as many as are efficient, fewer where the memory is small."""
        if self.tokens_per_batch != "auto":
            return self.tokens_per_batch
        module = None if self.trainer is None else self.trainer.lightning_module
        spec = getattr(module, "spec", self._spec)
        learnable = getattr(module, "learnable", None)
        try:
            return min(EFFICIENT, tokens_that_fit(spec, self._memory(), learnable))
        except InputError:  # a model that cannot be counted: a batch too large comes as two
            return EFFICIENT

    def _memory(self) -> float:
        """Bytes of this process's device, or its share of the machine's."""
        if self.trainer is not None and self.trainer.strategy.root_device.type == "cuda":
            device = torch.cuda.get_device_properties(self.trainer.strategy.root_device)
            return float(device.total_memory)
        processes = 1 if self.trainer is None else self.trainer.num_devices
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / processes

    # -- the batches of this process ---------------------------------------------------------

    def _claim(self, number: int) -> bool:
        return self.trainer is None or take(self.trainer.strategy, f"{self._round}/{number}")

    def advance(self) -> None:
        """Take the batch of the next epoch; the fit ends when there is none."""
        assert self.trainer is not None
        batch = self.queue.advance()
        loop = self.trainer.fit_loop
        ended: Any = loop.epoch_progress.current
        epochs = ended.processed + (batch is not None)
        loop.max_epochs = epochs if self._epochs in (None, -1) else min(epochs, self._epochs)

    def halve(self) -> bool:
        """Put the current batch back as two halves; False, and it is bad, if it is one prompt."""
        left_out = self.queue.halve()
        if left_out is not None:
            self.bad[left_out] = (
                "does not fit the memory even by itself; shorten it, or keep fewer blocks."
            )
        return left_out is None

    def train_dataloader(self) -> Iterations:
        """The batch of the current epoch, once for each iteration."""
        self.advance()
        return Iterations(lambda: self.queue.current, self.iterations)

    def predict_dataloader(self) -> Batches:
        """Every batch that no other process takes and whose rows are not finished, once."""
        return Batches(self.queue.take)

    def val_dataloader(self) -> Iterations:
        """One step for ``validate``, which reads its rows from the checkpoint; none for ``fit``."""
        validating = self.trainer is not None and self.trainer.state.fn == TrainerFn.VALIDATING
        return Iterations(lambda: self.batches[0], int(validating))

    # -- checkpoints -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The rows that this process is running."""
        if self.queue.current is None:
            return {}
        questions = self.questions
        rows = list(self.queue.current.index)
        return {"index": rows, "questions": {row: questions[row] for row in rows}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take their batch again, before another process can."""
        assert self.trainer is not None
        if self.trainer.state.fn != TrainerFn.FITTING:
            return
        if not self.queue.restore(state["index"]):
            raise InputError(
                "--ckpt_path is of a run with other batches; use its --data options, or leave it "
                "out."
            )
