"""Recovery of captured features: diagnosed first, then searched, or only read in bounded time."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_inversion.errors import InputError
from lightning_inversion.recovery.diagnosis import Diagnosis
from lightning_inversion.recovery.measurements import Measurements
from lightning_inversion.recovery.policy import RecoveredPrompt, RecoveryPolicy, recover_prompts

_log = logging.getLogger(__name__)
_BUDGET = 64
"""Tokens run for a position of a prompt whose position 0 fits no token."""


def report_diagnoses(
    diagnoses: Sequence[Diagnosis | None],
    where: str,
    first: bool = True,
    index: Sequence[int] | None = None,
) -> None:
    """Report what is wrong with prompts, each finding once.

    Args:
        diagnoses: of each prompt.
        where: names the file in messages.
        first: whether nothing was recovered before.
        index: the number of each prompt, from 0.

    Raises:
        InputError: nothing was recovered before, and options would help every prompt.
    """
    found: dict[str, list[int]] = {}
    for row, diagnosis in enumerate(diagnoses):
        if diagnosis is not None:
            found.setdefault(diagnosis.finding, []).append(row)
    messages = []
    for rows in found.values():
        numbers = [str(1 + (row if index is None else index[row])) for row in rows]
        listed = ", ".join(numbers[:10]) + ("" if len(numbers) <= 10 else ", ...")
        prompts = f"prompt{'s' * (len(numbers) > 1)} {listed}"
        messages.append(f"{where}, {prompts}: {diagnoses[rows[0]]}")
    if first and all(one is not None and one.has_option for one in diagnoses):
        raise InputError(f"{'. '.join(messages)}.")
    for message in messages:
        _log.warning("%s.", message)


def report_breaks(
    prompts: Sequence[RecoveredPrompt],
    measurements: Measurements,
    where: str,
    index: Sequence[int] | None = None,
) -> None:
    """Report the position from which on nothing fits, in prompts whose beginning is verified.

    Args:
        prompts: as they were recovered.
        measurements: of the model.
        where: names the file in messages.
        index: the number of each prompt, from 0.
    """
    plausible = measurements.calibration.plausible.tolist()
    for row, prompt in enumerate(prompts):
        verified = [token.verified for token in prompt.tokens]
        first = verified.index(False) if False in verified else 0
        position = len(prompt.known) + first
        if not first or any(verified[first:]):
            continue
        if all(token.residual > plausible[1] for token in prompt.tokens[first:]):
            _log.warning(
                "%s, prompt %d: no token fits position %d or one after it, and all before it are "
                "verified; rows of another text may begin there, or rows may be missing.",
                where, 1 + (row if index is None else index[row]), position,
            )  # fmt: skip


def recover_captured(
    policy: RecoveryPolicy,
    measurements: Measurements,
    target: Tensor,
    lengths: list[int],
    known: Tensor | None = None,
    fitted: Tensor | None = None,
    after_round: Callable[[list[RecoveredPrompt]], None] | None = None,
    diagnoses: Sequence[Diagnosis | None] = (),
) -> list[RecoveredPrompt]:
    """As ``recover_prompts``; prompts whose position 0 fits no token get a small budget.

    After a token that is wrong, no later one reproduces the target: a search of the vocabulary
    could verify nothing.

    Args:
        policy: which tokens are run, in which order.
        measurements: of the model.
        target: ``[B, T, F]`` features to reproduce.
        lengths: tokens of each prompt.
        known: ``[N]`` tokens with which every prompt begins.
        fitted: ``[B, T, D]`` vectors that a fit has optimised.
        after_round: called with the prompts as they stand.
        diagnoses: of each prompt; none where all are searched.
    """
    hopeless = [row for row, found in enumerate(diagnoses) if found is not None and not found.near]
    if not hopeless:
        return recover_prompts(policy, measurements, target, lengths, known, fitted, after_round)
    beginning = () if known is None else tuple(known.tolist())
    prompts = [RecoveredPrompt(known=beginning) for _ in lengths]
    others = [row for row in range(len(lengths)) if row not in set(hopeless)]
    for rows, chosen in ((others, policy), (hopeless, _bounded(policy))):
        if not rows:
            continue

        def merge(some: list[RecoveredPrompt], rows: list[int] = rows) -> None:
            for row, prompt in zip(rows, some, strict=True):
                prompts[row] = prompt
            if after_round is not None:
                after_round(prompts)

        part = torch.tensor(rows, device=target.device)
        longest = max(lengths[row] for row in rows)
        some = recover_prompts(
            chosen,
            measurements,
            target[part, :longest],
            [lengths[row] for row in rows],
            known,
            None if fitted is None else fitted[part, :longest],
            merge,
        )
        for row, prompt in zip(rows, some, strict=True):
            prompts[row] = prompt
    return prompts


def _bounded(policy: RecoveryPolicy) -> RecoveryPolicy:
    """The policy with a small budget, where it has one."""
    budget = getattr(policy, "budget", _BUDGET)
    bounded = copy.copy(policy)
    bounded.budget = min(budget or _BUDGET, _BUDGET)  # type: ignore[attr-defined]
    return bounded
