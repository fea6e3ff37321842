"""Captured targets: hidden states in a safetensors file, with a manifest of what made them.

The file holds tensors named '0', '1', ..., each ``[T_i, F]`` of any floating type, one a prompt.
What the manifest holds is in ``manifest.py``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_inversion.data.manifest import WAYS_OUT, Manifest
from lightning_inversion.errors import InputError
from lightning_inversion.untrusted import check_regular

OPTION = "--data.targets"

_OF_THE_WEIGHTS = (
    "model", "revision", "weights", "weights_seed", "embedding", "embedding_seed",
)  # fmt: skip
"""Not compared where the hash of the weights is known."""
_ROUNDING_ONLY = "attention"  # sdpa and eager compute the same


@dataclass(frozen=True)
class Storage:
    """What happens to features between the model and the file: noise, then rounding.

    Args:
        dtype: the type that they are rounded to.
        noise: standard deviation of the Gaussian noise added, in the features' own units.
    """

    dtype: str = "float32"
    noise: float = 0.0

    def __call__(self, features: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Features ``[..., F]`` as they come out of the file, in the type that they had."""
        if self.noise:
            # Drawn on the CPU, so that it does not depend on the device.
            drawn = torch.randn(features.shape, generator=generator)
            features = features + self.noise * drawn.to(features)
        return self.without_noise(features)

    def without_noise(self, features: Tensor) -> Tensor:
        """Features ``[..., F]`` after all but the noise."""
        return features.to(_float_type(self.dtype)).to(features.dtype)


@dataclass(frozen=True)
class Captured:
    """Captured features and their manifest.

    Attributes:
        targets: ``[T_i, F]`` of each prompt, as stored.
        transformer: what made them: ``TruncatedTransformer.description``, or part of it.
        storage: what happened to them since.
        first_position: the position of their first row in the prompt.
        known_prefix: the tokens with which every prompt begins.
        prompts: where they are known.
        ids: the tokens of each prompt from position 0 on, where they are known.
        versions: of the packages that made the file.
        name: of the file, for messages.
    """

    targets: Sequence[Tensor]
    transformer: dict[str, Any]
    storage: Storage = Storage()
    first_position: int = 0
    known_prefix: tuple[int, ...] = ()
    prompts: Sequence[str] | None = None
    ids: Sequence[Sequence[int]] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    name: str = ""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt, those before the first position stored among them."""
        return [self.first_position + len(target) for target in self.targets]

    @property
    def width(self) -> int:
        """F, the number of features of a position."""
        return int(self.targets[0].shape[1])

    def target(self, number: int) -> Tensor:
        """Features ``[T, F]`` of one prompt from position 0 on, float32; nan where not stored."""
        stored = self.targets[number].float()
        missing = torch.full((self.first_position, self.width), torch.nan)
        return torch.cat([missing, stored])

    def digests(self) -> list[str]:
        """sha256 of each prompt's features, with what is known of them."""
        known = f"{self.first_position} {self.known_prefix} {self.storage}"
        return [
            hashlib.sha256(
                f"{known} {target.dtype} {tuple(target.shape)} {self.ids and self.ids[number]}"
                .encode() + target.contiguous().view(torch.uint8).numpy().tobytes()
            ).hexdigest()
            for number, target in enumerate(self.targets)
        ]  # fmt: skip

    # -- files -------------------------------------------------------------------------------

    def manifest(self) -> Manifest:
        """What is written beside the tensors."""
        return Manifest(
            self.transformer,
            storage=asdict(self.storage),
            positions=self.first_position or "all",
            known_prefix=list(self.known_prefix),
            prompts=None if self.prompts is None else list(self.prompts),
            ids=None if self.ids is None else [list(ids) for ids in self.ids],
            versions=self.versions,
        )

    def write(self, path: Path) -> None:
        """Write the file whole or not at all; one that is there is replaced.

        Raises:
            InputError: the features overflow the type that they are stored in.
        """
        dtype = _float_type(self.storage.dtype)
        tensors = {
            str(number): target.to(dtype).contiguous() for number, target in enumerate(self.targets)
        }
        for number, target in tensors.items():
            if not bool(target.float().isfinite().all()):
                raise InputError(
                    f"The features of prompt {int(number) + 1} are not finite numbers as "
                    f"{self.storage.dtype}; give --store bfloat16 or float32, or another --dtype."
                )
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            save_file(tensors, partial, {"manifest": json.dumps(asdict(self.manifest()))})
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> Captured:
        """Read a file, and its manifest in it or beside it.

        Raises:
            InputError: the file or its manifest cannot be used.
        """
        where = f"{OPTION} {str(path)!r}"
        tensors, metadata = _read_tensors(path, where)
        manifest = Manifest.read(path, metadata, where)
        targets = _in_order(tensors, where)
        own = {"dtype": str(targets[0].dtype).removeprefix("torch.")}
        captured = cls(
            targets,
            {
                "layers": [manifest.transformer["depth"]], "features": None, "final_norm": False,
                **manifest.transformer,
            },
            Storage(**{**own, **manifest.storage}),
            _first_position(manifest.positions, where),
            tuple(manifest.known_prefix),
            manifest.prompts,
            manifest.ids,
            manifest.versions,
            path.name,
        )  # fmt: skip
        _check_known_prefix(captured, where)
        _check_prompts(captured, where)
        return captured

    # -- the model ---------------------------------------------------------------------------

    def check(self, description: dict[str, Any], width: int | None = None) -> None:
        """Refuse a model other than the one that made the features.

        Where both sides have the hash of the weights, it decides, whatever the model's name; where
        only the file has one and the model is not loaded yet, names are not compared.

        Args:
            description: ``TruncatedTransformer.description``, or as much as is known of it before
                the model is loaded.
            width: F of the model's features, where it is known.

        Raises:
            InputError: lists each difference, and the options that would remove it.
        """
        theirs = self.transformer
        left_out = {_ROUNDING_ONLY, "depth"}  # the layers imply the depth
        if "weights_sha256" in theirs and (
            theirs["weights_sha256"] == description.get("weights_sha256", theirs["weights_sha256"])
        ):
            left_out.update(_OF_THE_WEIGHTS)
        different = [
            key
            for key in theirs
            if key in description and key not in left_out and theirs[key] != description[key]
        ]
        found = [_difference(key, theirs[key], description[key]) for key in different]
        options = [_option(key, theirs[key]) for key in different if key != "weights_sha256"]
        if width is not None and width != self.width:
            found.append(f"the features are {self.width} in the file and {width} in the model")
        if found:
            way_out = f"set {' '.join(options)}" if options else "give the model that made it"
            raise InputError(
                f"{OPTION} {self.name!r} does not fit the model: {', '.join(found)}; {way_out}."
            )
        if self.first_position and not description.get("causal", True):
            raise InputError(
                f"{OPTION} {self.name!r} begins at position {self.first_position}, and without a "
                "causal mask the features before it depend on the whole prompt; capture all "
                "positions."
            )


