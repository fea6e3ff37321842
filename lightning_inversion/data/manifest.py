"""The manifest of captured features: what made them, and what is in their file.

It is JSON, in the file's metadata under 'manifest' or beside the file, in
``<file>.manifest.json``, for tensors that a user saved from a system of their own. The least that
it can say, with the words of ``model.transformer``::

    {"transformer": {"model": "gpt2", "depth": 8}}

What it leaves out of ``transformer`` is not compared with the model, but for ``layers`` (the depth
alone), ``features`` (all) and ``final_norm`` (false). Beside ``transformer`` it may hold:

- ``format``: 1.
- ``storage``: ``{"dtype": "bfloat16", "noise": 0.01}``, what happened to the features since; the
  type of the tensors and no noise where left out.
- ``positions``: "all", or the number of the first position stored.
- ``known_prefix``: ids of tokens with which every text begins, a BOS, say.
- ``prompts`` and ``ids``: the texts and their tokens, where the result is to be scored.
- ``layer``: the convention in words; ``versions``: of the packages.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from lightning_inversion.errors import InputError
from lightning_inversion.transformer.loading import TransformerSpec

FORMAT = 1
"""Version of the manifest's keys."""


_KEYS = (
    "format", "transformer", "layer", "storage", "positions", "known_prefix", "prompts", "ids",
    "versions",
)  # fmt: skip


_OF_TRANSFORMER = {spec.name for spec in fields(TransformerSpec)} | {"weights_sha256"}


def read_manifest(path: Path, metadata: dict[str, str], where: str) -> dict[str, Any]:
    """The manifest in a file's metadata, or beside it.

    Args:
        path: of the file.
        metadata: of the file.
        where: the option and the file, for messages.

    Raises:
        InputError: there is none, or something in it is wrong: the first thing, and the way out.
    """
    beside = path.with_name(f"{path.name}.manifest.json")
    text = metadata.get("manifest")
    if text is None and not beside.exists():
        raise InputError(
            f"{where} has no manifest; write {beside.name!r} beside it, with at least "
            '{"transformer": {"model": ..., "depth": ...}}.'
        )
    try:
        manifest = json.loads(beside.read_text("utf-8") if text is None else text)
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: its manifest is not JSON ({error}); correct it.") from error
    wrong = _wrong_in(manifest)
    if wrong is not None:
        raise InputError(f"{where}: its manifest {wrong}")
    assert isinstance(manifest, dict)
    return manifest


def _wrong_in(manifest: Any) -> str | None:
    """The first thing that is wrong in a manifest, and the way out."""
    if not isinstance(manifest, dict):
        return 'is no JSON object; write {"transformer": {"model": ..., "depth": ...}}.'
    if manifest.get("format", FORMAT) != FORMAT:
        return f"has format {manifest['format']}, and {FORMAT} is known; capture it again."
    for key in manifest:
        if key not in _KEYS:
            return f"has a key {key!r}; the keys are {', '.join(_KEYS)}."
    transformer, storage = manifest.get("transformer"), manifest.get("storage", {})
    if not isinstance(transformer, dict) or not isinstance(transformer.get("model"), str):
        return 'does not name the model; write {"transformer": {"model": ..., "depth": ...}}.'
    for key in transformer:
        if key not in _OF_TRANSFORMER:
            return f"has a key transformer.{key}, which is no option of --model.transformer."
    depth = transformer.get("depth")
    layers = transformer.get("layers", [depth])
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
        return f"has transformer.depth {depth}; write the number of blocks, 1 or more."
    if not isinstance(layers, list) or not layers or layers[-1] != depth:
        return f"has transformer.layers {layers}, the last of which must be its depth, {depth}."
    if not isinstance(transformer.get("weights_sha256", ""), str):
        return "has a transformer.weights_sha256 that is no string; leave it out."
    if not isinstance(storage, dict) or not set(storage) <= {"dtype", "noise"}:
        return 'has a wrong storage; write {"dtype": "float32", "noise": 0.0}, or leave it out.'
    dtype, noise = (
        getattr(torch, str(storage.get("dtype", "float32")), None),
        storage.get("noise", 0),
    )
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return f"has storage.dtype {storage['dtype']!r}; choose float32, bfloat16 or float16."
    if not isinstance(noise, int | float) or not 0 <= noise < float("inf"):
        return f"has storage.noise {noise!r}; write a standard deviation, 0 or more."
    if not _whole_numbers(manifest.get("known_prefix", [])):
        return f"has known_prefix {manifest['known_prefix']!r}; write token ids, as [1]."
    prompts, ids = manifest.get("prompts"), manifest.get("ids")
    if prompts is not None and not (
        isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts)
    ):
        return "has prompts that are no list of texts; correct it, or leave them out."
    if ids is not None and not (isinstance(ids, list) and all(map(_whole_numbers, ids))):
        return "has ids that are no lists of token ids; correct it, or leave them out."
    return None


def is_whole(number: Any) -> bool:
    """Whether a value read from JSON is a whole number; true and false are none."""
    return isinstance(number, int) and not isinstance(number, bool)


def _whole_numbers(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(is_whole(n) and n >= 0 for n in numbers)
