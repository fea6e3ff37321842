"""What every run makes anew and is the same each time: modules that start many runs share it."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_inversion.cli import lightning as cli

_PARSERS: dict[tuple[str, ...], dict[str, Any]] = {}


def share_parsers(patch: pytest.MonkeyPatch) -> None:
    """A command's parser takes half as long to build as to use, and nothing changes it."""
    build = cli.InversionCLI.setup_parser

    def setup_parser(self: Any, *settings: Any) -> None:
        commands = tuple(self.subcommands())
        if commands not in _PARSERS:
            before = set(vars(self))
            build(self, *settings)
            _PARSERS[commands] = {k: v for k, v in vars(self).items() if k not in before}
        vars(self).update(_PARSERS[commands])

    patch.setattr(cli.InversionCLI, "setup_parser", setup_parser)
