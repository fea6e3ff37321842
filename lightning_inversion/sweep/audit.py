"""``lightning-inversion audit``: how much an observer of activations reads of the prompts.

A sweep of ``fit`` and ``predict`` over features that were captured first, and a page about it. What
is tried is said by ``audit.yaml``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from rich.console import Console

from lightning_inversion.errors import InputError
from lightning_inversion.report.audit import AuditRun, write_audit
from lightning_inversion.sweep.command import print_plan, root_of, run_cells
from lightning_inversion.sweep.estimate import depth_of
from lightning_inversion.sweep.folder import SweepFolder
from lightning_inversion.sweep.grid import Cell, short, written

if TYPE_CHECKING:
    from lightning_inversion.transformer.loading import TransformerSpec

CONFIG = Path(__file__).with_name("audit.yaml")
DESCRIPTION = """\
How much an observer of a model's activations reads of your prompts: by gradient inversion (fit) and
by exact recovery (predict), at each depth, and where the activations were rounded, noisy or cut.
Writes one page of HTML, led by what it comes to. An audit that was stopped goes on when it is asked
for again."""
EXAMPLES = """\
every other option goes to the runs as it is.

examples
  lightning-inversion audit --prompts prompts.txt --depths 1 8
  lightning-inversion audit --prompts prompts.txt --depths 4 --model gpt2 --dry-run
  lightning-inversion audit --prompts prompts.txt --config my_audit.yaml --trainer.accelerator gpu
"""


@dataclass(frozen=True)
class Channel:
    """What happens to the activations before an observer has them; see ``audit.yaml``."""

    store: Literal["float32", "bfloat16", "float16"] = "float32"
    noise: float = 0.0
    features: str | None = None


@dataclass(frozen=True)
class Attack:
    """How an observer reads: the channels (None for all), and the command's options."""

    channels: list[str] | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AuditPlan:
    """What is tried at each depth; see ``audit.yaml``."""

    channels: dict[str, Channel]
    fit: Attack = Attack()
    predict: Attack = Attack()

    @classmethod
    def read(cls, path: Path) -> AuditPlan:
        """The plan that a YAML file holds.

        Raises:
            InputError: the file cannot be read, or says what is not known.
        """
        import yaml
        from jsonargparse import ArgumentError, ArgumentParser

        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls)
        where = f"--config {str(path)!r}"
        try:
            found = parser.parse_object(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
            channels = {name: Channel(**vars(one)) for name, one in found.channels.items()}
            plan = cls(channels, Attack(**vars(found.fit)), Attack(**vars(found.predict)))
        except OSError as error:
            raise InputError(f"{where} cannot be read: {error.strerror}.") from error
        except (yaml.YAMLError, ArgumentError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{where} is no plan of an audit: {reason}.") from error
        if not plan.channels:
            raise InputError(f"{where} names no channel; write `channels: {{untouched: {{}}}}`.")
        if len({short(name) for name in plan.channels}) < len(plan.channels):
            raise InputError(f"{where} has channels whose names are too much alike; rename one.")
        for attack in (plan.fit, plan.predict):
            for name in attack.channels or ():
                if name not in plan.channels:
                    known = ", ".join(plan.channels)
                    raise InputError(f"{where}: {name!r} is no channel of it; there are {known}.")
        return plan

    def attacks(self) -> list[tuple[str, str, Attack]]:
        """Each command over each of its channels."""
        commands = (("fit", self.fit), ("predict", self.predict))
        return [
            (command, channel, attack)
            for command, attack in commands
            for channel in (self.channels if attack.channels is None else attack.channels)
        ]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"audit: {message}.")


def run(args: list[str]) -> int:
    """Plan an audit, run what is not done yet, and write its page; returns the exit code.

    Raises:
        InputError: the options are wrong; before anything has run.
    """
    options, rest = _parser().parse_known_args(args)
    if options.processes < 1:
        raise InputError(f"--processes must be at least 1, and is {options.processes}.")
    if len(set(options.depths)) < len(options.depths):
        raise InputError("--depths has a depth twice; leave one of them out.")
    plan = AuditPlan.read(options.config)
    if options.model is not None:
        rest = [f"--model.transformer.model={options.model}", *rest]
    if any(option.partition("=")[0] == "--config" for option in rest):
        raise InputError("audit: --config is given twice; name the plan alone.")

    from lightning_inversion.data.texts import read_prompts
    from lightning_inversion.sweep.run import check

    prompts = read_prompts(options.prompts, "--prompts")
    said = [prompts, sorted(options.depths), asdict(plan), rest]
    digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:6]
    folder = root_of(rest) / "lightning_logs" / f"audit-{digest}"
    cells = tuple(
        _cell(folder, plan, depth, command, channel, attack, rest)
        for depth in sorted(options.depths)
        for command, channel, attack in plan.attacks()
    )
    if not cells:
        raise InputError(f"--config {str(options.config)!r} leaves nothing to run.")
    sweep = SweepFolder(folder, cells)
    _capture(sweep, plan, options.prompts, rest)
    specs = check(sweep)
    if options.dry_run:
        noise = {name: channel.noise for name, channel in plan.channels.items()}
        # What noise hides takes the most candidates.
        print_plan(
            sweep,
            options.processes,
            cost=lambda cell: (depth_of(cell), noise[cell.values["channel"]]),
        )
        return 0
    try:
        return run_cells(sweep, specs, options.processes, Console(stderr=True, file=sys.stderr))
    finally:
        runs = [_run(sweep, cell) for cell in cells]
        if any(run.rows is not None for run in runs):
            print(write_audit(runs, folder / "audit.html"))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lightning-inversion audit",
        usage="lightning-inversion audit --prompts FILE [--depths N ...] [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE",
        help="texts, one a line (or .jsonl, key prompt)",
    )  # fmt: skip
    parser.add_argument(
        "--depths", type=int, nargs="+", default=[1, 8], metavar="N",
        help="after how many blocks the observer looks; default 1 8",
    )  # fmt: skip
    parser.add_argument("--model", help="hub id, folder or .gguf file; default SmolLM2-135M")
    parser.add_argument(
        "--config", type=Path, default=CONFIG, metavar="FILE",
        help=f"what is tried, as YAML; default {CONFIG}",
    )  # fmt: skip
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="share the runs out; one thread each"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="capture the activations, run a batch of the deepest and noisiest, and show the plan "
        "with its time",
    )
    return parser


