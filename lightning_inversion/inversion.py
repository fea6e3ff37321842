"""``Inversion``: the experiment itself, without Lightning: its parts, one batch, one iteration."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from lightning_inversion.data.batch import PromptBatch
from lightning_inversion.decoding import (
    Decoder,
    TopTokens,
    allowed_ids,
    decode,
    disallowed_tokens,
    natural_decoder,
)
from lightning_inversion.errors import InputError, module_property
from lightning_inversion.inputs import (
    EmbeddingInput,
    InitializerInputs,
    LearnableInput,
    row_noise,
)
from lightning_inversion.objectives import Objective, Standardized, Window
from lightning_inversion.recovery.policy import RecoveryPolicy, Targets, check_known_prefix
from lightning_inversion.recovery.token_recovery import TokenRecovery
from lightning_inversion.schedules import Schedule, VerifiedPrefix
from lightning_inversion.state import BatchState
from lightning_inversion.transformer.embedding import TokenEmbedding
from lightning_inversion.transformer.language_model import LanguageModel
from lightning_inversion.transformer.linear_probe import LinearProbe
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.prefix import FixedPrefix
from lightning_inversion.transformer.truncated import TruncatedTransformer
from lightning_inversion.verification.calibration import Channel
from lightning_inversion.verification.judgement import Verdict
from lightning_inversion.verification.measurements import Measurements
from lightning_inversion.verification.verifier import Verifier

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)
MakeOptimizer = Callable[[Iterable[Any]], torch.optim.Optimizer]


class Inversion(nn.Module):
    """A frozen model, an input, and the parts that make the input match a target's features.

    The rows of a batch are independent: the loss is a sum, the initial values are drawn for each
    prompt by itself, and a stopped row no longer moves.

    Args:
        transformer: the frozen model whose features are matched.
        learnable: what is optimised; default an ``EmbeddingInput``.
        objective: the distance of features; default ``Standardized``: relative L2 and cosine of
            each position, in std of each feature.
        optimizer: makes the optimiser of the input; default Adam at 0.1, about the std of a trained
            embedding (the command line has it in units of that std).
        schedule: which positions are optimised and which are fixed; default ``VerifiedPrefix``.
        decoder: how the input is read as tokens; default the nearest embedding, or the values
            themselves of a ``VocabularyInput``.
        allowed_tokens: only these tokens are decoded: the tokens of a text, or token ids.
        own_tokens: only the tokens of a row's own prompt are decoded, beside ``allowed_tokens``.
        masked_score: the score of a token that is not allowed; 0 reproduces the source's code.
        isolated: run each position by itself, as a prompt of one token, against the prompt's
            features there: the source's sequential experiment, which gives a token no prefix and
            always position 0. The positions are independent and run side by side.
        recovery: the policy of ``predict``; default ``TokenRecovery``. A fit does not use it.
        iterations: N, the most iterations of a batch.
        seed: seed of initial values and perturbations; each prompt draws its own.

    Attributes:
        state: the batch that is optimised; empty where there is none.
        distances: ``[B]`` of the latest iteration; None before the first of a batch.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lightning_inversion.schedules import AllPositions
        >>> _ = torch.manual_seed(0)
        >>> config = LlamaConfig(
        ...     vocab_size=100, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=4, num_attention_heads=4,
        ... )
        >>> transformer = TruncatedTransformer.from_model(LlamaForCausalLM(config), depth=2)
        >>> inversion = Inversion(schedule=AllPositions()).use(transformer)
        >>> inversion.begin(PromptBatch.collate([(0, "a prompt", [11, 42, 7, 8])]))
        >>> optimizer = inversion.make_optimizer([inversion.state.values])
        >>> for _ in range(20):
        ...     distances = inversion.iterate(optimizer)
        >>> best = inversion.top_tokens().best
        >>> best.tolist(), inversion.verify(best).verified.tolist()
        ([[11, 42, 7, 8]], [[True, True, True, True]])
    """

    state: BatchState
    distances: Tensor | None

    def __init__(
        self,
        transformer: TransformerSpec = TransformerSpec(),  # noqa: B008 - a frozen description
        learnable: LearnableInput | None = None,
        objective: Objective | None = None,
        optimizer: MakeOptimizer | None = None,
        schedule: Schedule | None = None,
        decoder: Decoder | None = None,
        allowed_tokens: list[int] | str | None = None,
        own_tokens: bool = False,
        masked_score: float = float("-inf"),
        isolated: bool = False,
        recovery: RecoveryPolicy | None = None,
        iterations: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 1 <= iterations < 2**31:
            raise InputError(
                f"--model.iterations must be at least 1 and less than 2**31, and is {iterations}."
            )
        self.spec = transformer
        self.transformer: TruncatedTransformer | None = None
        self.whole: PreTrainedModel | None = None  # with its head; for predict
        self.learnable = learnable or EmbeddingInput()
        self.objective = objective or Standardized()
        self.make_optimizer = optimizer or _adam
        self.schedule = schedule or VerifiedPrefix()
        self.decoder = decoder or natural_decoder(self.learnable)
        self.allowed_tokens, self.masked_score = allowed_tokens, masked_score
        self.own_tokens, self.isolated = own_tokens, isolated
        self.recovery = recovery or TokenRecovery()
        self.iterations, self.seed = iterations, seed
        self.state = BatchState.empty()
        self.distances = None
        self._channel: Channel | None = None
        self._features: Tensor | None = None
        self._disallowed: Tensor | None = None

    # -- the frozen half ---------------------------------------------------------------------

    def use(
        self,
        transformer: TruncatedTransformer,
        whole: PreTrainedModel | None = None,
        channel: Channel | None = None,
    ) -> Self:
        """Invert a model in memory instead of loading ``transformer``.

        Args:
            transformer: the frozen model.
            whole: the same with its head, for ``predict``; loaded when needed if left out.
            channel: rounding, scaling and noise of the targets, where they were captured.
        """
        self.transformer, self.whole, self._channel = transformer, whole, channel
        return self

    def load(self, needs_whole: bool = False) -> None:
        """Load the frozen model, once.

        Args:
            needs_whole: load the whole model with its head too.
        """
        if self.transformer is None or (needs_whole and self.whole is None):
            _log.info("loading %s ...", self.spec.model)
        if needs_whole and self.whole is None:
            if self.transformer is None:
                self.transformer, self.whole = self.spec.load_with_head()
            else:
                self.whole, _ = self.spec.load_causal_lm()
        if self.transformer is None:
            self.transformer = self.spec.load()
        if self.allowed_tokens is not None or self.own_tokens:
            allowed = allowed_ids(self.allowed_tokens, self.frozen.tokenizer, self.embedding)
            self._disallowed = disallowed_tokens(allowed, self.embedding.vocabulary_size)

    @property
    def frozen(self) -> TruncatedTransformer:
        """The frozen transformer."""
        assert self.transformer is not None, "load has not run"
        return self.transformer

    @property
    def embedding(self) -> TokenEmbedding:
        """The frozen token embedding."""
        return self.frozen.embedding

    @property
    def channel(self) -> Channel | None:
        """What has happened to the targets between the model and this experiment."""
        return self._channel

    @module_property
    def measurements(self) -> Measurements:
        """What is measured once for the model, when it is first asked for."""
        whole = self.whole
        language_model = None if whole is None else LanguageModel(whole, self.frozen.caches)
        return Measurements.measure(self.frozen, language_model, self.channel)

    def probe(self) -> LinearProbe:
        """The linear probe of the model."""
        return self.measurements.probe

    @torch.no_grad()
    def features_of(self, values: Tensor, mask: Tensor) -> Tensor:
        """Features ``[B, T, F]`` of values ``[B, T, C]`` of the learnable input."""
        features: Tensor = self.frozen(self.learnable.embed(values, self.embedding), mask)
        return features.float()

    @torch.no_grad()
    def features_of_ids(
        self, ids: Tensor, batch: PromptBatch, mask: Tensor | None = None
    ) -> Tensor:
        """Features ``[B, T, F]`` that ids ``[B, T]`` would have as targets of a batch.

        The target of a prompt is made of the learnable input's own values for its tokens, which
        need not be their embeddings; a captured target is made by the model itself.
        """
        mask = batch.mask if mask is None else mask
        if batch.target is not None:
            return self.frozen.features_of(ids, mask)
        return self.features_of(self.learnable.encode(ids, self.embedding), mask)

    @torch.no_grad()
    def captured_target(self, batch: PromptBatch) -> Tensor:
        """The captured features ``[B, T, F]``; where none were stored, the known prefix's own.

        In a causal model the features of the known prefix depend on nothing else.
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

    # -- one batch ---------------------------------------------------------------------------

    @torch.no_grad()
    def begin(self, batch: PromptBatch) -> None:
        """Begin a batch: compute its target, and draw its initial values."""
        own = None if batch.ids is None else self.learnable.encode(batch.ids, self.embedding)
        target = self._target(batch)
        given = InitializerInputs(self.embedding, target, self.probe, own)
        noise = self.noise("start", batch)
        self.state = BatchState(batch, self.learnable.initializer(noise, given), target)
        self._prepare()
        self._fix_known_prefix()

    def resume(self, batch: PromptBatch) -> None:
        """Continue the batch of a checkpoint, whose values are restored; compute its target."""
        self.state.batch, self.state.target = batch, self._target(batch)
        self._prepare()

    def _target(self, batch: PromptBatch) -> Tensor:
        if batch.target is not None:
            return self.captured_target(batch)
        assert batch.ids is not None
        return self.features_of_ids(batch.ids, batch)

    def _prepare(self) -> None:
        self._features = self.distances = None
        if self.frozen.causal:
            self.state.prefix = FixedPrefix(self.frozen, len(self.state.batch.index))
        self.objective.calibrate(self.probe)

    def _fix_known_prefix(self) -> None:
        """Fix the tokens that are given; they are not verified."""
        batch = self.state.batch
        if not batch.known_prefix or not isinstance(self.learnable, EmbeddingInput):
            return
        assert self.state.target is not None
        targets = Targets(self.state.target, batch.lengths, batch.known_prefix)
        if batch.target is not None:
            check_known_prefix(self.measurements, targets)
        values = self.learnable.encode(targets.known_ids, self.embedding)
        rows = torch.arange(len(batch.index), device=self.frozen.device)
        for position, value in enumerate(values):
            self.state.fix(rows, torch.full_like(rows, position), value)

    def noise(self, stream: str, batch: PromptBatch | None = None) -> Tensor:
        """Standard normal ``[B, T, C]``, each row's own; ``stream`` names its purpose."""
        batch = batch or self.state.batch
        size = self.learnable.value_size(self.embedding)
        noise = row_noise(self.seed, batch.index, batch.lengths, size, stream)
        return noise.to(self.frozen.device)

    def generated(self) -> Tensor:
        """Features ``[B, T, F]`` of the learnable input as it stands; differentiable."""
        mask = self.state.batch.mask
        vectors = self.learnable.embed(self.state.values, self.embedding)
        if not self.isolated:
            return self.frozen(vectors, mask).float()  # type: ignore[no-any-return]
        singles = self.frozen(vectors.flatten(0, 1)[:, None], mask.flatten()[:, None])
        return singles.float().view(*mask.shape, -1)  # type: ignore[no-any-return]

    def features(self, compute: bool = True) -> Tensor | None:
        """Features ``[B, T, F]`` of the input as it stands, without gradients.

        Args:
            compute: run the model where the latest iteration did not; else None is returned there.
        """
        if self._features is None and compute:
            with torch.no_grad():
                self._features = self.generated()
        return self._features

    def top_tokens(self, k: int = 5, first: int | None = None) -> TopTokens:
        """The k best tokens of each position as the input stands, of the first rows or all."""
        batch, disallowed = self.state.batch, self._disallowed
        if disallowed is not None and self.own_tokens:
            assert batch.ids is not None
            own = torch.where(batch.mask, batch.ids, batch.ids[:, :1])
            disallowed = disallowed.to(own.device).repeat(len(own), 1).scatter(1, own, False)
        return decode(
            self.state.values, self.learnable, self.embedding, self.decoder, k, disallowed,
            self.masked_score, first, batch.mask,
        )  # fmt: skip

    def verify(self, best: Tensor) -> Verdict:
        """Whether decoded tokens ``[B, T]`` reproduce the target."""
        state = self.state
        assert state.target is not None
        features = None if self.isolated else self._features
        if features is not None:  # they are the tokens' own where each vector is the token's
            tokens = self.learnable.encode(best, self.embedding)
            if not torch.equal(state.values[state.batch.mask], tokens[state.batch.mask]):
                features = None
        return self.measurements.derived(Verifier).verify(
            best, state.target, state.batch.mask,
            lambda ids, mask: self.features_of_ids(ids, state.batch, mask), features,
        )  # fmt: skip

    def stop_rows(self, rows: Tensor) -> None:
        """Rows ``[B]`` bool no longer move from this iteration on."""
        self.state.stop(rows)

    def record_ratio(self, ratio: Tensor, met: Tensor) -> None:
        """Keep distance ratios ``[B]`` of the stopping criterion, and which rows meet it."""
        self.state.record_ratio(ratio, met)

    # -- one iteration -----------------------------------------------------------------------

    def iterate(self, optimizer: torch.optim.Optimizer) -> Tensor | None:
        """One iteration without a Trainer: the schedule, then a step; what is fixed does not move.

        Returns:
            ``[B]`` the distances before the step; None where every row had stopped.
        """
        self.reset_momentum(optimizer, self.schedule.before_iteration(self.state, self))
        if bool(self.state.stopped.all()):
            return None
        before = self.state.values.detach().clone()
        optimizer.zero_grad()
        distances = self.compute_distances()
        distances.sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        self.state.hold(before)
        self._features = None
        self.state.iteration += 1
        return distances.detach()

    def reset_momentum(self, optimizer: torch.optim.Optimizer, restarted: Tensor | None) -> None:
        """Clear the optimiser's moments at positions ``[B, T]`` that start again; None for none."""
        if restarted is None:
            return
        values = self.state.values
        if bool(restarted.all()):
            optimizer.state.clear()
        for moment in optimizer.state.get(values, {}).values():
            if isinstance(moment, Tensor) and moment.shape == values.shape:
                moment[restarted] = 0

    def compute_distances(self) -> Tensor:
        """The distance ``[B]`` of each row that still moves, 0 for others; differentiable."""
        state = self.state
        assert state.target is not None
        if (window := self._window()) is None:
            features = self.generated()
            self._features = features.detach()
            self.distances = self.objective(features, state.target, state.compared)
        else:
            assert state.prefix is not None
            self._features = None
            vectors = self.learnable.embed(state.values, self.embedding)
            self.distances = window.distances(vectors, state.prefix, self.objective, state.target)
        return self.distances

    def _window(self) -> Window | None:
        """The few positions that an iteration has to run; None for whole rows."""
        if self.isolated or not self.frozen.causal or not self.objective.by_row:
            return None
        window = Window.of(self.state.compared, self.state.prefix_lengths)
        return window if window is not None and self.frozen.caches else None


def linear_rate(start: float, end: float, iteration: int, iterations: int) -> float:
    """The value at ``iteration`` (from 0) of ``iterations`` that leads from start to end."""
    return start + (end - start) * iteration / max(1, iterations - 1)


def _adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.1)
