"""The manifest of captured targets: what made them, and what is in their file.

It is optional JSON, in the file's metadata under 'manifest' or beside the file, in
``<file>.manifest.json``, where a user wants the model checked or known prompts scored. Without one
the model and the depth are those of the command. The least that it can hold, in the words of
``model.transformer``::

    {"transformer": {"model": "gpt2", "depth": 8}}

What it leaves out of ``transformer`` is not compared with the model, but for ``layers`` (only the
depth), ``features`` (all) and ``final_norm`` (false).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from lightning_inversion.data.storage import Storage
from lightning_inversion.errors import InputError
from lightning_inversion.files import check_of
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.selection import Output
from lightning_inversion.untrusted import read_file, read_json
from lightning_inversion.verification.noise import NoiseName

LAYER = "output of block depth, Hugging Face hidden_states[depth] (the last after the final norm \
only where final_norm is true)"
FORMAT = 1
"""Version of the manifest's keys."""
_LEAST = '{"transformer": {"model": ..., "depth": ...}}'
WAYS_OUT = {
    "transformer": f"write {_LEAST}",
    "storage": 'write {"dtype": "float32", "noise": 0.0, "noise_kind": "gaussian", '
    '"centred": false, "scale": 1.0, "largest": 1.0}, or less',
    "positions": "write all, last, or the number of the first position stored",
    "known_prefix": "write token ids, as [1]",
    "prompts": "write a list of strings, or leave prompts and ids out",
    "ids": "write a list of token ids for each prompt, or leave prompts and ids out",
}
"""What to do about a key whose value cannot be used."""
_DTYPES = Literal[
    "float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2",
    "float8_e4m3fnuz", "float8_e5m2fnuz",
]  # fmt: skip
_STORAGE = {
    "dtype": _DTYPES, "noise": float, "noise_kind": NoiseName, "centred": bool, "scale": float,
    "largest": float,
}  # fmt: skip
_OF_TRANSFORMER = {spec.name for spec in fields(TransformerSpec)} | {"weights_sha256"}


@dataclass(frozen=True)
class Manifest:
    """The manifest of a file of captured targets.

    Args:
        transformer: what made the features, as ``TruncatedTransformer.description`` or a part of
            it; ``model`` and ``depth`` at least.
        format: of the manifest.
        layer: which hidden states these are, in words.
        storage: what happened to the features since; the type of the tensors and no noise where
            left out.
        positions: "all", "last" (see ``LastPosition``), or the number of the first position stored.
        known_prefix: ids of tokens with which every prompt begins, a BOS, say.
        prompts: where the result is to be scored, together with ``ids``.
        ids: the tokens of each prompt from position 0 on.
        versions: of the packages that made the file.
    """

    transformer: dict[str, Any]
    format: int = FORMAT
    layer: str = LAYER
    storage: dict[str, Any] = field(default_factory=dict)
    positions: int | str = "all"
    known_prefix: list[int] = field(default_factory=list)
    prompts: list[str] | None = None
    ids: list[list[int]] | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, metadata: dict[str, str], where: str) -> Manifest | None:
        """The manifest in the metadata of the file at ``path``, or beside it; None without one.

        Raises:
            InputError: the first thing that is wrong in it, and the way out.
        """
        beside = path.with_name(f"{path.name}.manifest.json")
        text = metadata.get("manifest")
        if text is None and not beside.exists():
            return None
        try:
            record = read_json(read_file(beside) if text is None else text)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"{where}: its manifest is not JSON ({reason}); correct it."
            ) from error
        wrong = _wrong_types(record) or _wrong_values(manifest := cls(**record))
        if wrong is not None:
            raise InputError(f"{where}: its manifest {wrong}")
        Storage(**manifest.storage).check(f"{where}: its manifest's storage.")
        return manifest


def _wrong_types(record: Any) -> str | None:
    """The first key of a manifest that is unknown or whose value has another type."""
    if not isinstance(record, dict):
        return f"is no JSON object; write {_LEAST}."
    types = get_type_hints(Manifest)
    if record.get("format", FORMAT) != FORMAT:
        return f"has format {record['format']!r}, and {FORMAT} is read; capture it again."
    for key, value in record.items():
        if key not in types:
            return f"has a key {key!r}; the keys are {', '.join(types)}."
        if not check_of(types[key])(value):
            written = json.dumps(value)
            short = written if len(written) < 60 else f"{written[:60]}..."
            return f"has {key} {short}; {WAYS_OUT.get(key, 'leave it out')}."
    if not isinstance(record.get("transformer", {}).get("model"), str):
        return f"does not name the model; write {_LEAST}."
    return None


def _wrong_values(manifest: Manifest) -> str | None:
    """The first value of a manifest that means nothing."""
    transformer = manifest.transformer
    for key in transformer:
        if key not in _OF_TRANSFORMER:
            return f"has a key transformer.{key}, which is no option of --model.transformer."
    depth = transformer.get("depth")
    layers = transformer.get("layers", [depth])
    output = transformer.get("output", "hidden_states")
    if output not in get_args(Output):
        return f"has transformer.output {output!r}; write one of {', '.join(get_args(Output))}."
    least = int(output == "hidden_states")
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < least:
        return f"has transformer.depth {depth}; write the number of blocks, {least} or more."
    if not isinstance(layers, list) or not layers or layers[-1] != depth:
        return f"has transformer.layers {layers}, the last of which must be its depth, {depth}."
    if not isinstance(transformer.get("weights_sha256", ""), str):
        return "has a transformer.weights_sha256 that is no string; leave it out."
    storage = manifest.storage
    if not all(k in _STORAGE and check_of(_STORAGE[k])(value) for k, value in storage.items()):
        return f"has storage {json.dumps(storage)}; {WAYS_OUT['storage']}."
    if any("\ud800" <= letter <= "\udfff" for text in manifest.prompts or () for letter in text):
        return "has prompts with half of a surrogate pair, which is no character; correct them."
    for key, lists in (("known_prefix", [manifest.known_prefix]), ("ids", manifest.ids or [])):
        if not all(0 <= token < 2**31 for ids in lists for token in ids):
            return f"has {key} with numbers that are no token ids; {WAYS_OUT[key]}."
    return None
