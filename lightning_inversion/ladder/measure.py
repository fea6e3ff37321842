"""Rows of the ladder: the recipe, the linear probe, recovery and the mechanism of each model."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import lightning_inversion
from lightning_inversion.data.storage import Storage
from lightning_inversion.files import Record, append_records, read_records
from lightning_inversion.ladder.interventions import INTERVENTIONS, Intervention, changed
from lightning_inversion.ladder.mechanism import block_gain, mechanism
from lightning_inversion.ladder.plan import Plan, Rung
from lightning_inversion.ladder.recipe import PRINTED, RATES, Recipe, run_recipe, tuned_rate
from lightning_inversion.ladder.room import room_numbers
from lightning_inversion.ladder.train import Texts, is_trained, model_folder, training_of
from lightning_inversion.proposers.probe_proposer import ProbeRanking
from lightning_inversion.proposers.proposals import mix_with_uniform
from lightning_inversion.recovery.policy import Targets, recover_prompts
from lightning_inversion.recovery.token_recovery import TokenRecovery
from lightning_inversion.transformer.language_model import LanguageModel, own_text
from lightning_inversion.transformer.linear_probe import LinearProbe
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.truncated import TruncatedTransformer
from lightning_inversion.verification.calibration import Calibration
from lightning_inversion.verification.measurements import Measurements

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
TUNING, REPORTED, LENGTH = 3, 10, 8
"""Prompts that a rate is chosen on, prompts that rows report, and tokens of each."""
_PROBE_ROWS, _SHARE = 96, 1e-3
_TEMPERATURES = (2.0, 1.0, 0.5, 0.25, 0.12, 0.06, 0.03, 0.01)


@dataclass(frozen=True)
class Subject:
    """A model with the text that it is measured on.

    Attributes:
        model: with its head.
        tokenizer: of it.
        tuning: ``[3, 8]`` ids of prompts that a rate is chosen on.
        reported: ``[10, 8]`` ids of other prompts.
        text: ``[N, T]`` ids of text to fit the probe on; None for text that the model wrote.
        held_out: ``[M, T]`` ids that the probe is scored on; the first half chooses a temperature.
        names: keys of its rows.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tuning: Tensor
    reported: Tensor
    text: Tensor | None
    held_out: Tensor
    names: Record

    def cut(self, depth: int, features: str | None = None) -> TruncatedTransformer:
        """Its first blocks, and a slice of their features."""
        return TruncatedTransformer.from_model(
            self.model, self.tokenizer, depth=depth, features=features
        )

    def measurements(
        self, transformer: TruncatedTransformer, channel: Storage | None = None
    ) -> Measurements:
        """The probe, fitted on the text, and the thresholds of recovery."""
        language_model = LanguageModel(self.model, transformer.caches)
        text = own_text(language_model) if self.text is None else self.text
        noise = 0.0 if channel is None else channel.noise
        probe = LinearProbe.fit(transformer, text=text, noise=noise)
        calibration = Calibration.measure(transformer, probe, channel, text)
        return Measurements(transformer, probe, calibration, language_model, text, channel=channel)


def prompts_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The first tokens of texts: those to tune on ``[3, 8]``, and those to report ``[10, 8]``."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"][:LENGTH] for text in texts]
    whole = torch.tensor([own for own in ids if len(own) == LENGTH][: TUNING + REPORTED])
    return whole[:TUNING], whole[TUNING:]


