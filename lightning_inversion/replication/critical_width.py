"""``python -m lightning_inversion.replication.critical_width``: how many features are enough?

The source's 'Noise on a Discreet Channel' finds one width at which every token is recovered and
below which none is. Bisection finds a width k that recovers while k - 1 does not; where success is
not monotone there are several, and the full curve (the experiments ``channel-...``) shows which.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from lightning_inversion.cli.ending import exit_code
from lightning_inversion.errors import InputError
from lightning_inversion.replication.run import QUIET
from lightning_inversion.sweep.grid import Cell
from lightning_inversion.sweep.run import Sweep, check, run_cells
from lightning_inversion.transformer.blocks import text_config


def bisect_width(recovers: Callable[[int], bool], widest: int) -> int | None:
    """A width that recovers while the next smaller does not; None if ``widest`` does not.

    Args:
        recovers: tries a width from 1 to ``widest``; called about log2(widest) times.
        widest: all the features there are.
    """
    if not recovers(widest):
        return None
    low, high = 0, widest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if recovers(middle) else (middle, high)
    return high


def recovers(arguments: list[str], width: int) -> bool:
    """Whether a fit on the first ``width`` features recovers its prompts exactly.

    Raises:
        InputError: the fit failed; its message has been logged.
    """
    options = (*arguments, f"--model.transformer.features=0:{width}", *QUIET)
    with tempfile.TemporaryDirectory() as folder:
        cell = Cell(f"0-{width}", "fit", options, {})
        sweep = Sweep(Path(folder) / "critical_width", (cell,))
        if run_cells(sweep, check(sweep)):
            raise InputError(f"the fit on [0:{width}] did not succeed.")
        exact = all(row.exact for row in sweep.rows(cell))
    print(f"[0:{width}] {'recovers' if exact else 'does not recover'}", flush=True)
    return exact


def main(arguments: list[str] | None = None) -> int:
    """Print the critical width of a prompt; returns the exit code, 2 for a wrong option."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_inversion.replication.critical_width",
        description="The critical width k of [0:k] by bisection. Other options go to fit.",
    )
    parser.add_argument("--config", default="configs/original/recommended.yaml")
    parser.add_argument("--prompt", default="Mario the man versus Mario the idea")
    options, more = parser.parse_known_args(arguments)
    fit = [f"--config={options.config}", f"--data.prompts={json.dumps([options.prompt])}", *more]
    return exit_code("critical_width", lambda: print_width(fit))


def print_width(arguments: list[str]) -> None:
    """Print the critical width of a fit with these options.

    Raises:
        InputError: an option is wrong, or a fit failed.
    """
    whole = Cell("all", "fit", tuple(arguments), {})
    (spec,) = check(Sweep(Path("lightning_logs/critical_width"), (whole,)))
    widest = int(text_config(spec.config()).hidden_size)
    width = bisect_width(lambda width: recovers(arguments, width), widest)
    print("no width recovers" if width is None else f"critical width {width} of {widest}")


if __name__ == "__main__":
    raise SystemExit(main())
