"""``lightning-inversion sweep``: plan, run and resume a grid of runs."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from lightning_inversion.cli.options import in_full, renamed
from lightning_inversion.cli.parser import OneSentenceParser
from lightning_inversion.errors import InputError
from lightning_inversion.files import check_processes, check_writable, is_plain_name, printable
from lightning_inversion.sweep.grid import (
    COMMANDS,
    MAX_CELLS,
    SEED,
    Axis,
    cells_of,
    key_of,
    read_axis,
)

if TYPE_CHECKING:
    from lightning_inversion.sweep.run import Sweep


def add_sweep_arguments(parser: OneSentenceParser) -> None:
    """The options of a sweep; those of the command that it runs are passed on."""
    parser.passes_on = True
    parser.add_argument("command", nargs="?", default="fit", choices=COMMANDS)
    parser.add_argument("--over", action="append", default=[], metavar="KEY=VALUE,VALUE")
    parser.add_argument("--seeds", type=int, metavar="N")
    parser.add_argument("--name")
    add_running_arguments(parser)
    parser.add_argument("--join", type=Path, metavar="FOLDER")


def add_running_arguments(parser: OneSentenceParser) -> None:
    """How the cells are run."""
    parser.add_argument("--processes", type=int, default=1, metavar="N")
    parser.add_argument("--dry-run", action="store_true")


def run_sweep(options: Namespace) -> int:
    """Plan a sweep, run its cells and write their report; returns the exit code.

    Raises:
        InputError: the options are wrong; before anything has run.
    """
    check_processes(options.processes)

    # Torch and Lightning take seconds to import, which --help does not need.
    from lightning_inversion.sweep.run import MODEL_KEYS, Sweep, check, run_cells

    options.passed_on = in_full(options.passed_on)
    sweep = _planned(options) if options.join is None else Sweep.open(options.join)
    try:
        specs = check(sweep)
    except InputError as error:
        typed = [text.partition("=")[0].strip().removeprefix("--") for text in options.over]
        names = {f"--{key_of(key, MODEL_KEYS)}": f"--over {key}" for key in typed}
        raise InputError(renamed(str(error), names)) from error
    if options.dry_run:
        print_cells(sweep)
        return 0
    code = run_cells(sweep, specs, options.processes)
    if options.join is None and not sweep.unfinished():
        write_report(sweep.path)
    return code


def _planned(options: Namespace) -> Sweep:
    """The sweep that the options ask for."""
    from lightning_inversion.sweep.run import MODEL_KEYS, Sweep

    axes = [read_axis(text, MODEL_KEYS) for text in options.over]
    if options.seeds is not None:
        if not 1 <= options.seeds <= MAX_CELLS:
            raise InputError(f"--seeds must be between 1 and {MAX_CELLS}, and is {options.seeds}.")
        axes.append(Axis(SEED, tuple(map(str, range(options.seeds)))))
    if not axes:
        raise InputError("A sweep needs --over KEY=VALUE,VALUE or --seeds N; give one or both.")
    cells = cells_of(options.command, options.passed_on, axes)
    name = options.name
    if name is None:  # the same command line gives the same name, and so resumes
        text = json.dumps([cell.arguments for cell in cells])
        digest = hashlib.sha256(text.encode()).hexdigest()[:6]
        name = "-".join([options.command, *(axis.name for axis in axes), digest])
    if not is_plain_name(name):
        raise InputError(f"--name {name!r} is not a plain name; use letters, digits, _ and -.")
    return Sweep(root_of(options.passed_on) / "lightning_logs" / name, cells)


def root_of(arguments: Sequence[str]) -> Path:
    """The folder that lightning_logs is in.

    Raises:
        InputError: nothing can be written there.
    """
    option, root = "--trainer.default_root_dir", Path()
    for given, after in zip(arguments, [*arguments, ""][1:], strict=True):
        if given == option:
            root = Path(after)
        elif given.startswith(f"{option}="):
            root = Path(given.partition("=")[2])
    check_writable(root, option, folder=True)
    return root


def print_cells(sweep: Sweep) -> None:
    """List the cells on stdout, with what is done."""
    left = {cell.name for cell in sweep.unfinished()}
    print(printable(str(sweep.path)))
    for cell in sweep.cells:
        done = "" if cell.name in left else ": done"
        print(printable(f"  {cell.name}{done}\n    {cell.command} {shlex.join(cell.arguments)}"))
    print(f"{len(left)} of {len(sweep.cells)} cells to run")


def write_report(folder: Path) -> None:
    """Write the report of a sweep into its folder, its figures as TensorBoard images too."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    from lightning_inversion.report.command import write_files
    from lightning_inversion.report.load import load_results

    out = folder / "report"
    written = write_files(load_results([folder]), out)
    for old in out.glob("events.out.tfevents.*"):
        old.unlink()
    writer = EventFileWriter(str(out))
    for path in written:
        if path.suffix == ".png":
            image = Summary.Image(encoded_image_string=path.read_bytes())
            value = Summary.Value(tag=f"sweep/{path.stem}", image=image)
            writer.add_event(Event(summary=Summary(value=[value])))
    writer.close()
    print(printable((out / "table.md").read_text("utf-8")))
    print(printable(str(written[0])))
