"""A model that was not trained here, on the ladder's prompts: SmolLM2-135M."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import product

from lightning_inversion.ladder.interventions import BLOCK_CHANGES, INTERVENTIONS
from lightning_inversion.ladder.measure import Rows, Subject, intervention_row, prompts_of
from lightning_inversion.ladder.plan import Plan
from lightning_inversion.ladder.train import encoded
from lightning_inversion.transformer.loading import TransformerSpec

_log = logging.getLogger(__name__)
PRETRAINED = "SmolLM2-135M"
FEW = 5
"""Prompts that it is measured on."""


def pretrained(plan: Plan) -> Subject:
    """SmolLM2-135M on the prompts of the ladder's text; its probe is fitted on text of its own."""
    model, tokenizer = TransformerSpec().load_causal_lm()
    rows = encoded(tokenizer, plan.held_out[:200])
    held_out = rows[: 16 * plan.length].view(-1, plan.length)
    tuning, reported = prompts_of(tokenizer, plan.held_out)
    config = model.config
    names = {"model": PRETRAINED, "shape": "llama", "width": config.hidden_size,
             "blocks": config.num_hidden_layers, "vocabulary": config.vocab_size,
             "seed": 0, "share": 1.0}  # fmt: skip
    return Subject(model, tokenizer, tuning[:2], reported[:FEW], None, held_out, names)


def intervene_pretrained(plan: Plan, rows: Rows, iterations: int) -> None:
    """Exchange and resize the blocks of the pretrained model, and of one of its shape without
    training; the same call resumes."""
    trained = pretrained(plan)
    model, _ = TransformerSpec(weights="untrained").load_causal_lm()
    untrained = replace(trained, model=model, names={**trained.names, "share": 0.0})
    changes = [one for one in INTERVENTIONS if one.name in ("none", *BLOCK_CHANGES)]
    for one, (own, other) in product(changes, ((trained, untrained), (untrained, trained))):
        names = {name: own.names[name] for name in ("model", "share")}
        if rows.has(kind="intervention", intervention=one.name, **names, depth=1):
            continue
        row = intervention_row(one, own, other.model, 1, own.names["seed"], iterations)
        rows.add(row)
        _log.info("%s after %g%%, %s: printed %.2f, tuned %.2f", row["model"],
                  100 * row["share"], one.name, row["printed"], row["tuned"])  # fmt: skip
