"""What a notebook holds, as the package reads it: a model or its name, and hidden states."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_inversion.data.key_values import holds_caches
from lightning_inversion.data.layout import Layout, ModelShape
from lightning_inversion.data.request import Order, Request
from lightning_inversion.data.targets import Captured
from lightning_inversion.errors import InputError
from lightning_inversion.transformer.blocks import frozen_copy
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.selection import Output
from lightning_inversion.transformer.truncated import TruncatedTransformer
from lightning_inversion.verification.noise import NoiseName

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
_ARGUMENTS = {
    "--model.recovery": "policy", "--model.transformer.": "", "--data.": "", "--model.": "",
}  # fmt: skip
"""How options begin, and the arguments of calls that are the same."""


@contextmanager
def errors_name_arguments() -> Iterator[None]:
    """Rewrite errors: they name arguments, not options of the command line."""
    try:
        yield
    except InputError as error:
        raise InputError(naming_arguments(str(error))) from error


def naming_arguments(sentence: str) -> str:
    """A sentence with arguments of ``recover`` and ``invert`` in place of options."""
    for option, argument in _ARGUMENTS.items():
        sentence = sentence.replace(option, argument)
    return sentence


def check_kind(name: str, value: Any, kind: type) -> None:
    """Raise InputError for an argument that is no instance of a class; None is its default."""
    if value is not None and not isinstance(value, kind):
        wanted = "whole number" if kind is Integral else kind.__name__
        raise InputError(f"{name} is a {type(value).__name__}; give a {wanted}.")


def in_memory(
    model: PreTrainedModel | str | Path, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A model and its tokenizer, loaded where only a name is given.

    Raises:
        InputError: the model cannot be had, or is none, or the tokenizer is none.
    """
    if tokenizer is not None and not hasattr(tokenizer, "convert_ids_to_tokens"):
        kind = type(tokenizer).__name__
        raise InputError(f"tokenizer is a {kind}; give a tokenizer of transformers, or None.")
    if not isinstance(model, str | Path):
        held = _without_wrapper(model)
        if not hasattr(held, "base_model"):
            raise InputError(
                f"model is a {type(held).__name__}; give a causal language model of transformers, "
                "or its name."
            )
        return held, tokenizer
    with errors_name_arguments():
        loaded, own = TransformerSpec(model=str(model)).load_causal_lm()
    return loaded, tokenizer or own


def _without_wrapper(model: Any) -> Any:
    """The model itself, where it is one of peft, which puts adapters into it."""
    if not hasattr(model, "get_base_model"):
        return model
    config = model.active_peft_config
    if config.is_prompt_learning:
        raise InputError(
            f"model has {config.peft_type.value.lower()} vectors before its tokens; give a model "
            "without them."
        )
    return model.get_base_model()


def left_alone(model: PreTrainedModel) -> PreTrainedModel:
    """A copy around the same weights, in evaluation mode, which other threads leave alone."""
    copied = frozen_copy(model)
    copied.train(False)
    return copied


@dataclass(frozen=True)
class Given:
    """Hidden states as the caller passes them, with their description; see ``recover``."""

    hidden_states: Any
    depth: int
    final_norm: bool = False
    known_prefix: Sequence[int] = ()
    first_position: int = 0
    centred: bool = False
    scale: float = 1.0
    noise: float = 0.0
    noise_kind: NoiseName = "gaussian"
    largest: float = 1.0
    layout: Layout = field(default_factory=Layout)
    attention_mask: Tensor | None = None
    output: Output | None = None
    order: Order = "given"
    logits: bool = False

    @property
    def read_output(self) -> Output:
        """What is read: where it is left open, the keys and values of a cache, or hidden states."""
        if self.output is None and not self.logits and holds_caches(self.hidden_states):
            return "keys_values"
        return self.output or "hidden_states"

    def __post_init__(self) -> None:
        check_kind("depth", self.depth, Integral)
        check_kind("layout", self.layout, Layout)
        try:
            known = tuple(map(index, self.known_prefix))
        except TypeError as error:
            raise InputError(
                f"known_prefix must hold token ids; it is {self.known_prefix!r:.60}."
            ) from error
        object.__setattr__(self, "known_prefix", known)

    def cut(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
    ) -> TruncatedTransformer:
        """The model, truncated where the hidden states were taken."""
        with errors_name_arguments():
            transformer = TruncatedTransformer.from_model(
                model, tokenizer,
                depth=self.depth, final_norm=self.final_norm, output=self.read_output,
            )  # fmt: skip
        return transformer.centred() if self.centred else transformer

    def read(self, transformer: TruncatedTransformer, shape: ModelShape) -> Captured:
        """The hidden states of each prompt.

        Raises:
            InputError: they do not fit the model, or can be read in several ways.
        """
        held = self.hidden_states
        if self.attention_mask is not None:
            name = "hidden_states" if self.read_output == "hidden_states" else "past_key_values"
            held = {name: held, "attention_mask": self.attention_mask}
        with errors_name_arguments():
            request = Request(
                (self.depth,), self.final_norm, lambda: shape, self.layout, self.first_position,
                tuple(self.known_prefix), self.centred, self.scale, self.noise, self.noise_kind,
                self.largest, self.read_output, self.order, self.logits,
            )  # fmt: skip
            captured = Captured.of_objects(held, request)
        if not self.logits and captured.width != transformer.feature_size:
            raise InputError(
                f"hidden_states does not fit the model: the features are {captured.width} and "
                f"{transformer.feature_size} in the model; give the model that made it."
            )
        _log.info("hidden_states: %s.", captured.understood)
        for warning in captured.warnings:
            _log.warning("%s", naming_arguments(warning))
        vocabulary = transformer.embedding.vocabulary_size
        if any(not 0 <= token < vocabulary for token in self.known_prefix):
            raise InputError(
                f"known_prefix must hold token ids from 0 to {vocabulary - 1}; it is "
                f"{list(self.known_prefix)[:10]}."
            )
        return captured