def subject_of(rung: Rung, share: float, plan: Plan, root: Path, texts: Texts) -> Subject:
    """A model of the ladder after a share of its training."""
    folder = model_folder(root, rung, share)
    model, tokenizer = TransformerSpec(model=str(folder)).load_causal_lm()
    _, trained_on, held_out = texts.of(rung.vocabulary)
    rows = trained_on[: len(trained_on) // plan.length * plan.length].view(-1, plan.length)
    text = rows[:: max(1, len(rows) // _PROBE_ROWS)][:_PROBE_ROWS]
    names = {"model": rung.name, **asdict(rung), "learning_rate": plan.learning_rate_of(rung),
             "share": share, **training_of(folder)}  # fmt: skip
    return Subject(model, tokenizer, *prompts_of(tokenizer, plan.held_out), text, held_out, names)


@torch.no_grad()
def probe_scores(
    measurements: Measurements, held_out: Tensor, channel: Storage | None = None
) -> Record:
    """What the linear probe reads: top-1 at later positions, and bits a token.

    The bits are log2 V + mean log2 p(right), with even odds before: the temperature of p is chosen
    on the first half of the text, and the rest is scored.
    """
    ranking, transformer = measurements.derived(ProbeRanking), measurements.transformer
    generator = torch.Generator().manual_seed(7)
    features = transformer.features_of(held_out)
    if channel is not None:
        features = channel(features, generator)
    features, right = features[:, 1:].flatten(0, 1), held_out[:, 1:].flatten()
    later = torch.ones(len(right), dtype=torch.long)
    likelihood = ranking.likelihood(measurements.probe(features, later), later)
    half = len(right) // 2

    def bits(temperature: float, part: slice) -> float:
        chances = mix_with_uniform((temperature * likelihood[part]).log_softmax(-1), _SHARE)
        found = chances.gather(1, right[part, None]).mean()
        return math.log2(likelihood.shape[1]) + float(found) / math.log(2)

    best = max(_TEMPERATURES, key=lambda temperature: bits(temperature, slice(half)))
    top = likelihood[half:].argmax(1) == right[half:]
    return {
        "probe_top1": float(top.float().mean()),
        "probe_read_bits": bits(best, slice(half, None)),
    }


def recovery_scores(
    measurements: Measurements, ids: Tensor, channel: Storage | None = None, budget: int = 1024
) -> Record:
    """What exact recovery reads of prompts ``[N, T]``."""
    target = measurements.transformer.features_of(ids)
    if channel is not None:
        target = channel(target, torch.Generator().manual_seed(8))
    found = recover_prompts(
        TokenRecovery(budget=budget), measurements, Targets(target, [ids.shape[1]] * len(ids))
    )
    pairs = [
        (token, truth)
        for prompt, own in zip(found, ids.tolist(), strict=True)
        for token, truth in zip(prompt.tokens, own, strict=False)
    ]
    return {
        "recovery_right": sum(token.id == truth for token, truth in pairs) / ids.numel(),
        "recovery_verified": sum(token.verified for token, _ in pairs) / ids.numel(),
        "recovery_false": sum(token.verified and token.id != truth for token, truth in pairs),
    }


def recipe_scores(
    transformer: TruncatedTransformer, subject: Subject, recipe: Recipe, decoder: str = "pinv"
) -> Record:
    """The recipe at the printed rate and at one tuned on other prompts; tokens right.

    ``printed`` and ``tuned`` are read by ``decoder``, ``..._nearest`` by the nearest embedding. The
    names ``tuned_...`` of ``room_numbers`` are of the inputs at the rate tuned for ``decoder``.
    """
    tuning = run_recipe(transformer, subject.tuning, RATES, recipe)
    rates = {"printed": PRINTED, "tuned": tuned_rate(tuning, RATES, decoder)}
    rates |= {"tuned_nearest": tuned_rate(tuning, RATES, "nearest")}
    different = sorted({*rates.values()})
    out = run_recipe(transformer, subject.reported, different, recipe)
    at = {name: different.index(rate) for name, rate in rates.items()}
    scores: Record = {"rate_tuned": rates["tuned"], "iterations": recipe.iterations}
    for name, number in list(at.items())[:2]:
        scores[name] = float(out.right[decoder][number].mean())
        scores[f"{name}_first"] = float(out.first[number].float().mean())
        scores[f"{name}_error"] = float(out.error[number].median())
        scores[f"{name}_step"] = float(out.step[number].median())
    scores["printed_nearest"] = float(out.right["nearest"][at["printed"]].mean())
    scores["tuned_nearest"] = float(out.right["nearest"][at["tuned_nearest"]].mean())
    scores["tuned_prompts"] = [round(float(one), 4) for one in out.right[decoder][at["tuned"]]]
    room = room_numbers(
        out.values[at["tuned"]], subject.reported, transformer.embedding.matrix.detach()
    )
    return scores | {f"tuned_{name}": number for name, number in room.items()}


def cell_row(subject: Subject, depth: int, seed: int, iterations: int) -> Record:
    """Everything that is measured of one model at one depth."""
    transformer = subject.cut(depth)
    measurements = subject.measurements(transformer)
    recipe = Recipe(iterations=iterations, seed=seed)
    return {
        "kind": "cell", **subject.names, "depth": depth,
        **recipe_scores(transformer, subject, recipe),
        **probe_scores(measurements, subject.held_out),
        **recovery_scores(measurements, subject.reported),
        **mechanism(transformer, subject.reported, measurements.probe),
    }  # fmt: skip


def intervention_row(
    intervention: Intervention, subject: Subject, other: PreTrainedModel, depth: int, seed: int,
    iterations: int,
) -> Record:  # fmt: skip
    """What the recipe reads after an intervention."""
    model = (
        subject.model if intervention.model is None else intervention.model(subject.model, other)
    )
    transformer = replace(subject, model=model).cut(depth)
    recipe = changed(Recipe(iterations=iterations, seed=seed), intervention, transformer)
    return {
        "kind": "intervention", "intervention": intervention.name, **subject.names, "depth": depth,
        "block_gain": block_gain(transformer),
        **recipe_scores(transformer, subject, recipe, intervention.decoder),
    }  # fmt: skip


KEY = ("kind", "model", "share", "depth", "intervention", "features", "channel")


class Rows:
    """The kept rows; one that is there is not measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        rows = self.read()
        self._known = {self._key(row) for row in rows}
        self._next = 1 + max((int(row["index"]) for row in rows), default=-1)

    def read(self) -> list[Record]:
        """All rows."""
        return read_records(self.path)

    def has(self, **names: Any) -> bool:
        """Whether there is a row of these names."""
        return self._key(names) in self._known

    def add(self, row: Record) -> None:
        """Append a row."""
        rounded = {name: _rounded(value) for name, value in row.items()}
        version = {"version": lightning_inversion.__version__, "version_torch": torch.__version__}
        append_records(self.path, [{"index": self._next, **rounded, **version}])
        self._known.add(self._key(row))
        self._next += 1

    @staticmethod
    def _key(row: Record) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in KEY)


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) and math.isfinite(value) else value


def measure(plan: Plan, root: Path, rows: Rows, iterations: int) -> None:
    """Measure every trained model at depth 1; the same call resumes."""
    texts = Texts(plan)
    for rung, share in cells_of(plan, root):
        if rows.has(kind="cell", model=rung.name, share=share, depth=1):
            continue
        subject = subject_of(rung, share, plan, root, texts)
        row = cell_row(subject, 1, rung.seed, iterations)
        rows.add(row)
        _log.info(
            "%s after %g%%: printed %.2f, tuned %.2f, nearest %.2f, probe %.2f, recovery %.2f",
            rung.name, 100 * share, row["printed"], row["tuned"], row["tuned_nearest"],
            row["probe_top1"], row["recovery_right"],
        )  # fmt: skip


def cells_of(plan: Plan, root: Path) -> Iterator[tuple[Rung, float]]:
    """The models that are trained, both ends of the training first.

    Of a model trained at another rate only the end: before it, it is the model of rate 1.
    """
    ends = (plan.checkpoints[-1], plan.checkpoints[0])
    trained, others = trained_of(plan, root)
    between = [share for share in plan.checkpoints if share not in ends]
    yield from ((rung, share) for rung in trained for share in ends)
    yield from ((rung, ends[0]) for rung in others)
    yield from ((rung, share) for rung in trained for share in between)


def trained_of(plan: Plan, root: Path) -> tuple[list[Rung], list[Rung]]:
    """The models that are trained: at the plan's rate, and at others."""
    trained = [rung for rung in plan.rungs if is_trained(rung, plan, root)]
    return [rung for rung in trained if rung.rate == 1], [
        rung for rung in trained if rung.rate != 1
    ]


def intervene(plan: Plan, root: Path, rows: Rows, iterations: int) -> None:
    """Run every intervention on both ends of each rung's training; the same call resumes."""
    texts = Texts(plan)
    ends = (plan.checkpoints[-1], plan.checkpoints[0])
    trained, _ = trained_of(plan, root)
    for one, rung, (share, far) in product(INTERVENTIONS, trained, (ends, ends[::-1])):
        names = {"kind": "intervention", "intervention": one.name, "model": rung.name}
        if rows.has(**names, share=share, depth=1):
            continue
        subject = subject_of(rung, share, plan, root, texts)
        other = subject_of(rung, far, plan, root, texts).model
        row = intervention_row(one, subject, other, 1, rung.seed, iterations)
        rows.add(row)
        _log.info("%s after %g%%, %s: printed %.2f, tuned %.2f", rung.name, 100 * share,
                  one.name, row["printed"], row["tuned"])  # fmt: skip
