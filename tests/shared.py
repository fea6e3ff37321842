"""What every run makes anew and is the same each time: modules that start many runs share it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from lightning_inversion import api, inversion
from lightning_inversion.cli import lightning as cli
from lightning_inversion.files import cache_root
from lightning_inversion.recovery.measurements import Measurements

_PARSERS: dict[tuple[str, ...], dict[str, Any]] = {}
_MEASUREMENTS: dict[tuple[Any, ...], Measurements] = {}


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


def share_measurements(patch: pytest.MonkeyPatch) -> None:
    """Measuring a tiny model takes longer than most fits with it.

    Those of captured targets are measured each time, as their channel draws noise; and so are
    those behind a cache folder of its own.
    """

    class Shared(Measurements):
        @classmethod
        def measure(
            cls, transformer: Any, language_model: Any = None, channel: Any = None
        ) -> Measurements:
            if channel is not None:
                return Measurements.measure(transformer, language_model, channel)
            described = json.dumps(transformer.description, sort_keys=True)
            key = (cache_root(), described, str(transformer.device), language_model is None)
            if key not in _MEASUREMENTS:
                _MEASUREMENTS[key] = Measurements.measure(transformer, language_model)
            return replace(
                _MEASUREMENTS[key], transformer=transformer, language_model=language_model
            )

    patch.setattr(inversion, "Measurements", Shared)


def share_captured_measurements(patch: pytest.MonkeyPatch) -> None:
    """``recover`` and ``predict`` measure the real model once for each kind of captured features.

    What the measurements find follows from the model and the channel alone.
    """

    class Shared(Measurements):
        @classmethod
        def measure(
            cls, transformer: Any, language_model: Any = None, channel: Any = None
        ) -> Measurements:
            kind = (transformer.selection, transformer.dtype, transformer.fingerprint)
            key = (*kind, str(channel), language_model is None)
            if key not in _MEASUREMENTS:
                _MEASUREMENTS[key] = Measurements.measure(transformer, language_model, channel)
            return replace(
                _MEASUREMENTS[key], transformer=transformer, language_model=language_model
            )

    for user in (api, inversion):
        patch.setattr(user, "Measurements", Shared)
