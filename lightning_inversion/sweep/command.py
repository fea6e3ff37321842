"""``lightning-inversion sweep``: plan, run and resume a grid of runs."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console

from lightning_inversion.errors import InputError
from lightning_inversion.sweep.estimate import depth_of, estimate, in_words, total
from lightning_inversion.sweep.folder import SweepFolder
from lightning_inversion.sweep.grid import SEED, Axis, Cell, Part, cells_of, read_axis
from lightning_inversion.sweep.progress import Progress

if TYPE_CHECKING:
    from lightning_inversion.transformer.loading import TransformerSpec

COMMANDS = ("fit", "predict")
DESCRIPTION = """\
Run a command over a grid of its options. Each cell is a normal run in a folder of its own, under
lightning_logs/NAME; a sweep that was stopped goes on when it is asked for again."""
EXAMPLES = """\
every other option goes to the command as it is.

examples
  lightning-inversion sweep --config configs/quickstart.yaml --over transformer.depth=1,2,4,8
  lightning-inversion sweep --data.file prompts.txt --over objective=L1,CosineDistance --seeds 3
  lightning-inversion sweep predict --data.file prompts.txt --over transformer.depth=1,8 --dry-run
  lightning-inversion sweep --join lightning_logs/NAME     take part in a sweep that is running
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"sweep: {message}.")


def run(args: list[str]) -> int:
    """Plan a sweep, run its cells and show them; returns the exit code.

    Raises:
        InputError: the options are wrong; before anything has run.
    """
    options, rest = _parser().parse_known_args(args[1:] if args[:1] in _WITH_COMMAND else args)
    command = args[0] if args[:1] in _WITH_COMMAND else COMMANDS[0]
    if options.processes < 1:
        raise InputError(f"--processes must be at least 1, and is {options.processes}.")
    if options.seeds is not None and options.seeds < 1:
        raise InputError(f"--seeds must be at least 1, and is {options.seeds}.")
    console = Console(stderr=True, file=sys.stderr)
    if options.join is not None:
        sweep = SweepFolder.open(options.join)
    else:
        sweep = _planned(command, options, rest)

    from lightning_inversion.sweep.run import check  # torch, Lightning: not spent on --help

    specs = check(sweep)
    if options.dry_run:
        print_plan(sweep, options.processes)
        return 0
    if options.join is not None:
        return run_cells(sweep, specs, 1, console)
    code = run_cells(sweep, specs, options.processes, console)
    print(sweep.path)
    if not sweep.unfinished():
        from lightning_inversion.sweep.ending import write_report

        print(write_report(sweep))
    return code


