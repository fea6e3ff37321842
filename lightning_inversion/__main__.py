"""``python -m lightning_inversion`` and the console script: the commands, and how each one ends.

Help and version answer before torch is imported, which takes seconds.
"""

from __future__ import annotations

import difflib
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import NoReturn

from lightning_inversion import __version__
from lightning_inversion.cli.ending import end_process, exit_code, open_streams
from lightning_inversion.cli.options import (
    asked_help,
    check_files,
    check_names,
    first_page,
    in_full,
    names_typed,
    own_names,
    renamed,
)
from lightning_inversion.errors import InputError

_LIGHTNING = "cli.lightning"


@dataclass(frozen=True)
class Command:
    """What a command does, in one line, and the module that holds it.

    A command NAME outside of Lightning is a module with ``add_NAME_arguments(parser)`` and
    ``run_NAME(options)``, which returns the exit code.
    """

    help: str
    module: str = _LIGHTNING


COMMANDS = {
    "fit": Command("optimise an input until its features match a prompt's; shows the tokens live"),
    "validate": Command("decode and score the input that a checkpoint holds"),
    "predict": Command("recover the tokens one by one, each verified by running it"),
    "capture": Command("write features of prompts to a file for fit and predict", "data.capture"),
    "attribute": Command(
        "colour each token by its share in the prediction: HTML, JSON, terminal",
        "attribution.command",
    ),
    "sweep": Command("run a command over a grid of its options; resumable", "sweep.command"),
    "report": Command("turn result files into a table, figures and a page", "report.command"),
    "audit": Command("measure how much an observer of activations reads of prompts", "sweep.audit"),
    "cache": Command("list or clear what is kept of models between runs", "cli.cached"),
}  # fmt: skip
_OF_CALLS = {"recover": ["predict"], "invert": ["fit"]}
"""The commands that do what these calls of the package do."""

HELP = f"""\
lightning-inversion reads a language model's input back out of its hidden states.

usage: lightning-inversion COMMAND [options]

commands
{"".join(f"  {name:11} {command.help}" + chr(10) for name, command in COMMANDS.items())}
examples
  lightning-inversion fit --config configs/quickstart.yaml
  lightning-inversion fit --prompts prompts.txt --depth 4
  lightning-inversion fit --config configs/quickstart.yaml --ckpt_path last       resume
  lightning-inversion validate --config configs/quickstart.yaml --ckpt_path last
  lightning-inversion attribute "The wipers on the bus go swish swish" --out page.html
  lightning-inversion capture --prompts prompts.txt --depth 8 --out targets.safetensors
  lightning-inversion predict --targets targets.safetensors --depth 8
  lightning-inversion sweep --prompts prompts.txt --over depth=1,2,4,8 --seeds 3
  lightning-inversion report lightning_logs
  lightning-inversion audit --prompts prompts.txt --depth 1 8
  lightning-inversion cache

options
  --model NAME, --depth N, --prompts FILE     understood by every command that runs a model
  lightning-inversion COMMAND --help          the options that are used most
  lightning-inversion COMMAND --help all      every option
  lightning-inversion COMMAND --print_config  every value that fit, validate or predict would use
  --help, --version

Results go to stdout, messages to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage.
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0 done, 1 failed, 2 wrong usage.

    Args:
        args: the command line without the program's name; None for the process's own.
    """
    command_line = list(sys.argv[1:] if args is None else args)
    return exit_code("lightning-inversion", lambda: run(command_line))


def run(args: list[str]) -> int:
    """Run one command line; returns the exit code, and raises what goes wrong."""
    if not args or args[0] in {"-h", "--help"}:
        print(HELP, end="")
        return 0 if args else 2
    name, *options = args
    if name == "--version":
        print(f"lightning-inversion {__version__}")
        return 0
    if name not in COMMANDS:
        near = _OF_CALLS.get(name) or difflib.get_close_matches(name, COMMANDS, 1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"unknown command {name!r}; {meant}choose from {', '.join(COMMANDS)}.")
    help_wanted = asked_help(options)
    if help_wanted == "page" and (page := first_page(name)) is not None:
        print(page, end="")
        return 0
    if help_wanted is not None:
        options = ["--help"]
    check_files(options)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # stack traces of lost connections
    if COMMANDS[name].module == _LIGHTNING:
        return _run_lightning(name, options)
    return _run_other(name, options)


def _run_lightning(name: str, options: list[str]) -> int:
    """Run fit, validate or predict; an error names the options as they were typed."""
    check_names(name, options)
    try:
        _imported(f"lightning_inversion.{_LIGHTNING}").run_lightning([name, *in_full(options)])
    except InputError as error:
        raise InputError(renamed(str(error), names_typed(options))) from error
    return 0


def _run_other(name: str, options: list[str]) -> int:
    """Run a command with options of its own; an error names these."""
    command = _imported(f"lightning_inversion.{COMMANDS[name].module}")
    # Imported here: top-level help does without jsonargparse.
    from lightning_inversion.cli.parser import OneSentenceParser, options_of

    parser = OneSentenceParser(prog=f"lightning-inversion {name}", description=COMMANDS[name].help)
    getattr(command, f"add_{name}_arguments")(parser)
    try:
        code: int = getattr(command, f"run_{name}")(parser.parse_command(options))
    except InputError as error:
        sentence = renamed(str(error), names_typed(options) if parser.passes_on else {})
        raise InputError(renamed(sentence, own_names(options_of(parser), sentence))) from error
    return code


def _imported(name: str) -> ModuleType:
    """Import a module without garbage collection, which takes a sixth of the time of a start.

    What is imported stays, and so later collections need not look through it either.
    """
    if name in sys.modules:
        return sys.modules[name]
    gc.disable()
    try:
        with _starting():
            return import_module(name)
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def _starting() -> Iterator[None]:
    """Something that moves on a terminal from the first second: imports take several."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status("starting"):
        yield


def program() -> NoReturn:
    """Run the process's own command line; what the console script calls."""
    open_streams()
    end_process(main())


if __name__ == "__main__":
    program()
