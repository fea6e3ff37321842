"""``InputInversion``: a frozen truncated transformer, and an input that learns to match features.

The constructor is the experiment: its arguments are the keys of a YAML file.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error
from torch import Tensor
from transformers import PreTrainedModel

from lightning_inversion.data.batch import PromptBatch
from lightning_inversion.data.prompts import PromptDataModule
from lightning_inversion.decoding import (
    Decoder,
    TopTokens,
    decode,
    disallowed_tokens,
    natural_decoder,
)
from lightning_inversion.errors import InputError
from lightning_inversion.inputs import EmbeddingInput, Given, LearnableInput, row_noise
from lightning_inversion.objectives import Objective, Standardized
from lightning_inversion.recovery.certificate import RecoveredPrompt
from lightning_inversion.recovery.measurements import Measurements
from lightning_inversion.recovery.policy import RecoveryPolicy, recovered
from lightning_inversion.recovery.token_recovery import TokenRecovery
from lightning_inversion.state import Progress
from lightning_inversion.strategy import check_strategy
from lightning_inversion.transformer.embedding import TokenEmbedding
from lightning_inversion.transformer.language_model import LanguageModel
from lightning_inversion.transformer.linear_probe import LinearProbe
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.prefix import KnownPrefix
from lightning_inversion.transformer.truncated import TruncatedTransformer
from lightning_inversion.window import Window


class InputInversion(LightningModule):
    """Optimises an input until its features match a target's (the document's equation 5).

    Each epoch is one batch of prompts, each step one iteration. The rows of a batch are
    independent: the loss is a sum, the start is drawn for each prompt by itself, and a stopped row
    is held still.

    Args:
        transformer: the frozen model whose features are matched.
        learnable: what is optimised; default an ``EmbeddingInput``.
        objective: the distance of features; default ``Standardized``: relative L2
            and cosine of each position, in units of each feature's spread.
        optimizer: makes the optimiser of the input; default Adam at 0.1, about the spread of a
            trained embedding (the command line has it in units of that spread).
        decoder: how the input is read as tokens; default the nearest embedding, or the values
            themselves of a ``VocabularyInput``.
        allowed_tokens: only these tokens are decoded: a text whose tokens are taken, or token ids.
        own_tokens: only the tokens of a row's own prompt are decoded, beside ``allowed_tokens``.
        masked_score: the score of a token that is not allowed; 0 reproduces the document's code.
        alone: run each position by itself, as a text of one token, against the prompt's features
            there: the document's sequential experiment, which gives a token no prefix and always
            position 0. Its positions are independent, so they run side by side.
        recovery: how ``predict`` names the tokens; default ``TokenRecovery``. A fit has no use for
            it.
        iterations: N, the most iterations of a batch.
        seed: seed of the starts and shifts; each prompt draws its own.
    """

    features: Tensor | None
    """``[B, T, F]`` of the input as it stands; None where they have not been computed."""
    prefix: KnownPrefix
    target: Tensor
    distances: Tensor | None
    """``[B]`` of the latest iteration; None before the first."""
    _before_step: Tensor

    def __init__(
        self,
        transformer: TransformerSpec = TransformerSpec(),  # noqa: B008 - a frozen description
        learnable: LearnableInput | None = None,
        objective: Objective | None = None,
        optimizer: OptimizerCallable | None = None,
        decoder: Decoder | None = None,
        allowed_tokens: list[int] | str | None = None,
        own_tokens: bool = False,
        masked_score: float = float("-inf"),
        alone: bool = False,
        recovery: RecoveryPolicy | None = None,
        iterations: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if iterations < 1:
            raise InputError(f"--model.iterations must be at least 1, and is {iterations}.")
        self.strict_loading = False  # a checkpoint holds the input, never the frozen model
        self.spec = transformer
        self.transformer: TruncatedTransformer | None = None
        self.learnable = learnable or EmbeddingInput()
        self.objective = objective or Standardized()
        self.optimizer_of = optimizer or _adam
        self.decoder = decoder or natural_decoder(self.learnable)
        self.allowed_tokens, self.masked_score = allowed_tokens, masked_score
        self.own_tokens, self.alone = own_tokens, alone
        self.recovery = recovery or TokenRecovery()
        self.whole: PreTrainedModel | None = None  # with its head; for predict
        self.watch: Callable[[list[RecoveredPrompt]], None] | None = None
        self.disallowed: Tensor | None = None
        self.iterations, self.seed = iterations, seed
        self.period = iterations  # iterations after which the learning rate starts again
        self.progress = Progress()
        self.batch: PromptBatch | None = None
        self._aimed = False
        self._calibrated = False
        self._said: set[str] = set()
        self.iteration = 0
        self.features = self.distances = None

    # -- the frozen half ---------------------------------------------------------------------

    def use(
        self, transformer: TruncatedTransformer, whole: PreTrainedModel | None = None
    ) -> "InputInversion":
        """Invert a model that is in memory already, instead of loading ``transformer``.

        Args:
            transformer: the frozen model.
            whole: the same with its head, for ``predict``; loaded when needed if left out.
        """
        self.transformer, self.whole = transformer, whole
        return self

    def check(self, trainer: Trainer) -> None:
        """Refuse, before a model loads, processes that would average or crowd each other."""
        check_strategy(trainer)
        if self.spec.device_map is not None and trainer.world_size > 1:
            raise InputError(
                f"--model.transformer.device_map {self.spec.device_map} spreads the model over the "
                f"devices, and --trainer.devices asks for {trainer.world_size} processes that each "
                "hold one; set --trainer.devices 1, or leave device_map out."
            )

    def check_targets(self, data: PromptDataModule) -> None:
        """Refuse captured targets of another model, as far as can be known before it is loaded.

        Raises:
            InputError: says what differs; or that an option needs prompts which are not known.
        """
        captured = data.captured
        if captured is None:
            return
        if self.own_tokens and captured.ids is None:
            raise InputError(
                "--model.own_tokens decodes the tokens of prompts, and --data.targets holds none; "
                "name tokens with --model.allowed_tokens, or capture with --keep_prompts."
            )
        if self.transformer is None:
            captured.check(self.spec.description)
        else:
            captured.check(self.transformer.description, self.transformer.feature_size)

    @property
    def _data(self) -> PromptDataModule | None:
        data = None if self._trainer is None else getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, PromptDataModule) else None

    def setup(self, stage: str) -> None:
        """Check again where no command line did."""
        self.check(self.trainer)
        if self._data is not None:
            self.check_targets(self._data)

    def configure_model(self) -> None:
        """Load the frozen model, once; for ``predict`` the language model too, if it is used."""
        needs_whole = self._predicting and self.recovery.needs_language_model
        if self.transformer is None or (needs_whole and self.whole is None):
            self._say(f"loading {self.spec.model}")
        if needs_whole and self.whole is None:
            if self.transformer is None:
                self.transformer, self.whole = self.spec.load_with_head()
            else:
                self.whole, _ = self.spec.load_causal_lm()
        if self.transformer is None:
            self.transformer = self.spec.load()
        if self._data is not None:
            self.check_targets(self._data)  # now with the weights
        if self.allowed_tokens is not None:
            self.disallowed = disallowed_tokens(self._allowed_ids(), self.embedding.vocabulary_size)
        elif self.own_tokens:
            self.disallowed = disallowed_tokens([], self.embedding.vocabulary_size)

    @property
    def _predicting(self) -> bool:
        return self._trainer is not None and self.trainer.state.fn == TrainerFn.PREDICTING

    def _say(self, what: str) -> None:
        """Tell on stderr what begins, where it is slow: once, and by the first process alone."""
        if self._trainer is None or not self.trainer.is_global_zero or what in self._said:
            return
        self._said.add(what)
        print(f"{what} ...", file=sys.stderr, flush=True)

    @property
    def frozen(self) -> TruncatedTransformer:
        """The frozen transformer."""
        assert self.transformer is not None, "configure_model has not run"
        return self.transformer

    @property
    def embedding(self) -> TokenEmbedding:
        """The frozen token embedding."""
        return self.frozen.embedding

    @property
    def probe(self) -> LinearProbe:
        """The linear guess from features to embeddings, fitted when it is first asked for."""
        return self.measurements.probe

    def _allowed_ids(self) -> list[int]:
        if not isinstance(self.allowed_tokens, str):
            ids = list(self.allowed_tokens or ())
        elif self.frozen.tokenizer is None:
            raise InputError("--model.allowed_tokens is a text, and the model has no tokenizer.")
        else:
            ids = self.frozen.tokenizer(self.allowed_tokens, add_special_tokens=False)["input_ids"]
        vocabulary = self.embedding.vocabulary_size
        if not ids or min(ids) < 0 or max(ids) >= vocabulary:
            raise InputError(
                f"--model.allowed_tokens must name tokens between 0 and {vocabulary - 1}, "
                f"and at least one; it gives {ids[:10]}."
            )
        return ids

    # -- one batch ---------------------------------------------------------------------------

    @torch.no_grad()
    def begin(self, batch: PromptBatch) -> None:
        """Take up a batch: a fresh input and, under a Trainer, a fresh optimiser."""
        self.batch = batch
        self._aim()
        ids = batch.ids
        values = None if ids is None else self.learnable.encode(ids, self.embedding)
        given = Given(self.embedding, self.target, lambda: self.probe, values)
        self.learnable.begin(self.noise("start"), given)
        self.progress.allocate(batch.mask.shape, self.device)
        self.features = self.distances = None
        self._hold_known_prefix()
        if self._trainer is not None:
            self.trainer.strategy.setup_optimizers(self.trainer)

    def _aim(self) -> None:
        """Compute the target features of the batch."""
        assert self.batch is not None
        self._aimed = True
        if self.frozen.causal:
            self.prefix = KnownPrefix(self.frozen, len(self.batch.index))
        if self.batch.target is not None:
            self.target = self.captured_target(self.batch)
        else:
            assert self.batch.ids is not None
            self.target = self.features_of_tokens(self.batch.ids)

    def _hold_known_prefix(self) -> None:
        """Fix the tokens that are known, as if they had been verified."""
        assert self.batch is not None
        known = torch.tensor(self.batch.known_prefix, dtype=torch.long, device=self.device)
        if len(known) and isinstance(self.learnable, EmbeddingInput):
            here = slice(len(known))
            self.learnable.values[:, here] = self.learnable.encode(known, self.embedding)
            self.learnable.held[:, here] = True
            self.progress.verified[:, here] = True

    @torch.no_grad()
    def captured_target(self, batch: PromptBatch) -> Tensor:
        """The captured features of a batch, ``[B, T, F]``; where none were stored, the prefix's.

        The prefix is known there, and in a causal model its features depend on nothing else.
        """
        assert batch.target is not None
        if not batch.known_prefix:
            return batch.target
        known = torch.tensor([batch.known_prefix], device=batch.target.device)
        missing = batch.target[:, : known.shape[1]].isnan()
        target = batch.target.clone()
        own = self.frozen.features_of(known).expand(missing.shape)
        target[:, : known.shape[1]] = own.where(missing, target[:, : known.shape[1]])
        return target

    @torch.no_grad()
    def features_of_tokens(self, ids: Tensor) -> Tensor:
        """Features ``[B, T, F]`` that ids ``[B, T]`` would have as the batch's target.

        A prompt's target is made of the learnable input's own values for its tokens, which need
        not be their embeddings; a captured one is what the model makes of tokens.
        """
        assert self.batch is not None
        if self.batch.target is not None:
            return self.frozen.features_of(ids, self.batch.mask)
        return self.features_of(self.learnable.encode(ids, self.embedding))

    def features_of_best(self, best: Tensor) -> Tensor:
        """Features ``[B, T, F]`` of decoded tokens ``[B, T]``, run again if the input holds others.

        They are the input's own where each of its vectors is the token's.
        """
        assert self.batch is not None
        if self.features is not None and not self.alone:
            held, tokens = self.learnable.values, self.learnable.encode(best, self.embedding)
            if torch.equal(held[self.batch.mask], tokens[self.batch.mask]):
                return self.features
        return self.features_of_tokens(best)

    def noise(self, stream: str) -> Tensor:
        """Standard normal ``[B, T, C]``, each row's own; ``stream`` says what it is for."""
        assert self.batch is not None
        channels = self.learnable.channels(self.embedding)
        noise = row_noise(self.seed, self.batch.index, self.batch.lengths, channels, stream)
        return noise.to(self.device)

    @torch.no_grad()
    def features_of(self, values: Tensor) -> Tensor:
        """Features ``[B, T, F]`` of values ``[B, T, C]`` in place of the learnable input."""
        assert self.batch is not None
        vectors = self.learnable.embed(values, self.embedding)
        features: Tensor = self.frozen(vectors, self.batch.mask)
        return features.float()

    def generated(self) -> Tensor:
        """Features ``[B, T, F]`` of the learnable input, which are matched with the target."""
        assert self.batch is not None
        vectors, mask = self.learnable(self.embedding), self.batch.mask
        if not self.alone:
            return self.frozen(vectors, mask).float()  # type: ignore[no-any-return]
        singles = self.frozen(vectors.flatten(0, 1)[:, None], mask.flatten()[:, None])
        return singles.float().view(*mask.shape, -1)  # type: ignore[no-any-return]

    def _window(self, looked_at: Tensor) -> Window | None:
        """What an iteration has to run; None for whole rows."""
        if self.alone or not self.frozen.causal or not self.objective.by_row:
            return None
        window = Window.of(looked_at, self.learnable.held)
        return window if window is not None and self.frozen.caches else None

    def stop_rows(self, rows: Tensor) -> None:
        """Hold ``rows`` [B] bool still from this iteration on."""
        self.progress.stopped_at[rows & ~self.progress.stopped] = self.iteration
        self.learnable.held |= rows[:, None]

    def top_tokens(self, k: int = 5, first: int | None = None) -> TopTokens:
        """The k best tokens of each position as the input stands, of the first rows or all."""
        disallowed = self.disallowed
        if disallowed is not None and self.own_tokens:
            assert self.batch is not None
            assert self.batch.ids is not None
            own = torch.where(self.batch.mask, self.batch.ids, self.batch.ids[:, :1])
            disallowed = disallowed.to(own.device).repeat(len(own), 1).scatter(1, own, False)
        mask = None if self.batch is None else self.batch.mask
        return decode(
            self.learnable, self.embedding, self.decoder, k, disallowed, self.masked_score, first,
            mask,
        )  # fmt: skip

    # -- Lightning's hooks -------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser of the input: the only parameter there is."""
        return self.optimizer_of([self.learnable.values])

    @property
    def step(self) -> int:
        """Where a metric stands in the logs: iterations so far, and one for each batch before."""
        return int(self.trainer.global_step + self.trainer.current_epoch)

    def take_up(self, batch: PromptBatch, batch_idx: int) -> bool:
        """Before an iteration: begin the batch if it is new; False where it is too large.

        Callbacks that act before an iteration come before the module, and call it too.
        """
        self.iteration = batch_idx
        if self._data is not None and self._data.current is None:
            return False  # given up
        if self.batch is None or self.batch.index != batch.index:
            with self.giving_up_if_too_large():
                self.begin(batch)
        elif not self._aimed:  # resumed within the epoch, with the input but without its target
            self.batch = batch
            self._aim()
        if self.batch is not None and not self._calibrated:
            self.objective.calibrate(lambda: self.probe)  # here, the model is on its device
            self._calibrated = True
        return self.batch is not None

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> int | None:
        """Begin the epoch's batch; -1 ends the epoch when each of its rows has stopped."""
        if not self.take_up(batch, batch_idx):
            return -1
        return -1 if bool(self.progress.stopped.all()) else None

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor | None:
        """One iteration: the summed distance of the rows that still move."""
        if self.batch is None:
            return None
        looked_at = batch.mask & self.progress.focus & ~self.progress.stopped[:, None]
        if (window := self._window(looked_at)) is None:
            features = self.generated()
            self.features = features.detach()
            self.distances = self.objective(features, self.target, looked_at)
        else:
            self.features = None
            vectors = self.learnable(self.embedding)
            self.distances = window.distances(vectors, self.prefix, self.objective, self.target)
        loss = self.distances.sum()
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.iteration % every == 0 and self.logger is not None:
            distance = float(self.distances.detach().mean())
            self.logger.log_metrics({"match/distance": distance}, self.step)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Remember the input as the callbacks have left it, which may have fixed tokens in it."""
        self._before_step = self.learnable.values.detach().clone()

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Step, then put held positions back: momentum must not move them."""
        with self.giving_up_if_too_large():
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            self.learnable.restore_held(self._before_step)
            self.features = None
        if self.batch is None:
            optimizer_closure()  # Lightning wants the outcome of a step: there is none

    @contextmanager
    def giving_up_if_too_large(self) -> Iterator[None]:
        """Where what is done does not fit the memory, end the epoch of the batch."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        """End the epoch of a batch that does not fit the memory: it comes again as two halves.

        Raises:
            BaseException: the error, where it is another than that.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        too_large = isinstance(error, MemoryError) or is_oom_error(error)
        if not too_large or not isinstance(data, PromptDataModule) or self.batch is None:
            raise error
        rows, size = len(self.batch.index), self.batch.size
        if data.halve():
            print(f"{rows} prompts ({size} tokens) are too many for the memory; "
                  "they are run as two batches.", file=sys.stderr)  # fmt: skip
        self.batch = None
        self.learnable.allocate((0, 0, 0))
        self.trainer.strategy.setup_optimizers(self.trainer)
        error.__traceback__ = None  # its frames hold the tensors
        garbage_collection_cuda()

    def on_train_epoch_end(self) -> None:
        """Take the next batch."""
        if isinstance(data := self.trainer.datamodule, PromptDataModule):  # type: ignore[attr-defined]
            data.advance()

    @cached_property
    def measurements(self) -> Measurements:
        """What recovery needs to know of the model, measured when it is first asked for."""
        transformer = self.frozen
        language_model = (
            None if self.whole is None else LanguageModel(self.whole, transformer.caches)
        )
        captured = None if self._data is None else self._data.captured
        channel = None if captured is None else captured.storage
        return Measurements.measure(transformer, language_model, channel, self._say)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[RecoveredPrompt]:
        """Recover the texts of a batch token by token, with certificates."""
        # Lightning predicts in inference mode, where no gradient can ever be taken.
        with torch.inference_mode(False), torch.no_grad():
            if batch.target is not None:
                target = self.captured_target(batch)
            else:
                assert batch.ids is not None
                target = self.frozen.features_of(batch.ids.clone(), batch.mask.clone())
            known = torch.tensor(batch.known_prefix, dtype=torch.long, device=target.device)
            return recovered(
                self.recovery,
                self.measurements,
                target,
                batch.lengths,
                known,
                self._after_round,
                self._start_of(batch),
            )

    def _after_round(self, texts: list[RecoveredPrompt]) -> None:
        """Show what a round has recovered; end here if the process was asked to.

        Lightning only notes a SIGTERM, and looks at its note between the batches of a fit alone.
        """
        if self.watch is not None:
            self.watch(texts)
        if self._trainer is not None and self.trainer.received_sigterm:
            raise SIGTERMException

    def _start_of(self, batch: PromptBatch) -> Tensor | None:
        """What a fit's checkpoint holds of a batch's texts, ``[B, T, D]``, nan for the others."""
        if self.batch is None:
            return None
        vectors = self.learnable(self.embedding).detach()
        start = torch.full((*batch.mask.shape, vectors.shape[-1]), torch.nan, device=vectors.device)
        fitted = {
            key: row
            for row, key in enumerate(
                zip(self.batch.index, self.batch.prompts, self.batch.lengths, strict=True)
            )
        }
        texts = zip(batch.index, batch.prompts, batch.lengths, strict=True)
        for row, (index, prompt, length) in enumerate(texts):
            if (source := fitted.get((index, prompt, length))) is not None:
                start[row, :length] = vectors[source, :length]
        return start

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Scoring a stored input is done by the results callback, which reads it from here."""
        if self.batch is None:
            raise InputError("--ckpt_path holds no input; name a checkpoint of a fit.")
        self.batch = self.batch.to(self.device)
        self._aim()

    # -- checkpoints -------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the input and its prompts; leave the frozen model out."""
        # Lightning goes on behind the last iteration where the totals say that it had ended, and an
        # epoch that is ended before an iteration leaves them uneven: the next one alone counts.
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        progress["total"] = dict(progress["current"])
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {
            k: v for k, v in state.items() if not k.startswith(("transformer.", "whole."))
        }
        if self.batch is not None:
            checkpoint["batch"] = self.batch.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make room for the stored input before it is read."""
        if "batch" not in checkpoint:
            return
        stored = checkpoint["batch"]
        self.batch = PromptBatch.of_state(stored)
        shape = checkpoint["state_dict"]["learnable.values"].shape
        if self._predicting:
            self._check_start(shape)
        self.learnable.allocate(shape)
        self.progress.allocate(stored["mask"].shape, self.device)
        self._aimed = False

    def _check_start(self, shape: Sequence[int]) -> None:
        """Refuse an input that cannot say which tokens to try first."""
        if not self.recovery.takes_start:
            raise InputError(
                f"--ckpt_path has no use for {self.recovery.name}, which chooses its own start; "
                "leave it out, or choose TokenRecovery."
            )
        if shape[-1] != self.learnable.channels(self.embedding):
            raise InputError(
                "--ckpt_path holds an input of another model or kind; name a checkpoint of a fit "
                "with the same --model.transformer and --model.learnable."
            )


def _adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.1)
