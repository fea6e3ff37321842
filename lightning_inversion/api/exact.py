"""Exact recovery in one call, for a notebook: a model and hidden states in, prompts out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_inversion.api.in_memory import (
    Given,
    check_kind,
    errors_name_arguments,
    in_memory,
    left_alone,
    naming_arguments,
)
from lightning_inversion.api.recovered import Recovered, Recoveries
from lightning_inversion.data.capture import captured_features
from lightning_inversion.data.layout import Layout, ModelShape
from lightning_inversion.data.request import Order, Request
from lightning_inversion.data.storage import Storage
from lightning_inversion.data.targets import Captured
from lightning_inversion.data.texts import ModelLimits, tokenize_each
from lightning_inversion.errors import InputError
from lightning_inversion.recovery.captured import Origin, recover_captured
from lightning_inversion.recovery.diagnosis import Diagnosis, diagnose
from lightning_inversion.recovery.policy import RecoveryPolicy, Targets
from lightning_inversion.recovery.token_recovery import TokenRecovery
from lightning_inversion.recovery.variants import OtherCuts
from lightning_inversion.transformer.language_model import LanguageModel
from lightning_inversion.transformer.selection import Output
from lightning_inversion.transformer.truncated import TruncatedTransformer
from lightning_inversion.transformer.unembedding import Unembedding
from lightning_inversion.verification.certificate import Certificate, CertificateCheck
from lightning_inversion.verification.measurements import Measurements
from lightning_inversion.verification.noise import NoiseName

Stored = Literal["float32", "bfloat16", "float16"]

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def capture(
    model: PreTrainedModel | str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: str | Sequence[str],
    *,
    depth: int,
    final_norm: bool = False,
    special_tokens: bool = False,
    store: Stored = "float32",
    noise: float = 0.0,
    noise_kind: NoiseName = "gaussian",
    largest: float = 1.0,
    seed: int = 0,
    tokens_per_batch: int = 2048,
) -> list[Tensor]:
    """The hidden states ``[T, D]`` of each prompt, as ``recover`` and ``invert`` take them.

    Args:
        model: a causal language model, or its name.
        tokenizer: of the model; None for that of a model given by its name.
        prompts: one, or several.
        depth: blocks that the prompts pass.
        final_norm: apply the model's final norm.
        special_tokens: let the tokenizer add its special tokens.
        store: the type to which they are rounded, and in which they are returned.
        noise: std of noise that is added before, in the model's units.
        noise_kind: how it is distributed, gaussian or laplace.
        largest: the share of each position's features that is kept, the largest by size; the
            others are 0, and the noise is in those that are kept.
        seed: of the noise; each prompt draws its own.
        tokens_per_batch: tokens of one forward, with their padding.

    Raises:
        InputError: a prompt does not fit the model, there is no tokenizer, or store, noise or
            largest cannot be.
    """
    storage = Storage(store, noise, noise_kind, largest=largest)
    storage.check("")
    if store not in get_args(Stored):
        raise InputError(f"store: {store!r} is unknown; choose from {', '.join(get_args(Stored))}.")
    model, tokenizer = in_memory(model, tokenizer)
    if tokenizer is None:
        raise InputError("capture needs the tokenizer of the model, and it is None.")
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    if not given:
        raise InputError("prompts holds no prompt; give one or several.")
    transformer = Given(None, depth, final_norm).cut(model, tokenizer)
    limits = ModelLimits.of(model.config)
    ids, bad = tokenize_each(given, tokenizer, limits, special_tokens)
    for index, reason in bad.items():
        raise InputError(f"Prompt {index + 1} {reason}")
    found = captured_features(transformer, list(ids.values()), storage, seed, tokens_per_batch)
    return [rows.to(getattr(torch, store)) for rows in found]


def recover(
    model: PreTrainedModel | str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    hidden_states: Any,
    *,
    depth: int,
    attention_mask: Tensor | None = None,
    final_norm: bool = False,
    output: Output | None = None,
    known_prefix: Sequence[int] = (),
    first_position: int = 0,
    centred: bool = False,
    scale: float = 1.0,
    noise: float = 0.0,
    noise_kind: NoiseName = "gaussian",
    largest: float = 1.0,
    order: Order = "given",
    logits: bool = False,
    layout: Layout = Layout(),  # noqa: B008 - frozen
    diagnose_first: bool = True,
    policy: RecoveryPolicy | None = None,
) -> Recoveries[Recovered]:
    """Recover the prompts of hidden states, with a certificate for each token.

    Verification thresholds are measured once for the model, the depth and the type of the tensors,
    and kept in the cache folder: hidden states in bfloat16 are compared with rounded ones.

    Args:
        model: a causal language model with its head, which stays as it is; or its name: a hub id,
            a folder or a .gguf file.
        tokenizer: decodes the tokens; None for that of a model given by its name, or for prompts
            without text.
        hidden_states: Hugging Face's ``hidden_states[depth]``, ``[T, D]`` or ``[1, T, D]``; or what
            holds them: an output of the model or of ``generate``, its tuple ``hidden_states``, a
            dict of TransformerLens or nnsight names to tensors; or a list with one of these for
            each prompt. It may be a cache of keys and values instead (``past_key_values``, or the
            older tuple).
        depth: blocks that they have passed; of keys and values the number of their block, from 0.
        attention_mask: ``[B, T]``, of padded prompts ``[B, T, D]``.
        final_norm: whether they were taken after the model's final norm.
        output: what is read; default hidden_states, and keys_values of a cache. Keys or values
            alone are ``[T, heads * size]`` or ``[B, heads, T, size]``.
        known_prefix: tokens with which every prompt begins; they are not verified.
        first_position: the position of the first row, where the rows of ``known_prefix`` are left
            out.
        centred: whether their mean over the features was subtracted.
        scale: the factor that they were multiplied by.
        noise: the std of the noise in them, in the model's units. Tokens are then verified where
            the chance of any other is below one in a million.
        noise_kind: how it is distributed, gaussian or laplace.
        largest: the share of each position's features that is kept, the largest by size; the
            others are 0, and the noise is in those that are kept.
        order: unknown where the rows of a prompt are in any order, which is then found first; each
            prompt's ``order`` tells the number of each token's row.
        logits: whether they are logits ``[T, V]`` or log-probabilities, from which the states
            after the final norm are solved; ``depth`` is that of all blocks, with ``final_norm``.
        layout: what names and shapes leave open.
        diagnose_first: where position 0 fits no token, find out why before the search.
        policy: how tokens are searched; default ``TokenRecovery``. ``Reading`` reads rows after a
            prefix that is not known, and verifies nothing; ``LastPosition`` finds a short text from
            its last row alone.

    Returns:
        A sequence with one entry per prompt, each with its ``text`` and its ``tokens``.

    Raises:
        InputError: the tensors do not fit the model, could be read in several ways, or the known
            prefix does not fit them.
    """
    check_kind("policy", policy, RecoveryPolicy)
    policy = policy or TokenRecovery()
    model, tokenizer = in_memory(model, tokenizer)
    given = Given(
        hidden_states, depth, final_norm, known_prefix, first_position, centred, scale,
        noise, noise_kind, largest, layout, attention_mask, output, order, logits,
    )  # fmt: skip
    # Some models with a head are their own base model: Llama 4, Mllama.
    headless = model.base_model is model and model.get_output_embeddings() is None  # type: ignore[no-untyped-call]
    if policy.needs_language_model and headless:
        raise InputError(f"model is a {type(model).__name__}, without its head; give it whole.")
    transformer, shape = given.cut(model, tokenizer), ModelShape.of(model.config)
    captured = given.read(transformer, shape)
    language_model = None
    if policy.needs_language_model:
        language_model = LanguageModel(left_alone(model), transformer.caches)
    measure = cache(partial(Measurements.measure, transformer, language_model, captured.storage))
    targets = [captured.target(number) for number in range(len(captured.targets))]
    if logits:
        with errors_name_arguments():
            unembedding = Unembedding.of(model)
            targets = [unembedding.states(one.to(transformer.device)) for one in targets]
    features = pad_sequence(targets, batch_first=True).to(transformer.device)
    cuts = OtherCuts(
        lambda depths, norm: TruncatedTransformer.from_model(
            model, tokenizer, layers=depths, final_norm=norm
        ),
        shape.blocks,
    )

    def diagnosed(targets: Targets) -> list[Diagnosis | None]:
        first = Measurements.measure(transformer, channel=captured.storage, first_alone=True)
        return diagnose(first, targets, cuts)

    explained = diagnose_first and not first_position
    origin = Origin(
        "hidden_states", None, diagnosed if explained else None, captured.in_order,
        wording=naming_arguments,
    )  # fmt: skip
    known = tuple(given.known_prefix)
    with errors_name_arguments():
        prompts = recover_captured(
            policy, measure, Targets(features, captured.lengths, known), origin
        )
    storage = asdict(captured.storage)
    return Recoveries(
        Recovered.of(
            prompt.tokens,
            Certificate.of(prompt.known, prompt.tokens, measure(), storage, policy.rows),
            tokenizer,
            prompt.seconds,
            order=tuple(prompt.order),
        )
        for prompt in prompts
    )


def verify(
    certificate: Certificate,
    model: PreTrainedModel | str | Path,
    hidden_states: Any,
) -> CertificateCheck:
    """Check a certificate of ``recover`` again: run its tokens and those near to them.

    Nothing is searched, and nothing is measured again.

    Args:
        certificate: of one prompt, with or without its file.
        model: the same model, or its name; its weights are compared by their hash.
        hidden_states: the prompt's, as ``recover`` takes them.

    Returns:
        A check that is true where every certificate holds.

    Raises:
        InputError: the model or the hidden states are not those of the certificate, or they are of
            several prompts.
    """
    if not isinstance(certificate, Certificate):
        raise InputError(
            f"certificate is a {type(certificate).__name__}; give the .certificate of a prompt."
        )
    model, _ = in_memory(model, None)
    description, storage = certificate.transformer, Storage(**certificate.storage)
    output = description.get("output", "hidden_states")
    transformer = TruncatedTransformer.from_model(
        model, layers=description["layers"], features=description["features"],
        final_norm=description["final_norm"], output=output,
    )  # fmt: skip
    if storage.centred:
        transformer = transformer.centred()
    shape = ModelShape.of(model.config)
    request = Request(
        tuple(description["layers"]), description["final_norm"],
        None if description["features"] else lambda: shape,  # a slice has a width of its own
        output=output,
    )  # fmt: skip
    with errors_name_arguments():
        captured = Captured.of_objects(hidden_states, request)
    if len(captured.targets) > 1:
        raise InputError(
            f"hidden_states are of {len(captured.targets)} prompts, and a certificate is of one; "
            "give those of its prompt."
        )
    rows = captured.targets[0]
    return certificate.check(transformer, storage.read_back(rows.float()))
