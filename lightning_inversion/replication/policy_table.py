"""``python -m lightning_inversion.replication.policy_table``: results -> the table of recovery policies.

Reads ``configs/recovery/results`` alone; nothing in the table is typed by hand.
"""

from __future__ import annotations

import argparse
import json
from itertools import groupby
from pathlib import Path
from typing import Any

BASELINE = "recommended"

OPENING = """\
# Recovery policies, side by side

Texts are recovered token by token from their hidden states alone; each policy gets the same targets
in the same process. The texts are [prompts.jsonl](prompts.jsonl), cut to a number of tokens, with a
sequence of random tokens after every ninth. Written by a command from [results](results).

```
python -m lightning_inversion.replication.policies --policies recommended prior_alone sipit --cap 45  # resumes
python -m lightning_inversion.replication.policies --policies recommended prior_alone --prompts 10 --depths 15
python -m lightning_inversion.replication.policy_table                              # write this page
```

- *verified*: tokens that reproduce the target; *false*: verified, and wrong; *exact*: texts that
  are right as a whole.
- *candidates*: tokens tried for a place (median / 95% / most), position 0 aside: it has an order of
  its own, a scan of the vocabulary that is made once for a model and a depth and then kept.
- *forwards*: runs of the truncated model in which a text took part, summed over the texts;
  *x forward*: the time in units of one forward over all texts.
- *s a token*: seconds for each verified token; *x recommended*: the same in units of the
  recommended policy, on the same texts in the same process. A policy that was stopped has paid for
  its easiest tokens alone, not for the ones it was at: its *x recommended* is a lower bound, and
  can fall below 1 where the easiest tokens are cheap for everybody.
"""

_COLUMNS = (
    "policy", "right", "verified", "false", "exact", "candidates", "forwards", "seconds",
    "x forward", "s a token", "x recommended", "",
)  # fmt: skip


def write_table(results: Path) -> str:
    """The whole page."""
    rows = [row for file in sorted(results.glob("*.jsonl")) for row in _read(file)]
    parts = [OPENING]
    ordered = sorted(rows, key=_group)
    for (model, length, texts, depth), group in groupby(ordered, key=_group):
        members = list(group)
        blocks = f"{depth} block" + ("s" if depth > 1 else "")
        heading = f"## {Path(model).name}, {blocks}, {texts} x {length} tokens"
        lines = [
            f"| {' | '.join(_COLUMNS)} |",
            f"|{'|'.join('---' for _ in _COLUMNS)}|",
            *(_line(row, members) for row in _latest(members)),
        ]
        parts.append("\n".join([heading, "", _beforehand(members), "", *lines]) + "\n")
    return "\n".join(parts)


def _read(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line]


def _group(row: dict[str, Any]) -> tuple[str, int, int, int]:
    return row["model"], row["length"], row["texts"], row["depth"]


def _latest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last row of each policy, the baseline first."""
    last = {row["policy"]: row for row in rows}
    return sorted(last.values(), key=lambda row: row["policy"] != BASELINE)


def _beforehand(rows: list[dict[str, Any]]) -> str:
    """What is measured once for a model and a depth; a scan that was kept is only read."""
    measuring = max(row["measuring_seconds"] for row in rows)
    scanning = max(row["scan_seconds"] for row in rows)
    return (
        f"Beforehand, once: calibration and linear map {measuring:.1f} s, "
        f"position 0's scan {scanning:.1f} s (made, or read where it was kept). "
        f"One forward over all texts: {min(row['forward_seconds'] for row in rows):.2f} s."
    )


def _line(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    candidates = (row[f"candidates_{name}"] for name in ("median", "p95", "max"))
    each = _seconds_a_token(row)
    cells = [
        row["policy"],
        f"{row['right']}/{row['tokens']}",
        str(row["verified"]),
        str(row["false_certificates"]),
        f"{row['exact']}/{row['texts']}",
        " / ".join("-" if number is None else str(number) for number in candidates),
        str(row["forwards"]),
        f"{row['seconds']:.1f}",
        f"{row['seconds'] / row['forward_seconds']:.0f}",
        "-" if each is None else f"{each:.3g}",
        _ratio(row, rows),
        f"stopped after {row['cap']:g} s" if row["capped"] else "",
    ]
    return f"| {' | '.join(cells)} |"


def _seconds_a_token(row: dict[str, Any]) -> float | None:
    return float(row["seconds"]) / row["verified"] if row["verified"] else None


def _ratio(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """To the baseline of the same run; times of different runs are not compared."""
    beside = [one for one in rows if one["policy"] == BASELINE and one["run"] == row["run"]]
    base = _seconds_a_token(beside[-1]) if beside else None
    if base is None:
        return "-"
    each = _seconds_a_token(row)
    if each is None:  # not one token in all the time
        return f"> {row['seconds'] / base:.1f}"
    return f"{each / base:.1f}"


def main(arguments: list[str] | None = None) -> int:
    """Write the page; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_inversion.replication.policy_table",
        description="Write configs/recovery/README.md from configs/recovery/results.",
    )
    parser.add_argument("--configs", type=Path, default=Path("configs/recovery"))
    configs = parser.parse_args(arguments).configs
    page = configs / "README.md"
    page.write_text(write_table(configs / "results"), encoding="utf-8")
    print(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
