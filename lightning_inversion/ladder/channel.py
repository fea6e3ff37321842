"""How much of a prompt survives: fewer features, noise, low precision, depth."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lightning_inversion.data.storage import Storage
from lightning_inversion.files import Record
from lightning_inversion.inputs import MeanInitializer
from lightning_inversion.ladder.measure import (
    Rows,
    Subject,
    probe_scores,
    recipe_scores,
    recovery_scores,
    subject_of,
)
from lightning_inversion.ladder.plan import Plan, Rung
from lightning_inversion.ladder.pretrained import FEW, pretrained
from lightning_inversion.ladder.recipe import Recipe
from lightning_inversion.ladder.train import Texts, is_trained
from lightning_inversion.transformer.blocks import block_count

_log = logging.getLogger(__name__)
WIDTHS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 7 / 8, 15 / 16, 31 / 32, 127 / 128, 1)
"""Shares of the features that are kept: the first ones, as in the source."""
_BUDGET = 256
"""Candidates that recovery may run for a token."""


@dataclass(frozen=True)
class Setting:
    """What is left of the features.

    Attributes:
        name: in rows and tables.
        noise: std of Gaussian noise, in median std of the features.
        dtype: that they are rounded to.
        kept: share of the features, the first ones.
    """

    name: str
    noise: float = 0.0
    dtype: str = "float32"
    kept: float = 1.0


SETTINGS = (
    Setting("whole"),
    Setting("bfloat16", dtype="bfloat16"),
    Setting("first half", kept=0.5),
    Setting("first eighth", kept=1 / 8),
    Setting("noise 0.1", noise=0.1),
    Setting("noise 0.3", noise=0.3),
    Setting("noise 1", noise=1.0),
    Setting("noise 3", noise=3.0),
)


def subjects(plan: Plan, root: Path) -> Iterator[Subject]:
    """The middle rungs of seed 0 before and after training, then the pretrained model."""
    texts = Texts(plan)
    for rung in plan.rungs:
        if _is_example(rung) and is_trained(rung, plan, root):
            for share in (plan.checkpoints[0], plan.checkpoints[-1]):
                yield subject_of(rung, share, plan, root, texts)
    yield pretrained(plan)


def _is_example(rung: Rung) -> bool:
    example = (128, 2, 1024, 0, 1.0)
    return (rung.width, rung.blocks, rung.vocabulary, rung.seed, rung.rate) == example


def slice_of_share(width: int, kept: float) -> str | None:
    """The first features as a slice; None for all of them."""
    return None if kept == 1 else f"0:{max(1, round(kept * width))}"


def channel_row(subject: Subject, kept: float, iterations: int) -> Record:
    """The recipe, the probe and recovery on the first features at depth 1, beside the theory.

    ``from_mean`` is the recipe that starts at the mean embedding, read by the nearest embedding.

    ``theory_bits`` is what a Gaussian channel of the probe's signal and errors carries; Fano's
    inequality lets no reader of these name more than ``theory_right`` of tokens with even odds.
    """
    features = slice_of_share(subject.names["width"], kept)
    transformer = subject.cut(1, features)
    measurements = subject.measurements(transformer)
    recipe = Recipe(iterations, seed=subject.names["seed"])
    at_mean = replace(recipe, initializer=MeanInitializer())
    bits = float(measurements.probe.signal[1].clamp_min(1.0).log2().sum() / 2)
    vocabulary = transformer.embedding.vocabulary_size
    return {
        "kind": "channel", **subject.names, "depth": 1, "features": features,
        "kept": transformer.feature_size, "theory_bits": bits,
        "theory_right": fano(bits, vocabulary),
        **recipe_scores(transformer, subject, recipe),
        "from_mean": recipe_scores(transformer, subject, at_mean)["tuned_nearest"],
        **probe_scores(measurements, subject.held_out),
        **recovery_scores(measurements, subject.reported, budget=_BUDGET),
    }  # fmt: skip


def fano(bits: float, choices: int) -> float:
    """The largest share of right guesses among equally likely choices, given information in bits.

    Fano: log2 K - I <= h(e) + e log2(K - 1), with e the share of wrong guesses.

    >>> fano(10.0, 1024), round(fano(0.0, 1024), 4)
    (1.0, 0.001)
    """
    missing = math.log2(choices) - bits
    if missing <= 0:
        return 1.0
    low, high = 0.0, 1 - 1 / choices
    for _ in range(60):
        error = (low + high) / 2
        entropy = -sum(p * math.log2(p) for p in (error, 1 - error) if p > 0)
        enough = entropy + error * math.log2(choices - 1) >= missing
        low, high = (low, error) if enough else (error, high)
    return 1 - high


def channel(plan: Plan, root: Path, rows: Rows, iterations: int) -> None:
    """Rows of every width; the same call resumes."""
    for subject in subjects(plan, root):
        for kept in WIDTHS if subject.text is not None else WIDTHS[2::3]:
            features = slice_of_share(subject.names["width"], kept)
            names = {name: subject.names[name] for name in ("model", "share")}
            if rows.has(kind="channel", **names, depth=1, features=features):
                continue
            steps = iterations if subject.text is not None else min(iterations, 200)
            row = channel_row(subject, kept, steps)
            rows.add(row)
            _log.info(
                "%s after %g%%, [0:%d]: tuned %.2f, nearest %.2f, probe %.2f, recovery %.2f, "
                "Fano %.2f", row["model"], 100 * row["share"], row["kept"], row["tuned"],
                row["tuned_nearest"], row["probe_top1"], row["recovery_right"],
                row["theory_right"],
            )  # fmt: skip


def survive(plan: Plan, root: Path, rows: Rows) -> None:
    """Rows of every setting and depth; the same call resumes."""
    for subject in subjects(plan, root):
        blocks = block_count(subject.model.config)
        for depth in sorted({1, min(8, blocks), blocks}):
            for setting in SETTINGS:
                names = {name: subject.names[name] for name in ("model", "share")}
                names["features"] = slice_of_share(subject.names["width"], setting.kept)
                if not rows.has(kind="survival", **names, depth=depth, channel=setting.name):
                    row = survival_row(subject, depth, setting)
                    rows.add(row)
                    _log.info(
                        "%s after %g%%, depth %d, %s: probe %.2f, %.1f bits, recovery %.2f, "
                        "verified %.2f, falsely %d", row["model"], 100 * row["share"], depth,
                        setting.name, row["probe_top1"], row["probe_read_bits"],
                        row["recovery_right"], row["recovery_verified"], row["recovery_false"],
                    )  # fmt: skip


def survival_row(subject: Subject, depth: int, setting: Setting) -> Record:
    """What the probe and recovery read of what a setting leaves."""
    features = slice_of_share(subject.names["width"], setting.kept)
    transformer = subject.cut(depth, features)
    noise = 0.0
    if setting.noise:
        with torch.no_grad():
            put_out = transformer.features_of(subject.held_out[:4])[:, 1:].flatten(0, 1)
        noise = setting.noise * float(put_out.std(0).median())
    storage = Storage(setting.dtype, noise)
    measurements = subject.measurements(transformer, storage)
    return {
        "kind": "survival", **subject.names, "depth": depth, "features": features,
        "channel": setting.name, "noise": noise,
        **probe_scores(measurements, subject.held_out, storage),
        **recovery_scores(measurements, subject.reported[:FEW], storage, _BUDGET),
    }  # fmt: skip
