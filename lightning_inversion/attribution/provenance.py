"""Where a result comes from: the model, the versions, the command that gives it again."""

from __future__ import annotations

import platform
import shlex
import unicodedata
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import lightning_inversion
from lightning_inversion.attribution.config import Choices, Look, different, with_preset
from lightning_inversion.transformer.truncated import TruncatedTransformer

LONGEST_IN_COMMAND = 500
"""Characters of a text that a command still holds."""
TEXT_FILE = "text.txt"
"""What the file of a longer one is called."""
_HIDDEN = ("Cc", "Cf", "Zl", "Zp")


def describe(model: PreTrainedModel | TruncatedTransformer, name: str | None) -> dict[str, Any]:
    """The model and the versions that made a result, as plain values."""
    if isinstance(model, TruncatedTransformer):
        own, kind = model.description["model"], type(model.model).__name__
        dtype, device = model.dtype, model.device
    else:
        own, kind = model.config._name_or_path or type(model).__name__, type(model).__name__
        dtype, device = model.dtype, model.device
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    return {
        "model": name or own,
        "class": kind,
        "dtype": str(dtype).removeprefix("torch."),
        "quantization": quantization.quant_method.value if quantization is not None else None,
        "device": device.type,
        "version": lightning_inversion.__version__,
        "version_torch": torch.__version__,
        "version_transformers": transformers.__version__,
        "version_python": platform.python_version(),
    }


def command_line(
    text: str, choices: Choices, look: Look, preset: str | None, model_options: Mapping[str, Any]
) -> str:
    """The command line that gives the same result; a text that is long is read from a file."""
    base, base_look = with_preset(preset, Choices(), Look())
    options = {
        **model_options,
        **({} if preset is None else {"preset": preset}),
        **different(choices, base),
        **different(look, base_look),
    }
    words = ["lightning-inversion", "attribute"]
    for option, value in options.items():
        # With '=' also a value that begins with a dash is one.
        words.append(f"--{option}={str(value).lower() if isinstance(value, bool) else value}")
    command = " ".join(_quoted(word) for word in words)
    if len(text) > LONGEST_IN_COMMAND or "\0" in text:
        return f"{command} - < {TEXT_FILE}"
    return f"{command} {'-- ' if text.startswith('-') else ''}{_quoted(text)}"


def _quoted(word: str) -> str:
    """`word` for a shell; one with characters that cannot be seen as $'...', with their numbers."""
    hidden = [character for character in word if unicodedata.category(character) in _HIDDEN]
    if not hidden:
        return shlex.quote(word)
    inside = "".join(_escaped(character) for character in word)
    return f"$'{inside}'"


def _escaped(character: str) -> str:
    if character in "\\'":
        return f"\\{character}"
    if character == "\n":
        return "\\n"
    if unicodedata.category(character) in _HIDDEN:
        return f"\\U{ord(character):08X}"
    return character
