"""One call: a model, a text, and what to attribute -> an `AttributionResult`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_inversion.attribution.config import Choices, Look, Method, with_preset
from lightning_inversion.attribution.gradient import gradient_times_input
from lightning_inversion.attribution.integrated import integrated_gradients
from lightning_inversion.attribution.model import (
    FeatureReader,
    LogitReader,
    Reader,
    check_gradients,
    undisturbed,
)
from lightning_inversion.attribution.naming import named_token, replacement_for
from lightning_inversion.attribution.occlusion import clean_pass, occlusion
from lightning_inversion.attribution.provenance import command_line, describe
from lightning_inversion.attribution.result import AttributionResult, Prediction, Query
from lightning_inversion.attribution.scores import (
    FeatureMeasure,
    Measure,
    TokenMeasure,
    combine,
)
from lightning_inversion.errors import InputError
from lightning_inversion.transformer.tokens import pieces, token_text
from lightning_inversion.transformer.truncated import TruncatedTransformer

_TOP = 5
# The largest part of a text's rise that integrated gradients may miss without saying so.
_TOLERATED_GAP = 0.05


def to_stderr(sentence: str) -> None:
    """Where progress is said."""
    print(sentence, file=sys.stderr, flush=True)


def attribute(
    model: PreTrainedModel | TruncatedTransformer,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    choices: Choices | None = None,
    *,
    preset: str | None = None,
    look: Look | None = None,
    name: str | None = None,
    model_options: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = to_stderr,
) -> AttributionResult:
    """Which tokens of `text` what the model says next, or its hidden state, depends on.

    The document's section 'Model Interpretability'. The model is not changed; gradients can be had
    inside `torch.inference_mode()` too.

    Args:
        model: a causal language model of transformers; for `choices.depth` a truncated one will do.
        tokenizer: its tokenizer.
        text: of T tokens, at least one.
        choices: what is attributed, and how.
        preset: 'document' for the document's choices exactly.
        look: how the result is shown.
        name: of the model, in the output; its own if left out.
        model_options: how it was loaded, for the command in the output.
        say: is given the number of forwards before they start, and what was decided.

    Raises:
        InputError: the text is empty or too long, a token is not one, or choices contradict.

    Example::

        result = attribute(model, tokenizer, "The wipers on the bus go swish swish")
        result.print()
        Path("page.html").write_text(result.to_html(), encoding="utf-8")
    """
    choices, look = with_preset(preset, choices or Choices(), look or Look())
    ids = encode(tokenizer, text)
    limit = getattr(model.config, "max_position_embeddings", None) if _is_lm(model) else None
    if limit is not None and len(ids) > limit:
        raise InputError(
            f"The text has {len(ids)} tokens, and the model takes {limit}; shorten it."
        )
    if choices.method_for(len(ids)) != "occlusion":
        check_gradients(model)
    with undisturbed(model):
        work = _Attribution(model, tokenizer, text, ids, choices, say)
        scores, parts = work.run()
        described = describe(model, name)
        return AttributionResult(
            text=text,
            ids=tuple(ids),
            pieces=tuple(pieces(tokenizer, ids)),
            queries=work.queries(),
            scores=scores,
            parts=parts,
            method=work.method,
            signed=_signed(work.method, choices),
            predictions=work.predictions(),
            choices=choices,
            look=look,
            replacement=work.replacement.name if work.method != "gradient" else "",
            model=described,
            command=command_line(
                text, choices, look, preset, {"model": described["model"], **(model_options or {})}
            ),
            forwards=work.forwards,
            notes=tuple(work.notes),
        )


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text, with what the tokenizer itself adds.

    Raises:
        InputError: there are none.
    """
    ids = tokenizer(text)["input_ids"]
    assert isinstance(ids, list)
    if not ids:
        raise InputError("The text is empty: give at least one token to attribute to.")
    return [int(token) for token in ids]


