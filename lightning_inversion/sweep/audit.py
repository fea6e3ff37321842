"""``lightning-inversion audit``: how much an observer of activations reads of the prompts.

A sweep of ``fit`` and ``predict`` over features that are captured first, and a page about it. The
plan ``audit.yaml`` lists what is tried.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from lightning_inversion.cli.parser import OneSentenceParser
from lightning_inversion.errors import InputError
from lightning_inversion.files import check_processes, printable
from lightning_inversion.results import FILE
from lightning_inversion.sweep.command import (
    add_running_arguments,
    print_cells,
    root_of,
)
from lightning_inversion.sweep.grid import COMMANDS, Cell, check_count, short
from lightning_inversion.untrusted import read_file, read_yaml

if TYPE_CHECKING:
    from lightning_inversion.data.capture import CaptureOptions
    from lightning_inversion.report.audit_page import AuditRun
    from lightning_inversion.sweep.run import Sweep
    from lightning_inversion.transformer.loading import TransformerSpec

CONFIG = Path(__file__).with_name("audit.yaml")


@dataclass(frozen=True)
class ChannelSpec:
    """What happens to the activations before an observer has them; see ``audit.yaml``."""

    store: Literal["float32", "bfloat16", "float16"] = "float32"
    noise: float = 0.0
    noise_kind: Literal["gaussian", "laplace"] = "gaussian"
    largest: float = 1.0
    features: str | None = None

    def stored(self, prompts: Path, path: Path) -> CaptureOptions:
        """How the activations of a file of prompts are captured and stored at ``path``."""
        from lightning_inversion.data.capture import CaptureOptions  # it imports torch

        return CaptureOptions(
            prompts, path, store=self.store, noise=self.noise, noise_kind=self.noise_kind,
            largest=self.largest, keep_prompts=True,
        )  # fmt: skip


@dataclass(frozen=True)
class Attack:
    """How an observer reads: the channels (None for all), and the command's options."""

    channels: list[str] | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AuditPlan:
    """What is tried at each depth; see ``audit.yaml``."""

    channels: dict[str, ChannelSpec]
    fit: Attack = Attack()
    predict: Attack = Attack()

    @classmethod
    def read(cls, path: Path) -> AuditPlan:
        """The plan that a YAML file holds.

        Raises:
            InputError: the file cannot be read, or holds no plan.
        """
        where = f"--config {str(path)!r}"
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls)
        try:
            found = parser.parse_object(read_yaml(read_file(path)) or {})
            channels = {name: ChannelSpec(**vars(one)) for name, one in found.channels.items()}
            plan = cls(channels, Attack(**vars(found.fit)), Attack(**vars(found.predict)))
        except OSError as error:
            raise InputError(f"{where} cannot be read: {error.strerror}.") from error
        except (ArgumentError, TypeError, AttributeError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise InputError(f"{where} is no plan of an audit: {reason}.") from error
        if not plan.channels:
            raise InputError(f"{where} names no channel; write `channels: {{untouched: {{}}}}`.")
        if not all(isinstance(name, str) for name in plan.channels):
            raise InputError(f"{where} has a channel whose name is not a string; put it in quotes.")
        if len({short(name) for name in plan.channels}) < len(plan.channels):
            raise InputError(f"{where} has channels whose names are too much alike; rename one.")
        for attack in (plan.fit, plan.predict):
            if not _can_be_written(attack.options):
                raise InputError(
                    f"{where} has options that are not a mapping of names to texts, numbers, true, "
                    "false, null or lists of them; correct them, with dates in quotes."
                )
            for name in attack.channels or ():
                if name not in plan.channels:
                    known = ", ".join(plan.channels)
                    raise InputError(f"{where}: {name!r} is no channel of it; choose from {known}.")
        return plan


def add_audit_arguments(parser: OneSentenceParser) -> None:
    """The options of an audit; others are passed on to its runs."""
    parser.passes_on = True
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE")
    parser.add_argument("--depth", type=int, nargs="+", default=[1, 8], metavar="N")
    parser.add_argument("--model", metavar="NAME")
    parser.add_argument("--config", type=Path, default=CONFIG, metavar="FILE")
    add_running_arguments(parser)


def run_audit(options: Namespace) -> int:
    """Plan an audit, run what is not done yet, and write its page; returns the exit code.

    Raises:
        InputError: the options are wrong; before anything has run.
    """
    check_processes(options.processes)
    if len(set(options.depth)) < len(options.depth):
        raise InputError("--depth has a depth twice; leave one of them out.")
    plan = AuditPlan.read(options.config)
    passed_on = options.passed_on
    if options.model is not None:
        passed_on = [f"--model.transformer.model={options.model}", *passed_on]

    # Torch, Lightning and pandas take seconds to import, which --help does not need.
    from lightning_inversion.data.texts import read_prompts
    from lightning_inversion.report.audit_page import write_audit
    from lightning_inversion.sweep.run import Sweep, check, run_cells

    prompts = read_prompts(options.prompts, "--prompts")
    asked = [prompts, sorted(options.depth), asdict(plan), passed_on]
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:6]
    folder = root_of(passed_on) / "lightning_logs" / f"audit-{digest}"
    check_count(2 * len(plan.channels) * len(options.depth), "--config and --depth")
    cells = tuple(audit_cells(plan, sorted(options.depth), passed_on, folder))
    if not cells:
        raise InputError(f"--config {str(options.config)!r} leaves nothing to run.")
    sweep = Sweep(folder, cells)
    specs = _specs_to_capture(sweep, plan, options.prompts)
    if options.dry_run:
        print_cells(sweep)
        return 0
    _capture(specs.values())
    try:
        return run_cells(sweep, check(sweep), options.processes)
    finally:
        runs = [_run_of(sweep, cell) for cell in cells]
        if any(run.rows is not None for run in runs):
            print(printable(str(write_audit(runs, folder / "audit.html"))))


