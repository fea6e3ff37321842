"""``python -m lightning_inversion.ladder``: train the ladder, measure it, write its page."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from lightning_inversion.cli.ending import end_process, ended_by_sigterm, exit_code
from lightning_inversion.ladder.channel import channel, survive
from lightning_inversion.ladder.measure import Rows, intervene, measure
from lightning_inversion.ladder.page import write
from lightning_inversion.ladder.plan import Plan
from lightning_inversion.ladder.pretrained import intervene_pretrained
from lightning_inversion.ladder.train import cost, train

STAGES = ("train", "measure", "intervene", "channel", "survive", "page")
CELLS, INTERVENED = "cells.jsonl", "interventions.jsonl"
CHANNEL, SURVIVAL = "channel.jsonl", "survival.jsonl"


def main(arguments: list[str] | None = None) -> int:
    """Run one stage; returns the exit code, 2 for a wrong option."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_inversion.ladder",
        description="Small models trained here, and what of a prompt can be read from them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("stage", choices=STAGES, help="what to do; each stage resumes where it was stopped")
    add("--plan", type=Path, default=Path("configs/ladder/ladder.yaml"), help="which models")
    add("--models", type=Path, default=Path("lightning_logs/ladder"), help="folder of the models")
    add("--rows", type=Path, default=Path("configs/ladder"), help="folder of the kept rows")
    add("--page", type=Path, default=Path("configs/LADDER.md"), help="whose tables are filled")
    add("--only", default="", help="models whose name contains this")
    add("--iterations", type=int, default=300, help="N of the recipe")
    add("--dry-run", action="store_true", help="print what training costs, run nothing")
    options = parser.parse_args(arguments)
    return exit_code("ladder", lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Run the stage.

    Raises:
        InputError: the plan or an option is wrong.
    """
    plan = Plan.read(options.plan)
    plan = replace(plan, rungs=tuple(rung for rung in plan.rungs if options.only in rung.name))
    if options.dry_run:
        for rung in plan.rungs:
            print(f"{rung.name}  {cost(rung, plan):.2g} floating-point operations")
        return
    with ended_by_sigterm():
        if options.stage == "train":
            train(plan, options.models)
        elif options.stage == "measure":
            measure(plan, options.models, Rows(options.rows / CELLS), options.iterations)
        elif options.stage == "intervene":
            rows = Rows(options.rows / INTERVENED)
            intervene(plan, options.models, rows, options.iterations)
            intervene_pretrained(plan, rows, options.iterations)
        elif options.stage == "channel":
            channel(plan, options.models, Rows(options.rows / CHANNEL), options.iterations)
        elif options.stage == "survive":
            survive(plan, options.models, Rows(options.rows / SURVIVAL))
        else:
            for path in write(options.rows, options.page):
                print(path)


if __name__ == "__main__":
    end_process(main())
