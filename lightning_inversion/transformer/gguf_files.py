"""A .gguf file -> a folder that transformers loads in a moment: converted once, in float32."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stderr
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from lightning_inversion.errors import InputError
from lightning_inversion.transformer.quiet import quiet_transformers

# A part of each cached folder's name: raise it when the conversion changes, and all are redone.
CONVERSION = 1

_MARK = "conversion.json"


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model and tokenizer of `file` to `folder`, its weights dequantised to float32.

    A tied head is stored once. `is_converted` tells later whether the folder is still whole.
    """
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        with (
            quiet_transformers(),
            redirect_stderr(io.StringIO()),  # a progress bar that has no switch
            torch.random.fork_rng(devices=[]),
        ):
            model = AutoModelForCausalLM.from_pretrained(
                **source,
                dtype=torch.float32,
                # Without it the weights are dequantised all the same, but refuse to be saved.
                quantization_config=GgufConfig(dequantize=True),
            )
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise InputError(
            f"--model.transformer.model: {file} could not be converted "
            f"({_first_line(error)}); give a .gguf file that transformers can read."
        ) from error
    sizes = {part.name: part.stat().st_size for part in sorted(folder.iterdir())}
    (folder / _MARK).write_text(json.dumps({"source": file.name, "sizes": sizes}, indent=1))


def is_converted(folder: Path) -> bool:
    """Whether a converted model lies whole in `folder`: each file there, of its size, readable."""
    try:
        sizes = json.loads((folder / _MARK).read_text())["sizes"]
        if any((folder / name).stat().st_size != size for name, size in sizes.items()):
            return False
        json.loads((folder / "config.json").read_text())
        for weights in folder.glob("*.safetensors"):
            with safe_open(weights, framework="pt"):  # reads and checks the header
                pass
    except (OSError, ValueError, KeyError, SafetensorError):
        return False
    return True


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