class _Attribution:
    """One text's work: the measure, the methods, and what is said on the way."""

    def __init__(
        self,
        model: PreTrainedModel | TruncatedTransformer,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        ids: Sequence[int],
        choices: Choices,
        say: Callable[[str], None],
    ) -> None:
        self.tokenizer, self.ids, self.choices, self._say = tokenizer, ids, choices, say
        self.notes: list[str] = []
        self.forwards = 0
        self.method: Method = choices.method_for(len(ids))
        if choices.method == "auto" and self.method == "gradient":
            self.note(
                f"{len(ids)} tokens are more than {choices.occlusion_limit} (occlusion_limit): "
                "gradient x input alone, without occlusion."
            )
        self.replacement = replacement_for(tokenizer, choices.replacement)
        if self.replacement.note and self.method != "gradient":
            self.note(self.replacement.note)
        # Named tokens are looked up before anything is run.
        named = {
            option: named_token(tokenizer, name, option)
            for option in ("token", "against")
            if (name := getattr(choices, option)) is not None
        }
        self.reader = _reader(model, choices)
        self.embeds = self.reader.embed(torch.tensor(ids))
        last = len(ids) - 1
        positions = range(len(ids)) if choices.every_token else [last]
        self.at = torch.tensor(list(positions), device=self.reader.device)
        self._targets: Tensor | None = None
        self._against = named.get("against")
        self._clean = clean_pass(self.reader, self.embeds, self.at)
        self.forwards += 1
        self.measure = self._measure(named.get("token"))

    def note(self, sentence: str) -> None:
        """Said now, and kept in the result."""
        self.notes.append(sentence)
        self._say(sentence)

    def run(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The scores [R, T] and the parts they are made of."""
        if self.method == "gradient":
            scores = self._gradient()
            return scores, {"gradient": scores}
        if self.method == "occlusion":
            scores = self._occlusion()
            return scores, {"occlusion": scores}
        if self.method == "integrated":
            scores = self._integrated()
            return scores, {"integrated": scores}
        occluded, gradient = self._occlusion(), self._gradient()
        scores = combine(occluded, gradient, self.choices.weight)
        return scores, {"occlusion": occluded, "gradient": gradient}

    def queries(self) -> tuple[Query, ...]:
        """What was attributed."""
        if self._targets is None:
            return tuple(Query(int(position)) for position in self.at)
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
            for row, (position, token) in enumerate(zip(self.at, self._targets, strict=True))
        )

    def predictions(self) -> tuple[Prediction, ...]:
        """The most probable next tokens."""
        if self._targets is None:
            return ()
        top = self._clean.outputs[-1].softmax(-1).topk(_TOP)
        return tuple(
            Prediction(int(token), token_text(self.tokenizer, int(token)), float(probability))
            for probability, token in zip(top.values, top.indices, strict=True)
        )

    def _measure(self, token: int | None) -> Measure:
        choices, outputs = self.choices, self._clean.outputs
        if choices.depth is not None:
            return FeatureMeasure.seeded(
                choices.probes, outputs.shape[-1], choices.seed, choices.occlusion_distance
            )
        next_tokens = self.ids[1:] if choices.every_token else []
        following = int(outputs[-1].argmax()) if token is None else token
        device = outputs.device
        self._targets = torch.tensor([*next_tokens, following], device=device)
        against = (
            None
            if self._against is None
            else torch.full_like(self._targets, self._against, device=device)
        )
        return TokenMeasure(self._targets, against, choices.scalar, choices.occlusion_distance)

    def _gradient(self) -> Tensor:
        count = len(self.at) * self.measure.repeats
        self.forwards += count
        if count > 1:
            self._say(f"gradient x input: {count} forwards and backwards.")
        return gradient_times_input(
            self.reader,
            self.embeds,
            self.at,
            self.measure,
            self.choices.reduction,
            self.choices.batch_size,
        )

    def _occlusion(self) -> Tensor:
        count = len(self.ids)
        self.forwards += count
        how = "from the replaced token on" if self._clean.prefix else "whole"
        self._say(f"occlusion: {count} forwards, in batches, each {how}.")
        if self._clean.prefix is None and self.choices.depth is None:
            self.note(f"No keys and values are shared between forwards: {self._clean.why_plain}.")
        with self._progress(count) as advance:
            return occlusion(
                self.reader,
                self.embeds,
                self.at,
                self.measure,
                self.replacement.vector(self.reader),
                self.choices.batch_size,
                self._clean,
                advance,
            )

    @contextmanager
    def _progress(self, count: int) -> Iterator[Callable[[int], None]]:
        """A bar beside what is said on stderr; none where somebody else is told."""
        quiet = self._say is not to_stderr
        columns = ("occlusion", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as bar:
            task = bar.add_task("occlusion", total=count)
            yield lambda rows: bar.advance(task, rows)

    def _integrated(self) -> Tensor:
        count = len(self.at) * self.choices.steps
        self.forwards += count + 1
        self._say(f"integrated gradients: {count} forwards and backwards.")
        scores, missing = integrated_gradients(
            self.reader,
            self.embeds,
            self.at,
            self.measure,
            self.replacement.vector(self.reader),
            self.choices.steps,
            self.choices.reduction,
            self.choices.batch_size,
        )
        largest = float(missing.abs().max())
        if largest > _TOLERATED_GAP:
            self.note(
                f"Integrated gradients miss {largest:.2g} of what they should add up to; "
                "more steps make that less."
            )
        return scores


def _is_lm(model: nn.Module) -> bool:
    return isinstance(model, PreTrainedModel)


def _reader(model: PreTrainedModel | TruncatedTransformer, choices: Choices) -> Reader:
    if isinstance(model, TruncatedTransformer):
        if choices.depth is None:
            raise InputError(
                "A truncated transformer predicts no token: give --depth, or the whole model."
            )
        if choices.depth != model.depth:
            raise InputError(
                f"--depth {choices.depth} is not the model's depth, which is {model.depth}."
            )
        return FeatureReader(model)
    if choices.depth is None:
        return LogitReader(model)
    return FeatureReader(TruncatedTransformer.from_model(model, depth=choices.depth))


def _signed(method: Method, choices: Choices) -> bool:
    if choices.depth is not None or method == "combined":
        return False
    if method == "occlusion":
        return choices.occlusion_distance == "drop"
    return choices.reduction == "sum"