def audit_cells(
    plan: AuditPlan, depths: Sequence[int], passed_on: Sequence[str], folder: Path
) -> Iterator[Cell]:
    """Each attack at each depth over each of its channels.

    Args:
        plan: what is tried.
        depths: after how many blocks the observer looks.
        passed_on: options of every run.
        folder: of the audit, in which the activations are.
    """
    for depth in depths:
        for command, attack in zip(COMMANDS, (plan.fit, plan.predict), strict=True):
            for channel in plan.channels if attack.channels is None else attack.channels:
                name = f"depth={depth},{short(channel)}"
                yield Cell(
                    f"{command},{name}",
                    command,
                    (
                        *(f"--{key}={_written(value)}" for key, value in attack.options.items()),
                        *passed_on,
                        *_transformer(plan.channels[channel], depth),
                        f"--data.targets={folder / 'targets' / f'{name}.safetensors'}",
                    ),
                    {"command": command, "depth": str(depth), "channel": channel},
                )


def _can_be_written(options: Any) -> bool:
    """Whether options have names that are texts, and values that the command line can hold."""
    try:
        json.dumps(options)
    except (TypeError, ValueError):
        return False
    return isinstance(options, dict) and all(isinstance(name, str) for name in options)


def _written(value: Any) -> str:
    """A value as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _transformer(channel: ChannelSpec, depth: int) -> list[str]:
    cut = [] if channel.features is None else [f"--model.transformer.features={channel.features}"]
    return [f"--model.transformer.depth={depth}", *cut]


def _specs_to_capture(
    sweep: Sweep, plan: AuditPlan, prompts: Path
) -> dict[Path, tuple[CaptureOptions, TransformerSpec]]:
    """The files of activations that are not there yet: what is in each, and its model.

    Raises:
        InputError: a channel, or the options of fit or predict, are wrong.
    """
    from lightning_inversion.sweep.run import spec_of

    wanted: dict[Path, tuple[CaptureOptions, TransformerSpec]] = {}
    checked: set[str] = set()
    for cell in sweep.cells:
        path = Path(cell.arguments[-1].partition("=")[2])
        if path.exists() or (path in wanted and cell.command in checked):
            continue
        name = cell.values["channel"]
        stored = plan.channels[name].stored(prompts, path)
        stored.storage.check(f"--config: channel {name!r}: ")
        arguments = [*cell.arguments[:-1], f"--data.file={prompts}"]
        wanted[path] = stored, spec_of(cell.command, arguments)
        checked.add(cell.command)
    return wanted


def _capture(wanted: Collection[tuple[CaptureOptions, TransformerSpec]]) -> None:
    """Write the activations that each run starts from."""
    from lightning_inversion.data.capture import capture
    from lightning_inversion.transformer.shared import SharedModels

    models = SharedModels([spec for _, spec in wanted])
    for stored, spec in wanted:
        capture(stored, spec, models.load)


def _run_of(sweep: Sweep, cell: Cell) -> AuditRun:
    from lightning_inversion.report.audit_page import AuditRun

    status = sweep.status(cell)
    return AuditRun(
        command=cell.command,
        depth=int(cell.values["depth"]),
        channel=cell.values["channel"],
        rows=sweep.folder(cell) / FILE if sweep.rows(cell) else None,
        state=status.state,
        message=status.message or None,
    )