def run_cells(
    sweep: SweepFolder, specs: Sequence[TransformerSpec], processes: int, console: Console
) -> int:
    """Run what is not done yet, and show how it goes; returns the exit code.

    It is 1 if a cell failed, or the run was stopped: by a SIGTERM or from the keyboard.

    Args:
        sweep: whose cells.
        specs: of their models, from `work.check`.
        processes: that share them; in this one if 1.
        console: where the progress goes.
    """
    from lightning_inversion.sweep.run import work

    sweep.save()
    progress = Progress(sweep, processes, console)
    if left := sweep.unfinished():
        seconds = total(left, sweep.finished(), processes)
        beforehand = "; --dry-run tells it beforehand" if seconds is None else ""
        console.print(
            f"{sweep.path}\n{len(left)} of {len(sweep.cells)} cells to run: "
            f"{in_words(seconds)}{beforehand}",
            soft_wrap=True,
            markup=False,
            highlight=False,
        )
    try:
        with _ended_by_sigterm(), progress.shown():
            if processes == 1:
                failed = work(sweep, specs, ended=progress.say)
            else:
                failed = _share(sweep, processes, progress)
    except (KeyboardInterrupt, SystemExit):
        print("lightning-inversion: stopped; the same command goes on.", file=sys.stderr)
        return 1
    Console().print(progress.table())
    for name, message in failed.items():
        print(f"lightning-inversion: {name} failed, {message}", file=sys.stderr)
    return 1 if failed else 0


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let a SIGTERM end the block at once, so that other processes, locks and tables end too."""

    def end(*_: Any) -> NoReturn:
        raise SystemExit(1)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


_WITH_COMMAND = tuple([command] for command in COMMANDS)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lightning-inversion sweep",
        usage="lightning-inversion sweep [fit|predict] --over KEY=VALUE,VALUE ... [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--over",
        action="append",
        default=[],
        metavar="KEY=V,V",
        help="a key of the config and its values; given several times, every combination runs. "
        "'model.' may be left out. Commas in brackets or quotes belong to a value.",
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="each cell with seeds 0 to N-1")
    parser.add_argument("--name", help="of the sweep's folder; default, made of the options")
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="share the cells out; one thread each"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only show the plan, with the time it needs: from finished cells, or from the first "
        "iterations of one; of predict, from a batch",
    )
    parser.add_argument("--join", type=Path, metavar="FOLDER", help="run cells of a sweep there is")
    return parser


def _planned(command: str, options: argparse.Namespace, rest: list[str]) -> SweepFolder:
    """The sweep that the options ask for."""
    from lightning_inversion.sweep.run import MODEL_KEYS

    axes = [read_axis(text, MODEL_KEYS) for text in options.over]
    if options.seeds is not None:
        axes.append(Axis(SEED, tuple(map(str, range(options.seeds)))))
    if not axes:
        raise InputError("A sweep needs --over KEY=VALUE,VALUE or --seeds N; give one or both.")
    cells = cells_of([Part(command, tuple(rest), tuple(axes))])
    name = options.name or _name(command, axes, cells)
    if Path(name).name != name:
        raise InputError(f"--name {name!r} is a path; give a plain name.")
    return SweepFolder(root_of(rest) / "lightning_logs" / name, tuple(cells))


def _name(command: str, axes: list[Axis], cells: list[Cell]) -> str:
    """The same command line gives the same name, and so goes on where it stopped."""
    text = json.dumps([cell.arguments for cell in cells])
    return "-".join(
        [command, *(a.name for a in axes), hashlib.sha256(text.encode()).hexdigest()[:6]]
    )


def root_of(rest: list[str]) -> Path:
    """The folder that lightning_logs is in."""
    option = "--trainer.default_root_dir"
    for given, after in zip(rest, [*rest, ""][1:], strict=True):
        if given == option:
            return Path(after)
        if given.startswith(f"{option}="):
            return Path(given.partition("=")[2])
    return Path()


def print_plan(sweep: SweepFolder, processes: int, cost: Callable[[Cell], Any] = depth_of) -> None:
    """The cells, what is done, and how long the rest takes.

    Args:
        sweep: whose cells.
        processes: that would share them.
        cost: orders the cells of a command; the one with the most is tried, so that the time is
            rather too long than too short.
    """
    from lightning_inversion.sweep.run import probe

    left, timed = sweep.unfinished(), sweep.finished()
    measured = ""
    untimed = {cell.command for cell in left} - {cell.command for cell, _ in timed}
    for command in sorted(untimed):
        costliest = max((cell for cell in left if cell.command == command), key=cost)
        seconds = probe(costliest)
        if seconds is not None:
            timed.append((costliest, seconds))
            tried = "first iterations" if command == "fit" else "first batch"
            measured += f"; {command} from the {tried} of {costliest.name}"
    print(sweep.path)
    for cell in sweep.cells:
        seconds = estimate(cell, timed)
        said = "done" if cell not in left else in_words(seconds)
        print(f"  {cell.name}: {said}\n    {cell.command} {shlex.join(cell.arguments)}")
    needed = in_words(total(left, timed, processes))
    print(f"{len(left)} of {len(sweep.cells)} cells to run: {needed}{measured}")


def _share(sweep: SweepFolder, processes: int, progress: Progress) -> dict[str, str]:
    """Let so many processes take the cells up; each takes one nobody else has."""
    command = [sys.executable, "-m", "lightning_inversion", "sweep", "--join", str(sweep.path)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            command, env=one_thread, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(min(processes, len(sweep.unfinished())))
    ]
    try:
        while any(worker.poll() is None for worker in workers):
            time.sleep(0.2)
            progress.say()
    except BaseException:
        for worker in workers:
            worker.terminate()
        raise
    progress.say()
    stand = {cell.name: sweep.standing(cell) for cell in sweep.unfinished()}
    return {name: standing.message or "it was stopped" for name, standing in stand.items()}
