"""The parser of fit, validate and predict, and what the help of each shows."""

from argparse import SUPPRESS, HelpFormatter
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lightning_inversion.cli.options import SECTIONS, SHORT
from lightning_inversion.cli.parser import OneSentenceParser
from lightning_inversion.errors import InputError

_OF_ANOTHER_COMMAND = {
    "fit": ("display", "model.recovery"),
    "predict": (
        *("learning_rate", "decoding", "stopping", "checkpoint", "model.objective"),
        *("model.optimizer", "model.schedule", "model.decoder", "model.allowed_tokens"),
        *("model.own_tokens", "model.masked_score", "model.isolated", "model.iterations"),
    ),
    "validate": ("learning_rate", "display", "checkpoint", "model.recovery"),
}
"""Keys that a command accepts, so that one config serves all, and does not use."""


class LightningParser(OneSentenceParser, LightningArgumentParser):
    """The parser of all commands, with what Lightning's needs; its help shows our options first."""

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Namespace:
        """Parse a config, each section of which holds options."""
        options = super().parse_path(path, *args, **kwargs)
        for section in SECTIONS:
            if section in options and not isinstance(options[section], Namespace):
                raise InputError(
                    f"--config {str(path)!r}: {section} holds no options; give it some, or leave "
                    "it out."
                )
        return options

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        """Put Lightning's four hundred lines on the Trainer last."""
        self._action_groups = sorted(
            self._action_groups, key=lambda group: "every aspect of training" in str(group.title)
        )
        return super().format_help(formatter).replace(" \b", "")  # jsonargparse's, for a terminal


def hide_unused(parser: LightningArgumentParser, command: str) -> None:
    """Leave out of the help what a command does not use, and options that are named in short."""
    for action in parser._actions:
        key = action.dest.removesuffix(".help")
        unused = any(f"{key}.".startswith(f"{name}.") for name in _OF_ANOTHER_COMMAND[command])
        if unused or f"--{key}" in SHORT or key in SECTIONS:
            action.help = SUPPRESS
