"""Gradient inversion in one call, for a notebook: the experiment of ``fit`` without a Trainer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_inversion.api.in_memory import (
    Given,
    check_kind,
    errors_name_arguments,
    in_memory,
    left_alone,
)
from lightning_inversion.api.recovered import Inverted, Recoveries
from lightning_inversion.data.batch import PromptBatch, pack
from lightning_inversion.data.layout import Layout, ModelShape
from lightning_inversion.decoding import Decoder
from lightning_inversion.errors import InputError
from lightning_inversion.inputs import LearnableInput
from lightning_inversion.inversion import Inversion, MakeOptimizer, linear_rate
from lightning_inversion.objectives import Objective
from lightning_inversion.progress import counted
from lightning_inversion.recovery.policy import ALTERNATIVES
from lightning_inversion.schedules import Schedule
from lightning_inversion.verification.certificate import Certificate, TokenCertificate
from lightning_inversion.verification.noise import NoiseName
from lightning_inversion.verification.verifier import Verifier

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def invert(
    model: PreTrainedModel | str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    hidden_states: Any,
    *,
    depth: int,
    attention_mask: Tensor | None = None,
    final_norm: bool = False,
    known_prefix: Sequence[int] = (),
    noise: float = 0.0,
    noise_kind: NoiseName = "gaussian",
    largest: float = 1.0,
    layout: Layout = Layout(),  # noqa: B008 - frozen
    objective: Objective | None = None,
    schedule: Schedule | None = None,
    learnable: LearnableInput | None = None,
    decoder: Decoder | None = None,
    optimizer: MakeOptimizer | None = None,
    rates: tuple[float, float] = (1.0, 0.01),
    iterations: int = 500,
    seed: int = 0,
    tokens_per_batch: int = 2048,
) -> Recoveries[Inverted]:
    """Optimise an input until its features match hidden states, and read it as tokens.

    With its defaults it is the recipe that ``fit`` recommends. With ``schedule=AllPositions()``,
    which verifies nothing on the way, the objective and the gradient are all that is used.

    Args:
        model: a causal language model, which stays as it is, or its name.
        tokenizer: decodes the tokens; None for that of a model given by its name.
        hidden_states: as in ``recover``; ``capture`` makes them of prompts.
        depth: blocks that they have passed.
        attention_mask: ``[B, T]``, of padded prompts ``[B, T, D]``.
        final_norm: whether they were taken after the model's final norm.
        known_prefix: tokens with which every prompt begins; they are fixed, and not verified.
        noise: the std of the noise in them, in the model's units.
        noise_kind: how it is distributed, gaussian or laplace.
        largest: the share of each position's features that was kept; see ``recover``.
        layout: what names and shapes leave open.
        objective: the distance of features; see ``Inversion`` for this and the next four.
        schedule: which positions are optimised and which are fixed.
        learnable: what is optimised.
        decoder: how the input is read as tokens.
        optimizer: makes the optimiser of the input; default Adam at one std of the embedding.
        rates: multiples of the optimiser's learning rate at the first and the last iteration.
        iterations: the most iterations of a batch.
        seed: of the initial values; each prompt draws its own.
        tokens_per_batch: tokens of one batch, with their padding.

    Returns:
        A sequence of ``Inverted``. Each token holds its best other candidates, and was verified in
        the end by running it.

    Raises:
        InputError: the tensors do not fit the model, or the parts contradict.
    """
    for name, part, kind in (
        ("objective", objective, Objective), ("schedule", schedule, Schedule),
        ("learnable", learnable, LearnableInput), ("decoder", decoder, Decoder),
        ("iterations", iterations, Integral),
    ):  # fmt: skip
        check_kind(name, part, kind)
    if len(rates) != 2 or min(rates) < 0:
        raise InputError(f"rates are {rates!r}; give two numbers, the first rate and the last.")
    if tokens_per_batch < 1:
        raise InputError(f"tokens_per_batch must be at least 1, and is {tokens_per_batch}.")
    model, tokenizer = in_memory(model, tokenizer)
    given = Given(
        hidden_states, depth, final_norm, known_prefix, noise=noise, noise_kind=noise_kind,
        largest=largest, layout=layout, attention_mask=attention_mask,
    )  # fmt: skip
    transformer = given.cut(model, tokenizer)
    captured = given.read(transformer, ModelShape.of(model.config))
    std = transformer.embedding.std
    with errors_name_arguments():
        experiment = Inversion(
            learnable=learnable, objective=objective, schedule=schedule, decoder=decoder,
            optimizer=optimizer or (lambda values: torch.optim.Adam(values, lr=std)),
            iterations=iterations, seed=seed,
        ).use(transformer, _with_head(model), captured.storage)  # fmt: skip
        experiment.schedule.check(experiment)
        experiment.schedule.check_length(max(captured.lengths), iterations)
    found: dict[int, Inverted] = {}
    for group in pack(captured.lengths, tokens_per_batch):
        batch = PromptBatch.of_captured([(row, row) for row in group], captured)
        start = time.monotonic()
        distances = _optimise(experiment, batch.to(transformer.device), rates)
        seconds = time.monotonic() - start
        read = _read(experiment, distances, tokenizer, asdict(captured.storage), seconds)
        found.update(zip(group, read, strict=True))
    return Recoveries(found[row] for row in range(len(found)))


def _with_head(model: PreTrainedModel) -> PreTrainedModel | None:
    """The model where it has a head: what is measured of it is then what ``recover`` measures."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return None if head is None else left_alone(model)


