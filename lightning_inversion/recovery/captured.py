"""Captured features: put in order, diagnosed, then searched, or read in bounded time."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_inversion.errors import InputError
from lightning_inversion.recovery.diagnosis import Diagnosis
from lightning_inversion.recovery.order import RowOrder, in_order
from lightning_inversion.recovery.policy import (
    RecoveredPrompt,
    RecoveryPolicy,
    Targets,
    recover_prompts,
)
from lightning_inversion.verification.measurements import Measurements

_log = logging.getLogger(__name__)
_BUDGET = 64
"""Tokens run for a position of a prompt whose position 0 fits no token."""


@dataclass(frozen=True)
class Origin:
    """Where captured features come from, and what is to be found out about them.

    Attributes:
        name: of the file or the argument, for messages.
        index: the number of each prompt in it, from 0; None where they are all there is.
        diagnose: says what is wrong with features whose position 0 fits no token; None to ask for
            nothing.
        in_order: whether the rows are in the order of the text; else it is found.
        first: whether nothing was recovered before.
        wording: words a warning, whose options are those of the command line.
    """

    name: str
    index: Sequence[int] | None = None
    diagnose: Callable[[Targets], list[Diagnosis | None]] | None = None
    in_order: bool = True
    first: bool = True
    wording: Callable[[str], str] = str

    def number(self, row: int) -> int:
        """The number of a prompt in messages, from 1."""
        return 1 + (row if self.index is None else self.index[row])


def recover_captured(
    policy: RecoveryPolicy,
    measure: Callable[[], Measurements],
    targets: Targets,
    origin: Origin,
    after_round: Callable[[list[RecoveredPrompt]], None] | None = None,
) -> list[RecoveredPrompt]:
    """As ``recover_prompts``, of features that may not be what their description says.

    Args:
        policy: which tokens are run, in which order.
        measure: gives the measurements of the model. It is not called for features that an option
            would make fit: a mistake is named before everything is measured.
        targets: the features to reproduce.
        origin: where they come from.
        after_round: called with the prompts as they stand.

    Raises:
        InputError: an option would make the features of every prompt fit.
    """
    orders: list[RowOrder] = []
    diagnoses: list[Diagnosis | None] = []
    if policy.needs_first_position:
        if not origin.in_order:
            targets, orders = in_order(measure(), targets)
            _report_orders(orders, origin)
        diagnoses = explain(targets, origin)
    measurements = measure()
    prompts = _search(policy, measurements, targets, diagnoses, after_round)
    _report_breaks(prompts, measurements, origin)
    for prompt, order in zip(prompts, orders, strict=False):
        prompt.order = order.rows
    return prompts


def explain(targets: Targets, origin: Origin) -> list[Diagnosis | None]:
    """What is wrong with each prompt, reported once for each finding; nothing where none is asked.

    Raises:
        InputError: nothing was recovered before, and options would help every prompt.
    """
    if origin.diagnose is None:
        return []
    diagnoses = origin.diagnose(targets)
    found: dict[str, list[int]] = {}
    for row, diagnosis in enumerate(diagnoses):
        if diagnosis is not None:
            found.setdefault(diagnosis.finding, []).append(row)
    messages = []
    for rows in found.values():
        numbers = [str(origin.number(row)) for row in rows]
        listed = ", ".join(numbers[:10]) + ("" if len(numbers) <= 10 else ", ...")
        prompts = f"prompt{'s' * (len(numbers) > 1)} {listed}"
        messages.append(f"{origin.name}, {prompts}: {diagnoses[rows[0]]}")
    if origin.first and all(one is not None and one.has_option for one in diagnoses):
        raise InputError(f"{'. '.join(messages)}.")
    for message in messages:
        _log.warning("%s.", origin.wording(message))
    return diagnoses


def _search(
    policy: RecoveryPolicy,
    measurements: Measurements,
    targets: Targets,
    diagnoses: Sequence[Diagnosis | None],
    after_round: Callable[[list[RecoveredPrompt]], None] | None,
) -> list[RecoveredPrompt]:
    """Recover prompts; those whose position 0 fits no token get a small budget.

    After a token that is wrong, no later one reproduces the target: a search of the vocabulary
    could verify nothing.
    """
    hopeless = [row for row, found in enumerate(diagnoses) if found is not None and not found.near]
    if not hopeless:
        return recover_prompts(policy, measurements, targets, after_round)
    prompts = [RecoveredPrompt(known=targets.known) for _ in targets.lengths]
    others = [row for row in range(len(prompts)) if row not in set(hopeless)]
    for rows, chosen in ((others, policy), (hopeless, _bounded(policy))):
        if not rows:
            continue

        def merge(some: list[RecoveredPrompt], rows: list[int] = rows) -> None:
            for row, prompt in zip(rows, some, strict=True):
                prompts[row] = prompt
            if after_round is not None:
                after_round(prompts)

        merge(recover_prompts(chosen, measurements, targets.of(rows), merge))
    return prompts


def _bounded(policy: RecoveryPolicy) -> RecoveryPolicy:
    """The policy with a small budget, where it has one."""
    budget = getattr(policy, "budget", _BUDGET)
    bounded = copy.copy(policy)
    bounded.budget = min(budget or _BUDGET, _BUDGET)  # type: ignore[attr-defined]
    return bounded


def _report_orders(orders: Sequence[RowOrder], origin: Origin) -> None:
    """Report prompts whose order was not found to the end."""
    for row, order in enumerate(orders):
        if order.found < len(order.rows):
            _log.warning(
                "%s, prompt %d: the order of %d of %d rows was found; the others come after them "
                "as in the file.",
                origin.name, origin.number(row), order.found, len(order.rows),
            )  # fmt: skip


def _report_breaks(
    prompts: Sequence[RecoveredPrompt], measurements: Measurements, origin: Origin
) -> None:
    """Report the position from which on nothing fits, in prompts whose beginning is verified."""
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
                origin.name, origin.number(row), position,
            )  # fmt: skip
