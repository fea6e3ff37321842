"""Exact recovery in one call, for a notebook: a model and hidden states in, prompts out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from lightning_inversion.data.key_values import holds_caches
from lightning_inversion.data.layout import Layout, ModelShape
from lightning_inversion.data.targets import Captured, Reading, Storage
from lightning_inversion.errors import InputError
from lightning_inversion.recovery.captured import (
    recover_captured,
    report_breaks,
    report_diagnoses,
)
from lightning_inversion.recovery.certificate import Certificate, CertificateCheck
from lightning_inversion.recovery.diagnosis import diagnose
from lightning_inversion.recovery.measurements import Measurements
from lightning_inversion.recovery.policy import RecoveredPrompt, RecoveryPolicy
from lightning_inversion.recovery.token_recovery import TokenRecovery
from lightning_inversion.recovery.variants import OtherCuts
from lightning_inversion.transformer.language_model import LanguageModel
from lightning_inversion.transformer.selection import Output
from lightning_inversion.transformer.tokens import decoded
from lightning_inversion.transformer.truncated import TruncatedTransformer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


def recover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    hidden_states: Any,
    *,
    depth: int,
    final_norm: bool = False,
    output: Output | None = None,
    known_prefix: Sequence[int] = (),
    first_position: int = 0,
    centred: bool = False,
    scale: float = 1.0,
    noise: float = 0.0,
    layout: Layout = Layout(),  # noqa: B008 - frozen
    diagnose_first: bool = True,
    policy: RecoveryPolicy | None = None,
) -> list[RecoveredPrompt]:
    """Recover the prompts of hidden states, with a certificate for each token.

    Verification thresholds are calibrated for the model and depth in each call, and for the type
    of the tensors: hidden states in bfloat16 are compared with rounded ones.

    Args:
        model: a causal language model with its head; it stays as it is.
        tokenizer: decodes the tokens; without it the prompts have no ``text``.
        hidden_states: Hugging Face's ``hidden_states[depth]``, ``[T, D]`` or ``[1, T, D]``; or what
            holds them: an output of the model or of ``generate``, its tuple ``hidden_states``, a
            dict of TransformerLens or nnsight names to tensors; or a list with one of these for
            each prompt. A dict with a key ``attention_mask`` may hold padded prompts ``[B, T, D]``.
            It may be a cache of keys and values instead (``past_key_values``, or the older tuple).
        depth: blocks that they have passed; of keys and values the number of their block, from 0.
        final_norm: whether they were taken after the model's final norm.
        output: what is read; default hidden_states, and keys_values of a cache. Keys or values
            alone are ``[T, heads * size]`` or ``[B, heads, T, size]``.
        known_prefix: tokens with which every prompt begins; they are not verified.
        first_position: the position of the first row, where the rows of ``known_prefix`` are left
            out.
        centred: whether their mean over the features was subtracted.
        scale: the factor that they were multiplied by.
        noise: the std of the Gaussian noise in them, in the model's units. Tokens are then verified
            where the chance of any other is below one in a million.
        layout: what names and shapes leave open.
        diagnose_first: where position 0 fits no token, find out why before the search.
        policy: how tokens are searched; default ``TokenRecovery``.

    Raises:
        InputError: the tensors do not fit the model, could be read in several ways, or the known
            prefix does not fit them.
    """
    policy = policy or TokenRecovery()
    if output is None:
        output = "keys_values" if holds_caches(hidden_states) else "hidden_states"
    transformer = TruncatedTransformer.from_model(
        model, tokenizer, depth=depth, final_norm=final_norm, output=output
    )
    shape = ModelShape.of(model.config)
    reading = Reading(
        (depth,), final_norm, lambda: shape, layout, first_position,
        tuple(known_prefix), centred, scale, noise, output,
    )  # fmt: skip
    try:
        captured = Captured.of_objects(hidden_states, reading)
    except InputError as error:
        raise InputError(_as_arguments(str(error))) from error
    _log.info("hidden_states: %s.", captured.understood)
    for warning in captured.warnings:
        _log.warning("%s", warning)
    vocabulary = transformer.embedding.vocabulary_size
    if any(not 0 <= token < vocabulary for token in known_prefix):
        raise InputError(
            f"known_prefix must hold token ids from 0 to {vocabulary - 1}; it is "
            f"{list(known_prefix)[:10]}."
        )
    if centred:
        transformer = transformer.centred()
    language_model = (
        LanguageModel(model, transformer.caches) if policy.needs_language_model else None
    )
    measurements = Measurements.measure(transformer, language_model, captured.storage)
    targets = [captured.target(number) for number in range(len(captured.targets))]
    target = pad_sequence(targets, batch_first=True).to(transformer.device)
    known = torch.tensor(list(known_prefix), dtype=torch.long, device=transformer.device)
    found = []
    if diagnose_first and not first_position:
        cuts = OtherCuts(
            lambda depths, norm: TruncatedTransformer.from_model(
                model, tokenizer, layers=depths, final_norm=norm
            ),
            shape.blocks,
        )
        found = diagnose(measurements, target, captured.lengths, cuts, captured.storage, known)
        try:
            report_diagnoses(found, "hidden_states")
        except InputError as error:
            raise InputError(_as_arguments(str(error))) from error
    prompts = recover_captured(
        policy, measurements, target, captured.lengths, known, diagnoses=found
    )
    storage = asdict(captured.storage)
    report_breaks(prompts, measurements, "hidden_states")
    for prompt in prompts:
        prompt.certificate = Certificate.of(prompt.known, prompt.tokens, measurements, storage)
        prompt.text = None if tokenizer is None else decoded(tokenizer, prompt.ids)
    return prompts


def verify(
    certificate: Certificate,
    model: PreTrainedModel,
    hidden_states: Any,
) -> CertificateCheck:
    """Check a certificate of ``recover`` again: run its tokens and those near to them.

    Nothing is searched, and nothing is measured again.

    Args:
        certificate: of one prompt, with or without its file.
        model: the same model; its weights are compared by their hash.
        hidden_states: the prompt's, ``[T, D]`` or ``[1, T, D]``; keys and values as ``recover``
            takes them.

    Raises:
        InputError: the model or the hidden states are not those of the certificate.
    """
    description, storage = certificate.transformer, Storage(**certificate.storage)
    output = description.get("output", "hidden_states")
    transformer = TruncatedTransformer.from_model(
        model, layers=description["layers"], final_norm=description["final_norm"], output=output
    )
    if storage.centred:
        transformer = transformer.centred()
    if output != "hidden_states":
        shape = ModelShape.of(model.config)
        reading = Reading(tuple(description["layers"]), shape=lambda: shape, output=output)
        (hidden_states,) = Captured.of_objects(hidden_states, reading).targets
    rows = hidden_states[0] if hidden_states.dim() == 3 else hidden_states
    return certificate.check(transformer, storage.read_back(rows.float()))


def _as_arguments(sentence: str) -> str:
    """A sentence that names options of the command line, with the names of arguments."""
    for option in ("--model.transformer.", "--data."):
        sentence = sentence.replace(option, "")
    return sentence
