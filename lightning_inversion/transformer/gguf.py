"""A .gguf file -> a folder that transformers loads, with weights in float32."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import mmap
import re
import shutil
import struct
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from lightning_inversion.errors import InputError, first_line
from lightning_inversion.files import sha256_of
from lightning_inversion.transformer.limits import OPTION, check_counts
from lightning_inversion.transformer.quiet import quiet_transformers
from lightning_inversion.untrusted import read_file, read_json

CONVERSION = 1
"""A part of each cached folder's name: raise it when the conversion changes, and all are redone."""
_MARK = "conversion.json"

_GGUF_COUNT = re.compile(
    rb"(?P<key>[a-z0-9_-]{1,40}\.(?:block|expert)_count)(?P<kind>[\4\5\12\13])\0{3}(?P<value>.{8})",
    re.DOTALL,
)
"""A number of blocks or experts: its key, its type (four kinds of whole numbers), its value."""
_GGUF_64_BITS = (10, 11)
_log = logging.getLogger(__name__)


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model and tokenizer of `file` to `folder`, its weights dequantised to float32.

    A tied head is stored once. `is_converted` checks later whether the folder is still whole.
    """
    _log.info("Converting %s (once, about half a minute)", file.name)
    _check_gguf(file)
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
        "trust_remote_code": False,
    }
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
    except MemoryError:
        raise
    except Exception as error:  # the file comes from elsewhere: transformers fails in many ways
        shutil.rmtree(folder, ignore_errors=True)
        raise InputError(
            f"{OPTION}: {file} could not be converted "
            f"({first_line(error)}); give a .gguf file that transformers can read."
        ) from error
    parts = sorted(folder.iterdir())
    sizes = {part.name: part.stat().st_size for part in parts}
    digests = {part.name: sha256_of(part) for part in parts if part.suffix == ".json"}
    mark = {"source": file.name, "sizes": sizes, "sha256": digests}
    (folder / _MARK).write_text(json.dumps(mark, indent=1))


def _check_gguf(file: Path) -> None:
    """Refuse a file whose header is not that of a model before anything is allocated for it.

    Its 24 bytes are GGUF, a version, and the numbers of tensors and of keys.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        header = stream.read(24)
        _, _, tensors, keys = struct.unpack("<4sIQQ", header.ljust(24, b"\0"))
        if header[:4] != b"GGUF" or not 0 < tensors < size or not 0 < keys < size:
            raise InputError(
                f"{OPTION}: {str(file)!r} is no whole .gguf file of a model; give another."
            )
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for found in _GGUF_COUNT.finditer(content):
                kind, raw = found["kind"][0], found["value"]
                value = int.from_bytes(raw if kind in _GGUF_64_BITS else raw[:4], "little")
                check_counts(str(file), {found["key"].decode(): value})


def is_converted(folder: Path) -> bool:
    """Whether a converted model lies whole in `folder`: each file there, of its size, readable.

    Files other than the weights are compared by their sha256, too.
    """
    try:
        mark = read_json(read_file(folder / _MARK))
        if any((folder / name).stat().st_size != size for name, size in mark["sizes"].items()):
            return False
        digests = mark.get("sha256", {})
        for name, digest in digests.items():
            if hashlib.sha256(read_file(folder / name)).hexdigest() != digest:
                return False
        read_json(read_file(folder / "config.json"))
        for weights in folder.glob("*.safetensors"):
            with safe_open(weights, framework="pt"):  # reads and checks the header
                pass
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError):
        return False
    return True