def _difference(key: str, file: Any, model: Any) -> str:
    if key == "weights_sha256":
        file, model = f"{file[:12]}...", f"{model[:12]}..."
    if key == "layers" and len(file) == len(model) == 1:
        key, file, model = "depth", file[0], model[0]
    return f"{key} is {file} in the file and {model} in the model"


def _option(key: str, value: Any) -> str:
    if key == "layers" and len(value) == 1:
        key, value = "depth", value[0]
    written = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return f"--model.transformer.{key} {written}"


def _float_type(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


# -- reading ---------------------------------------------------------------------------------


def _read_tensors(path: Path, where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        check_regular(path)
        with path.open("rb") as file:
            begins = file.read(2)
        with safe_open(path, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            return tensors, dict(stored.metadata() or {})
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{where} cannot be read: {reason}.") from error
    except SafetensorError as error:
        kind = "is a pickle, which could run code" if begins in (b"PK", b"\x80\x02") else (
            "is no whole safetensors file"
        )  # fmt: skip
        raise InputError(
            f"{where} {kind}; write the tensors with safetensors.torch.save_file."
        ) from error


def _in_order(tensors: dict[str, Tensor], where: str) -> list[Tensor]:
    names = [str(number) for number in range(len(tensors))]
    if not tensors or set(tensors) != set(names):
        found = ", ".join(sorted(tensors)[:3]) or "none"
        raise InputError(
            f"{where} holds the tensors {found}; name them 0, 1, 2, ..., one a prompt."
        )
    targets = [tensors[name] for name in names]
    for name, target in zip(names, targets, strict=True):
        tensor = f"{where}: tensor {name}"
        if target.dim() != 2 or not target.numel():
            raise InputError(f"{tensor} has shape {list(target.shape)}; store [tokens, features].")
        if target.shape[1] != targets[0].shape[1]:
            raise InputError(
                f"{tensor} has {target.shape[1]} features and tensor 0 has "
                f"{targets[0].shape[1]}; store the same of every prompt."
            )
        if not target.is_floating_point():
            raise InputError(f"{tensor} holds {target.dtype}; store floating-point features.")
        if not bool(target.float().isfinite().all()):
            raise InputError(
                f"{tensor} holds nan or infinite values, which float16 gives above 65504; "
                "capture it as bfloat16 or float32."
            )
    return targets


def _first_position(positions: int | str, where: str) -> int:
    if positions == "last":
        _refuse_unknown_prefix(f"{where} holds the last position only")
    first = 0 if positions == "all" else positions
    if isinstance(first, str) or first < 0:
        raise InputError(
            f"{where}: its manifest has positions {positions!r}; {WAYS_OUT['positions']}."
        )
    return first


def _refuse_unknown_prefix(what: str) -> NoReturn:
    raise InputError(
        f"{what}, whose features depend through attention on unknown tokens before it, none of "
        "which can be verified on the way; capture all positions, or give every token before it "
        "as known_prefix and its number as positions."
    )


def _check_known_prefix(captured: Captured, where: str) -> None:
    first, known = captured.first_position, len(captured.known_prefix)
    if known < first:
        begins = f"{where} begins at position {first}, and {known} tokens before it are known"
        _refuse_unknown_prefix(begins)
    if known > min(captured.lengths):
        raise InputError(
            f"{where}: its known_prefix has {known} tokens and the shortest prompt "
            f"{min(captured.lengths)}; correct it."
        )


def _check_prompts(captured: Captured, where: str) -> None:
    """Prompts and ids that fit the targets: both, or neither."""
    if (captured.prompts is None) != (captured.ids is None):
        raise InputError(
            f"{where}: its manifest has only one of prompts and ids; give both, or leave both out."
        )
    if captured.prompts is None or captured.ids is None:
        return
    lengths = [len(ids) for ids in captured.ids]
    if len(captured.prompts) != len(captured.targets) or lengths != captured.lengths:
        raise InputError(
            f"{where}: its manifest's prompts and ids are not those of its "
            f"{len(captured.targets)} tensors; give one for each, with an id for every position."
        )
