"""Exact recovery in one call, for a notebook: a model and hidden states in, prompts out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_inversion.data.targets import Storage
from lightning_inversion.errors import InputError
from lightning_inversion.recovery.measurements import Measurements
from lightning_inversion.recovery.policy import RecoveredPrompt, RecoveryPolicy, recover_prompts
from lightning_inversion.recovery.token_recovery import TokenRecovery
from lightning_inversion.transformer.language_model import LanguageModel
from lightning_inversion.transformer.tokens import decoded
from lightning_inversion.transformer.truncated import TruncatedTransformer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def recover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    hidden_states: Tensor | Sequence[Tensor],
    *,
    depth: int,
    final_norm: bool = False,
    known_prefix: Sequence[int] = (),
    policy: RecoveryPolicy | None = None,
) -> list[RecoveredPrompt]:
    """Recover the prompts of hidden states, with a certificate for each token.

    Verification thresholds are calibrated for the model and depth in each call, and for the type
    of the tensors: hidden states in bfloat16 are compared with rounded ones.

    Args:
        model: a causal language model with its head; it stays as it is.
        tokenizer: decodes the tokens; without it the prompts have no ``text``.
        hidden_states: Hugging Face's ``hidden_states[depth]`` of one prompt, ``[T, D]`` or
            ``[1, T, D]``, or a list of these; from position 0 on, without padding.
        depth: blocks that they have passed.
        final_norm: whether they were taken after the model's final norm.
        known_prefix: tokens with which every prompt begins; they are not verified.
        policy: how tokens are searched; default ``TokenRecovery``.

    Raises:
        InputError: a tensor does not fit the model, or the known prefix does not fit a tensor.
    """
    policy = policy or TokenRecovery()
    transformer = TruncatedTransformer.from_model(
        model, tokenizer, depth=depth, final_norm=final_norm
    )
    given = [hidden_states] if isinstance(hidden_states, Tensor) else list(hidden_states)
    targets = [_target(one, number, transformer) for number, one in enumerate(given, start=1)]
    if not targets:
        raise InputError("hidden_states holds no tensor; give one or more.")
    lengths = [len(target) for target in targets]
    if len(known_prefix) > min(lengths):
        raise InputError(
            f"known_prefix has {len(known_prefix)} tokens, and the shortest tensor of "
            f"hidden_states {min(lengths)} rows; shorten it."
        )
    vocabulary = transformer.embedding.vocabulary_size
    if any(not 0 <= token < vocabulary for token in known_prefix):
        raise InputError(
            f"known_prefix must hold token ids from 0 to {vocabulary - 1}; it is "
            f"{list(known_prefix)[:10]}."
        )
    dtype = str(given[0].dtype).removeprefix("torch.")
    language_model = (
        LanguageModel(model, transformer.caches) if policy.needs_language_model else None
    )
    measurements = Measurements.measure(transformer, language_model, Storage(dtype))
    prompts = recover_prompts(
        policy,
        measurements,
        pad_sequence(targets, batch_first=True).to(transformer.device),
        lengths,
        torch.tensor(list(known_prefix), dtype=torch.long, device=transformer.device),
    )
    for prompt in prompts:
        prompt.text = None if tokenizer is None else decoded(tokenizer, prompt.ids)
    return prompts


def _target(hidden_states: Tensor, number: int, transformer: TruncatedTransformer) -> Tensor:
    """One prompt's features ``[T, F]``, float32."""
    one = (
        hidden_states[0] if hidden_states.dim() == 3 and len(hidden_states) == 1 else hidden_states
    )
    width = transformer.feature_size
    if one.dim() != 2 or one.shape[1] != width or not len(one):
        raise InputError(
            f"hidden_states, tensor {number} has shape {list(hidden_states.shape)}; give "
            f"[tokens, {width}] for each prompt, a batch as a list of its prompts."
        )
    if not one.is_floating_point():
        raise InputError(f"hidden_states, tensor {number} holds {one.dtype}; give floating point.")
    if not bool(one.isfinite().all()):
        raise InputError(
            f"hidden_states, tensor {number} holds nan or infinite values; take the hidden states "
            "in bfloat16 or float32."
        )
    return one.detach().float()