def _cell(
    folder: Path,
    plan: AuditPlan,
    depth: int,
    command: str,
    channel: str,
    attack: Attack,
    rest: list[str],
) -> Cell:
    return Cell(
        f"{command},depth={depth},{short(channel)}",
        command,
        (
            *(f"--{key}={written(value)}" for key, value in attack.options.items()),
            *rest,
            *_transformer(plan.channels[channel], depth),
            f"--data.targets={folder / 'targets' / f'depth={depth},{short(channel)}.safetensors'}",
        ),
        {"command": command, "depth": str(depth), "channel": channel},
    )


def _transformer(channel: Channel, depth: int) -> list[str]:
    cut = [] if channel.features is None else [f"--model.transformer.features={channel.features}"]
    return [f"--model.transformer.depth={depth}", *cut]


def _capture(sweep: SweepFolder, plan: AuditPlan, prompts: Path, rest: list[str]) -> None:
    """Write the activations that each run starts from, where they are not there yet."""
    from lightning_inversion.data.capture import CaptureOptions, capture
    from lightning_inversion.sweep.run import spec_of
    from lightning_inversion.transformer.shared import SharedModels

    wanted: dict[Path, tuple[Channel, TransformerSpec]] = {}
    for cell in sweep.cells:
        path = Path(cell.arguments[-1].partition("=")[2])
        if path.exists() or path in wanted:
            continue
        channel, depth = plan.channels[cell.values["channel"]], int(cell.values["depth"])
        arguments = [*rest, *_transformer(channel, depth), f"--data.file={prompts}"]
        wanted[path] = channel, spec_of(cell.command, arguments)
    models = SharedModels([spec for _, spec in wanted.values()])
    for path, (channel, spec) in wanted.items():
        stored = CaptureOptions(
            prompts, path, store=channel.store, noise=channel.noise, keep_prompts=True
        )
        capture(stored, spec, models.load)


def _run(sweep: SweepFolder, cell: Cell) -> AuditRun:
    standing = sweep.standing(cell)
    return AuditRun(
        command=cell.command,
        depth=int(cell.values["depth"]),
        channel=cell.values["channel"],
        rows=sweep.of(cell) / "results.jsonl" if sweep.rows(cell) else None,
        state=standing.state,
        message=standing.message,
    )
