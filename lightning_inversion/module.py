"""``InputInversion``: the experiment under Lightning, in the order in which its hooks are called.

An epoch is one batch of prompts, a step is one iteration: ``on_train_batch_start`` (the schedule),
``training_step`` (the objective), ``optimizer_step``. The numerics are in ``inversion.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error
from torch import Tensor

from lightning_inversion.data.batch import PromptBatch
from lightning_inversion.data.prompts import PromptDataModule
from lightning_inversion.data.targets import OPTION, Captured
from lightning_inversion.errors import InputError, module_property
from lightning_inversion.inversion import Inversion
from lightning_inversion.recovery.captured import Origin, explain, recover_captured
from lightning_inversion.recovery.diagnosis import Diagnosis, diagnose
from lightning_inversion.recovery.policy import RecoveredPrompt, Targets, recover_prompts
from lightning_inversion.recovery.variants import OtherCuts
from lightning_inversion.state import BatchState
from lightning_inversion.strategy import check_strategy
from lightning_inversion.transformer.blocks import frozen_copy, without_head
from lightning_inversion.transformer.truncated import TruncatedTransformer
from lightning_inversion.transformer.unembedding import Unembedding
from lightning_inversion.verification.calibration import Channel
from lightning_inversion.verification.measurements import Measurements

_log = logging.getLogger(__name__)
RoundListener = Callable[[list[RecoveredPrompt]], None]


class InputInversion(Inversion, LightningModule):
    """Optimises an input until its features match a target's (the source's equation 5).

    The arguments are those of ``Inversion``. Callbacks read ``state`` and call ``stop_rows``,
    ``record_ratio``, ``top_tokens``, ``verify`` and ``report``; they set no attribute.
    """

    _recovered_before = False

    # -- before the first batch --------------------------------------------------------------

    def check(self, trainer: Trainer, data: PromptDataModule | None = None) -> None:
        """Refuse what does not fit together, as far as the options show it.

        Raises:
            InputError: names the options, and the way out.
        """
        check_strategy(trainer)
        self.spec.check()
        self.schedule.check(self)
        if self.spec.device_map is not None and trainer.world_size > 1:
            raise InputError(
                f"--model.transformer.device_map {self.spec.device_map} spreads the model over the "
                f"devices, and --trainer.devices asks for {trainer.world_size} processes that each "
                "hold one; set --trainer.devices 1, or leave device_map out."
            )
        if data is None or data.captured is None:
            return
        if trainer.state.fn == TrainerFn.FITTING:
            data.captured.check_for_fit()
        if self.own_tokens and data.captured.ids is None:
            raise InputError(
                "--model.own_tokens decodes the tokens of prompts, and --data.targets holds none; "
                "name tokens with --model.allowed_tokens, or capture with --keep_prompts."
            )
        if self.transformer is None:
            data.captured.check(self.spec.description)
        else:
            data.captured.check(self.transformer.description, self.transformer.feature_size)

    @property
    def _data(self) -> PromptDataModule | None:
        data = None if self._trainer is None else getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, PromptDataModule) else None

    @property
    def channel(self) -> Channel | None:
        """How captured targets were stored."""
        return None if self._captured is None else self._captured.storage

    @property
    def _captured(self) -> Captured | None:
        return None if self._data is None else self._data.captured

    @property
    def _predicting(self) -> bool:
        return self._trainer is not None and self.trainer.state.fn == TrainerFn.PREDICTING

    def setup(self, stage: str) -> None:
        """Repeat the checks where no command line made them; check a fit's prompt lengths too."""
        self.strict_loading = False  # a checkpoint holds the batch's state, not the frozen model
        self.check(self.trainer, self._data)
        if stage == "fit" and self._data is not None:
            longest = max(batch.mask.shape[1] for batch in self._data.batches)
            self.schedule.check_length(longest, self.iterations)

    def configure_model(self) -> None:
        """Load the frozen model, once; for ``predict`` the whole model too, if it is used."""
        captured = self._captured
        needs_head = self.recovery.needs_language_model or (
            captured is not None and captured.logits
        )
        self.load(needs_whole=self._predicting and needs_head)
        if self._trainer is not None:
            self.check(self.trainer, self._data)  # now with the weights
        if captured is not None and captured.storage.centred:
            self.transformer = self.frozen.centred()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser of the input: the only parameter there is."""
        return self.make_optimizer([self.state.values])

    # -- one iteration -----------------------------------------------------------------------

    @property
    def step(self) -> int:
        """The step of a metric in the logs: iterations so far, and one for each batch before."""
        return int(self.trainer.global_step + self.trainer.current_epoch)

    @property
    def logs_now(self) -> bool:
        """Whether metrics of this iteration go to the logger (``--trainer.log_every_n_steps``)."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return self.state.iteration % every == 0

    def report(self, metrics: dict[str, float]) -> None:
        """Metrics for the logger, and for Lightning's own tools (``ModelCheckpoint(monitor=)``)."""
        if not self._predicting:
            self.log_dict(metrics, prog_bar=True, logger=False, batch_size=1)
        if self.logger is not None:
            self.logger.log_metrics(metrics, self.step)

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> int | None:
        """Begin the epoch's batch; the schedule; -1 ends the epoch where every row has stopped."""
        if self._data is not None and self._data.queue.current is None:
            return -1  # it was too large
        with self._halving_if_too_large():
            if self.state.batch.index != batch.index:
                if batch.target is not None:
                    explain(self._targets(batch), self._origin(batch))
                    self._recovered_before = True
                self.begin(batch)
                self.trainer.strategy.setup_optimizers(self.trainer)  # of the new values
            elif self.state.target is None:
                self.resume(batch)
            self.state.iteration = batch_idx
            restarted = self.schedule.before_iteration(self.state, self)
            self.reset_momentum(self.trainer.optimizers[0], restarted)
        return -1 if bool(self.state.stopped.all()) else None

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor | None:
        """One iteration: the summed distance of the rows that still move."""
        if self.state.is_empty:
            return None  # the batch was too large
        distances = self.compute_distances()
        if self.logs_now:
            self.report({"match/distance": float(distances.detach().mean())})
        return distances.sum()

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Step, then put back what does not move: momentum must not move it."""
        before = self.state.values.detach().clone()
        with self._halving_if_too_large():
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            self.state.hold(before)
        self._features = None
        if self.state.is_empty:
            optimizer_closure()  # Lightning needs the result of a step, which is None

    def on_train_epoch_end(self) -> None:
        """The batch has ended; take the next."""
        self.schedule.after_batch(self.state)
        if self._data is not None:
            self._data.advance()

    @contextmanager
    def _halving_if_too_large(self) -> Iterator[None]:
        """A batch that does not fit the memory ends its epoch, and comes again as two halves.

        Raises:
            BaseException: any other error.
        """
        try:
            yield
            return
        except (RuntimeError, MemoryError) as error:
            too_large = isinstance(error, MemoryError) or is_oom_error(error)
            if not too_large or self._data is None:
                raise
            error.__traceback__ = None  # its frames hold the tensors
        batch = self._data.queue.current
        if batch is not None and self._data.halve():
            _log.warning(
                "%d prompts (%d tokens) are too many for the memory; they are run as two batches.",
                len(batch.index),
                batch.size,
            )
        self.state = BatchState.empty().to(self.device)
        self.trainer.strategy.setup_optimizers(self.trainer)
        garbage_collection_cuda()

    # -- predict and validate ----------------------------------------------------------------

    @cached_property
    def _round_listeners(self) -> list[RoundListener]:
        return []

    def after_each_round(self, listener: RoundListener) -> None:
        """Call ``listener`` with the prompts of a batch after each round of ``predict``."""
        self._round_listeners.append(listener)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[RecoveredPrompt]:
        """Recover the prompts of a batch token by token, with certificates."""
        # Lightning predicts in inference mode, where no gradient can ever be taken.
        with torch.inference_mode(False), torch.no_grad():
            targets = self._targets(batch)
            if batch.target is None:
                return recover_prompts(self.recovery, self.measurements, targets, self._after_round)
            prompts = recover_captured(
                self.recovery, lambda: self.measurements, targets, self._origin(batch),
                self._after_round,
            )  # fmt: skip
            self._recovered_before = True
            return prompts

    def _targets(self, batch: PromptBatch) -> Targets:
        """The features of a batch from position 0 on."""
        if batch.target is None:
            assert batch.ids is not None
            features = self.frozen.features_of(batch.ids.clone(), batch.mask.clone())
        else:
            features = self.captured_target(self._solved(batch))
        fitted = self._fitted(batch) if self._predicting else None
        return Targets(features, batch.lengths, batch.known_prefix, fitted)

    def _solved(self, batch: PromptBatch) -> PromptBatch:
        """A batch of captured states, where logits are captured."""
        if self._captured is None or not self._captured.logits or batch.target is None:
            return batch
        assert self.whole is not None
        missing = batch.target.isnan().all(-1, keepdim=True)
        states = Unembedding.of(self.whole).states(batch.target.nan_to_num())
        return replace(batch, target=states.masked_fill(missing, torch.nan))

    def _origin(self, batch: PromptBatch) -> Origin:
        """Where the captured features of a batch come from."""
        data, captured = self._data, self._captured
        assert data is not None
        assert captured is not None
        asked = data.diagnose and self.frozen.causal
        return Origin(
            f"{OPTION} {captured.name!r}", batch.index, self._diagnose if asked else None,
            captured.in_order, first=not self._recovered_before,
        )  # fmt: skip

    def _diagnose(self, targets: Targets) -> list[Diagnosis | None]:
        return diagnose(self._first_tokens, targets, self._other_cuts())

    @module_property
    def _first_tokens(self) -> Measurements:
        return Measurements.measure(self.frozen, channel=self.channel, first_alone=True)

    def _other_cuts(self) -> OtherCuts:
        """The same model at other depths; it is loaded only where a scan asks for it."""

        whole = replace(self.spec, depth=None, layers=None, output="hidden_states")

        def at(depths: tuple[int, ...], final_norm: bool) -> TruncatedTransformer:
            spec = replace(whole, layers=list(depths), features=None, final_norm=final_norm)
            if self.whole is None or self.frozen.tokenizer is None:
                return spec.load().to(self.device)
            return spec.cut(frozen_copy(without_head(self.whole)), self.frozen.tokenizer)

        return OtherCuts(at, whole.blocks_needed())

    def _after_round(self, prompts: list[RecoveredPrompt]) -> None:
        for listener in self._round_listeners:
            listener(prompts)

    def _fitted(self, batch: PromptBatch) -> Tensor | None:
        """The input that a checkpoint holds of a batch's prompts, ``[B, T, D]``, nan for others."""
        stored = self.state.batch
        if self.state.is_empty:
            return None
        vectors = self.learnable.embed(self.state.values, self.embedding).detach()
        fitted = torch.full((*batch.mask.shape, vectors.shape[-1]), torch.nan).to(vectors)
        keys = zip(stored.index, stored.prompts, stored.lengths, strict=True)
        rows = {key: row for row, key in enumerate(keys)}
        prompts = zip(batch.index, batch.prompts, batch.lengths, strict=True)
        for row, key in enumerate(prompts):
            if key in rows:
                length = key[2]
                fitted[row, :length] = vectors[rows[key], :length]
        return fitted

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Restore a stored input, which ``ResultWriter`` scores."""
        if self.state.is_empty:
            raise InputError("--ckpt_path holds no input; name a checkpoint of a fit.")
        self.resume(self.state.batch.to(self.device))

    # -- checkpoints -------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the batch's state, and nothing of the frozen model."""
        # Lightning resumes after the last iteration where the totals count it as ended. An epoch
        # that ends before an iteration leaves them uneven, so that only the current ones count.
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        progress["total"] = dict(progress["current"])
        checkpoint["state_dict"] = {}
        if not self.state.is_empty:
            checkpoint["state"] = self.state.to_checkpoint()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the stored state; its target is computed when the batch begins."""
        if "state" not in checkpoint:
            return
        self.state = BatchState.from_checkpoint(checkpoint["state"], self.device)
        self._check_stored(self.state)

    def _check_stored(self, state: BatchState) -> None:
        """Refuse an input of another model, or one that cannot help ``predict``."""
        if self._predicting and not self.recovery.uses_fit:
            raise InputError(
                f"--ckpt_path is not used by {self.recovery.name}; leave it out, or choose "
                "--model.recovery TokenRecovery."
            )
        ids = state.batch.ids
        highest = 0 if ids is None else int(ids.max())
        if (
            state.values.shape[-1] != self.learnable.value_size(self.embedding)
            or not 0 <= highest < self.embedding.vocabulary_size
        ):
            raise InputError(
                "--ckpt_path holds an input of another model or kind; name a checkpoint of a fit "
                "with the same --model.transformer and --model.learnable."
            )
