"""``python -m lightning_inversion`` and the console script.

Help and version answer before torch is imported, which takes seconds.
"""

import os
import sys
import threading
from importlib import import_module

from lightning_inversion import __version__
from lightning_inversion.errors import InputError
from lightning_inversion.files import ended_by

HELP = """\
lightning-inversion reads a language model's input back out of its hidden states.

usage: lightning-inversion COMMAND [options]

commands
  fit         optimise an input until its features match a prompt's; shows the tokens as they emerge
  validate    decode and score the input that a checkpoint holds
  predict     name the tokens one by one, each verified by running it, with certificates
  attribute   paint each token of a text by its share in the prediction; HTML, JSON, terminal
  capture     write the features of prompts to a file, which fit and predict take as --data.targets
  sweep       run a command over a grid of its options; resumes, shares cells over processes
  report      result files -> a table, figures, and one page of HTML
  audit       how much of your prompts an observer of their activations reads, as one page

examples
  lightning-inversion fit --config configs/quickstart.yaml
  lightning-inversion fit --data.file prompts.txt --model.transformer.depth 4
  lightning-inversion fit --config configs/original/original.yaml --data.prompts '["The sky is blue."]'
  lightning-inversion fit --config configs/quickstart.yaml --ckpt_path last       resume
  lightning-inversion validate --config configs/quickstart.yaml --ckpt_path last
  lightning-inversion attribute "The wipers on the bus go swish swish" --out page.html
  lightning-inversion capture --prompts prompts.txt --depth 8 --out targets.safetensors
  lightning-inversion predict --data.targets targets.safetensors --model.transformer.depth 8
  lightning-inversion sweep --data.file prompts.txt --over transformer.depth=1,2,4,8 --seeds 3
  lightning-inversion report lightning_logs
  lightning-inversion audit --prompts prompts.txt --depths 1 8

options
  lightning-inversion COMMAND --help          every option of a command
  lightning-inversion COMMAND --print_config  every value a command would run with, as YAML
  --help, --version
"""

COMMANDS = (
    "fit", "validate", "predict", "attribute", "capture", "sweep", "report", "audit",
)  # fmt: skip
"""Every command there is."""
BESIDE_LIGHTNING = {
    "sweep": "lightning_inversion.sweep.command",
    "report": "lightning_inversion.report.command",
    "audit": "lightning_inversion.sweep.audit",
}
"""Commands with options of their own; what they need of torch and Lightning they import later."""


def main() -> int:
    """Run the command line; returns the exit code (0 done, 1 failed, 2 wrong usage)."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(HELP, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"lightning-inversion {__version__}")
        return 0
    try:
        if arguments[0] not in COMMANDS and not arguments[0].startswith("-"):
            raise InputError(
                f"{arguments[0]!r} is no command; choose one of {', '.join(COMMANDS)}."
            )
        if arguments[0] in BESIDE_LIGHTNING:
            return int(import_module(BESIDE_LIGHTNING[arguments[0]]).run(arguments[1:]))
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # stack traces of lost connections
        cli = import_module("lightning_inversion.cli.lightning")
        threading.excepthook = cli.say_once_that_the_disk_is_full
        return int(cli.run(arguments))
    except InputError as error:
        print(f"lightning-inversion: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        sentence = ended_by(error)
        if sentence is None:
            raise
        print(f"lightning-inversion: {sentence}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