def _optimise(
    experiment: Inversion, batch: PromptBatch, rates: tuple[float, float]
) -> list[Tensor]:
    """Optimise the input of a batch; the distances ``[B]`` of each iteration."""
    experiment.begin(batch)
    optimizer = experiment.make_optimizer([experiment.state.values])
    base = [group["lr"] for group in optimizer.param_groups]
    period = experiment.schedule.period(experiment.iterations)
    distances = []
    for iteration in counted(range(experiment.iterations), "inverting"):
        factor = linear_rate(*rates, iteration % period, period)
        for group, rate in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = rate * factor
        distance = experiment.iterate(optimizer)
        if distance is None:
            break
        distances.append(distance.cpu())
    experiment.schedule.after_batch(experiment.state)
    return distances


@torch.no_grad()
def _read(
    experiment: Inversion, distances: list[Tensor], tokenizer: PreTrainedTokenizerBase | None,
    storage: dict[str, Any], seconds: float,
) -> list[Inverted]:  # fmt: skip
    """Read the optimised input of a batch as tokens, and verify them by running them."""
    state, measurements = experiment.state, experiment.measurements
    top = experiment.top_tokens(ALTERNATIVES)
    verdict, near = experiment.verify(top.best), measurements.derived(Verifier).near
    begin, found = len(state.batch.known_prefix), []
    for row, length in enumerate(state.batch.lengths):
        tokens = []
        for position in range(begin, length):
            token, shown = int(top.best[row, position]), verdict.state(row, position)
            passes = shown != "unresolved"  # only then are the tokens near it run, too
            decision = verdict.decisions.get((row, position))
            tokens.append(
                TokenCertificate(
                    id=token,
                    state=shown,
                    residual=float(verdict.residuals[row, position]),
                    threshold=float(verdict.thresholds[row, position]),
                    rival=None,
                    rival_residual=None,
                    compared=1 + (len(near.of_token(token)[0]) if passes else 0),
                    proposer="gradient",
                    seconds=seconds,
                    alternatives=() if passes else tuple(top.ids[row, position].tolist()),
                    refuted=() if decision is None else decision.refuted,
                )
            )
        stopped = int(state.stopped_at[row])
        iterations = stopped if stopped >= 0 else len(distances)
        known = state.batch.known_prefix
        found.append(
            Inverted.of(
                tokens,
                Certificate.of(known, tokens, measurements, storage),
                tokenizer,
                seconds,
                iterations=iterations,
                distances=tuple(float(one[row]) for one in distances[:iterations]),
                values=state.values.detach()[row, :length].cpu(),
            )
        )
    return found
