"""One call: a model, a text and what to attribute -> an `AttributionResult`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, overload

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor

from lightning_inversion.attribution import methods
from lightning_inversion.attribution.config import Choices, Display, command_line, with_preset
from lightning_inversion.attribution.measures import FeatureMeasure, TokenMeasure, combine
from lightning_inversion.attribution.model import (
    check_gradients,
    describe,
    reader_of,
    undisturbed,
    whole_model,
)
from lightning_inversion.attribution.relevance import relevance_rules
from lightning_inversion.attribution.replacement import Replacement
from lightning_inversion.attribution.result import AttributionResult, AttributionResults
from lightning_inversion.attribution.scores import Prediction, Query
from lightning_inversion.data.texts import ModelLimits, tokenize
from lightning_inversion.errors import InputError
from lightning_inversion.transformer.tokens import named_token, token_text, token_texts
from lightning_inversion.transformer.truncated import TruncatedTransformer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

_PREDICTIONS = 5
_TOLERATED_GAP = 0.05
"""The largest part of a rise that integrated gradients may miss without a note."""
_SMALLEST_RISE = 1e-4
"""Rises below it count as this large: of a smaller one, rounding alone is a considerable part."""


@overload
def attribute(
    model: PreTrainedModel | TruncatedTransformer,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    choices: Choices | None = None,
    *,
    preset: str | None = None,
    display: Display | None = None,
    name: str | None = None,
    model_options: Mapping[str, Any] | None = None,
) -> AttributionResult: ...


@overload
def attribute(
    model: PreTrainedModel | TruncatedTransformer,
    tokenizer: PreTrainedTokenizerBase,
    text: list[str] | tuple[str, ...],
    choices: Choices | None = None,
    *,
    preset: str | None = None,
    display: Display | None = None,
    name: str | None = None,
    model_options: Mapping[str, Any] | None = None,
) -> AttributionResults: ...


def attribute(
    model: PreTrainedModel | TruncatedTransformer,
    tokenizer: PreTrainedTokenizerBase,
    text: str | list[str] | tuple[str, ...],
    choices: Choices | None = None,
    *,
    preset: str | None = None,
    display: Display | None = None,
    name: str | None = None,
    model_options: Mapping[str, Any] | None = None,
) -> AttributionResult | AttributionResults:
    """Which tokens of a text the model's prediction, or its hidden state, depends on.

    The source's section 'Model Interpretability'. The model is not changed. Gradients are computed
    inside `torch.inference_mode()` too.

    Args:
        model: a causal language model of transformers; with `choices.depth`, also a truncated one.
        tokenizer: of the model.
        text: of T tokens, at least one; or several texts.
        choices: what is attributed, and how.
        preset: 'original' for the source's choices.
        display: how the result is shown.
        name: of the model, in the output; its own if left out.
        model_options: options of `TransformerSpec` that loaded it, for the command in the output.

    Raises:
        InputError: a text or the list is empty, a text is too long, an option does not name a
            token, options contradict, or an argument is of another kind.

    Example::

        result = attribute(model, tokenizer, "The wipers on the bus go swish swish")
        result.print()
        Path("page.html").write_text(result.to_html(), encoding="utf-8")
    """
    _check_arguments(model, tokenizer, text)
    if not isinstance(text, str):
        if not text:
            raise InputError("text is an empty list; give one or several texts.")
        return AttributionResults(
            attribute(
                model, tokenizer, one, choices,
                preset=preset, display=display, name=name, model_options=model_options,
            )
            for one in text
        )  # fmt: skip
    choices, display = with_preset(preset, choices or Choices(), display or Display())
    ids = encode(tokenizer, text, whole_model(model).config)
    if choices.method_for(len(ids)) != "occlusion":
        check_gradients(model)
    with undisturbed(model):
        work = _Attribution(model, tokenizer, ids, choices)
        parts = work.parts()
        if work.method == "combined":
            scores = combine(parts["occlusion"], parts["gradient"], choices.weight)
        else:
            (scores,) = parts.values()
        work.check_finite(scores)
    described = describe(model, name)
    return AttributionResult(
        text=text,
        ids=tuple(ids),
        tokens=tuple(token_texts(tokenizer, ids)),
        queries=work.queries(),
        scores=scores,
        parts=parts,
        method=work.method,
        predictions=work.predictions(),
        choices=choices,
        replacement=work.replacement.name if work.replaces else "",
        model=described,
        command=command_line(
            text, choices, display, preset, {"model": described["model"], **(model_options or {})}
        ),
        forwards=work.forwards,
        notes=tuple(work.notes),
        display=display,
    )


def _check_arguments(model: Any, tokenizer: Any, text: Any) -> None:
    if not hasattr(whole_model(model), "config"):
        raise InputError(
            f"model is a {type(model).__name__}; give a causal language model of transformers."
        )
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise InputError(
            f"tokenizer is a {type(tokenizer).__name__}; give a tokenizer of transformers."
        )
    if not isinstance(text, Iterable):
        raise InputError(f"text is a {type(text).__name__}; give a text, or a list of texts.")


def encode(tokenizer: PreTrainedTokenizerBase, text: str, config: PretrainedConfig) -> list[int]:
    """The tokens of a text, with those that the tokenizer adds.

    Args:
        tokenizer: of the model.
        text: what is attributed.
        config: of the model, for its limits.

    Raises:
        InputError: there is no token, or the model cannot run them.
    """
    try:
        return tokenize(text, tokenizer, ModelLimits.of(config), special_tokens=True)
    except InputError as error:
        raise InputError(f"The text {error}") from error


class _Attribution:
    """The work on one text: its clean pass, the measure, the methods, and notes on the way."""

    def __init__(
        self,
        model: PreTrainedModel | TruncatedTransformer,
        tokenizer: PreTrainedTokenizerBase,
        ids: Sequence[int],
        choices: Choices,
    ) -> None:
        self.tokenizer, self.ids, self.choices = tokenizer, ids, choices
        self.notes: list[str] = []
        self.method = choices.method_for(len(ids))
        if choices.method == "auto" and self.method == "gradient":
            self._note(
                f"{len(ids)} tokens are more than {choices.occlusion_limit} (occlusion_limit): "
                "gradient x input alone, without occlusion."
            )
        vocabulary = ModelLimits.of(whole_model(model).config).vocabulary
        self.replacement = Replacement.named(tokenizer, choices.replacement, vocabulary)
        if self.replacement.note and self.replaces:
            self._note(self.replacement.note)
        # Named tokens are looked up before anything is run.
        token, self._against = (
            None if name is None else named_token(tokenizer, name, option, vocabulary)
            for option, name in (("token", choices.token), ("against", choices.against))
        )
        reader = reader_of(model, choices.depth)
        embeds = reader.embed(torch.tensor(ids))
        positions = range(len(ids)) if choices.every_token else [len(ids) - 1]
        at = torch.tensor(list(positions), device=reader.device)
        self._clean = methods.clean_pass(reader, embeds, at)
        self.forwards = 1
        outputs, distance = self._clean.outputs, choices.occlusion_distance
        self._targets: Tensor | None = None
        measure: FeatureMeasure | TokenMeasure
        if choices.depth is None:
            following = int(outputs[-1].argmax()) if token is None else token
            targets = [*ids[1:], following] if choices.every_token else [following]
            self._targets = torch.tensor(targets, device=outputs.device)
            against = (
                None if self._against is None else torch.full_like(self._targets, self._against)
            )
            measure = TokenMeasure(self._targets, against, choices.scalar, distance)
        else:
            features = outputs.shape[-1]
            measure = FeatureMeasure.seeded(choices.probes, features, choices.seed, distance)
        self.task = methods.Task(reader, embeds, at, measure, choices.batch_size)

    @property
    def replaces(self) -> bool:
        """Whether the method replaces tokens, or begins at a replacement."""
        return self.method not in ("gradient", "lrp")

    def parts(self) -> dict[str, Tensor]:
        """The raw scores [R, T] of each method that runs."""
        if self.method == "integrated":
            return {"integrated": self._integrated()}
        if self.method == "lrp":
            with relevance_rules(self.task.reader.model):
                return {"lrp": self._gradient()}
        parts = {}
        if self.method in ("occlusion", "combined"):
            parts["occlusion"] = self._occlusion()
        if self.method in ("gradient", "combined"):
            parts["gradient"] = self._gradient()
        return parts

    def check_finite(self, scores: Tensor) -> None:
        """Note how many scores [R, T] of tokens up to their query are not finite."""
        visible = self.task.visible
        wrong = int((visible & ~scores.isfinite()).sum())
        if wrong:
            self._note(
                f"{wrong} of {int(visible.sum())} scores are not finite: the model overflows or "
                "its weights are not finite; load it with --dtype float32."
            )

    def queries(self) -> tuple[Query, ...]:
        """The positions and targets [R] that were attributed."""
        if self._targets is None:
            return tuple(Query(int(position)) for position in self.task.at)
        against = None if self._against is None else token_text(self.tokenizer, self._against)
        probabilities = self._clean.outputs.softmax(-1)
        return tuple(
            Query(
                position=int(position),
                token=int(token),
                text=token_text(self.tokenizer, int(token)),
                probability=float(probabilities[row, token]),
                against=against,
            )
            for row, (position, token) in enumerate(zip(self.task.at, self._targets, strict=True))
        )

    def predictions(self) -> tuple[Prediction, ...]:
        """The most probable next tokens."""
        if self._targets is None:
            return ()
        top = self._clean.outputs[-1].softmax(-1).topk(_PREDICTIONS)
        return tuple(
            Prediction(int(token), token_text(self.tokenizer, int(token)), float(probability))
            for probability, token in zip(top.values, top.indices, strict=True)
        )

    def _gradient(self) -> Tensor:
        count = len(self.task.at) * self.task.measure.repeats
        self.forwards += count
        if count > 1:
            _log.info("%s: %d forwards and backwards", self.method, count)
        return methods.gradient_times_input(self.task, self.choices.reduction)

    def _occlusion(self) -> Tensor:
        count, clean = len(self.ids), self._clean
        self.forwards += count
        extent = "from the replaced token on" if clean.prefix else "whole"
        forwards = "1 forward" if count == 1 else f"{count} forwards, in batches, each"
        _log.info("occlusion: %s %s", forwards, extent)
        if clean.prefix is None and self.choices.depth is None:
            self._note(f"Forwards share no keys and values: {clean.why_plain}.")
        with _occlusion_bar(count) as advance:
            return methods.occlusion(
                self.task, self.replacement.vector(self.task.reader), clean, advance
            )

    def _integrated(self) -> Tensor:
        choices = self.choices
        count = len(self.task.at) * choices.steps
        self.forwards += count + 1
        _log.info("integrated gradients: %d forwards and backwards", count)
        baseline = self.replacement.vector(self.task.reader)
        found = methods.integrated_gradients(self.task, baseline, choices.steps, choices.reduction)
        gaps = found.missing.abs() / found.rise.abs().clamp_min(_SMALLEST_RISE)
        worst = int(gaps.argmax())
        if float(gaps[worst]) > _TOLERATED_GAP:
            self._note(
                f"Integrated gradients miss {float(found.missing[worst]):.2g} of a rise of "
                f"{float(found.rise[worst]):.2g} that they should add up to; raise --steps."
            )
        return found.scores

    def _note(self, sentence: str) -> None:
        self.notes.append(sentence)
        _log.warning("%s", sentence)


@contextmanager
def _occlusion_bar(count: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, where messages are shown."""
    columns = ("occlusion", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not _log.isEnabledFor(logging.INFO)
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task("occlusion", total=count)
        yield lambda rows: bar.advance(task, rows)
