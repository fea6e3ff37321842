"""Captured targets: hidden states in a file, whatever wrote it, and what made them.

``capture`` writes safetensors with tensors named '0', '1', ..., each ``[T_i, F]``, one a prompt,
and a manifest (``manifest.py``). Files of other tools are read by ``tensor_files.py`` and
understood by ``hidden_states.py``; a manifest beside them is optional.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_inversion.data.hidden_states import HiddenStates, read_hidden_states
from lightning_inversion.data.layout import Wanted
from lightning_inversion.data.manifest import WAYS_OUT, Manifest
from lightning_inversion.data.request import Request
from lightning_inversion.data.storage import Storage, float_type
from lightning_inversion.data.tensor_files import read_tensors
from lightning_inversion.errors import InputError
from lightning_inversion.files import as_os_error

OPTION = "--data.targets"

_OF_THE_WEIGHTS = (
    "model", "revision", "weights", "weights_seed", "embedding", "embedding_seed",
)  # fmt: skip
"""Not compared where the hash of the weights is known."""
_MOSTLY = 0.9
"""Share of the features that are not 0 where they are whole."""
_ROUNDING_ONLY = "attention"  # sdpa and eager compute the same


@dataclass(frozen=True)
class Captured:
    """Captured features and their manifest.

    Attributes:
        targets: ``[T_i, F]`` of each prompt, as stored.
        transformer: what made them: ``TruncatedTransformer.description``, or part of it.
        storage: what happened to them since.
        first_position: the position of their first row in the prompt.
        in_order: whether the rows are in the order of the text.
        logits: whether they are logits, from which the states are to be solved.
        known_prefix: the tokens with which every prompt begins.
        prompts: where they are known.
        ids: the tokens of each prompt from position 0 on, where they are known.
        versions: of the packages that made the file.
        name: of the file, for messages.
        understood: what was read, and how it was understood, in one line.
        warnings: what the user should know of the file.
    """

    targets: Sequence[Tensor]
    transformer: dict[str, Any]
    storage: Storage = field(default_factory=Storage)
    first_position: int = 0
    known_prefix: tuple[int, ...] = ()
    prompts: Sequence[str] | None = None
    ids: Sequence[Sequence[int]] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    name: str = ""
    understood: str = ""
    warnings: tuple[str, ...] = ()
    in_order: bool = True
    logits: bool = False

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
        stored = self.storage.read_back(self.targets[number].float())
        missing = torch.full((self.first_position, self.width), torch.nan)
        return torch.cat([missing, stored])

    def digests(self) -> list[str]:
        """sha256 of each prompt's features, with what is known of them."""
        order = "" if self.in_order else " in unknown order"
        known = f"{self.first_position} {self.known_prefix} {self.storage}{order}"
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
        dtype = float_type(self.storage.dtype)
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
            with as_os_error():
                save_file(tensors, partial, {"manifest": json.dumps(asdict(self.manifest()))})
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path, request: Request | None = None) -> Captured:
        """Read a file, and a manifest in it or beside it where there is one.

        Args:
            path: of the file or folder.
            request: what is asked for, and what the user told of the file; what it leaves open is
                taken from the manifest.

        Raises:
            InputError: the file or its manifest cannot be used.
        """
        where = f"{OPTION} {str(path)!r}"
        held, metadata = read_tensors(path, where)
        manifest = Manifest.read(path, metadata, where)
        return cls._of(held, request or Request(), manifest, where, path.name)

    @classmethod
    def of_objects(cls, held: Any, request: Request, name: str = "hidden_states") -> Captured:
        """Read tensors in memory, in whatever holds them; see ``read_hidden_states``.

        Raises:
            InputError: they cannot be used.
        """
        return cls._of(held, request, None, name, name)

    @classmethod
    def _of(
        cls, held: Any, request: Request, manifest: Manifest | None, where: str, name: str
    ) -> Captured:
        if manifest is None:
            wanted = request.wanted(where)
            manifest = Manifest({})
            transformer: dict[str, Any] = {}
        else:
            transformer = {
                "layers": [manifest.transformer["depth"]], "features": None, "final_norm": False,
                "output": "hidden_states", **manifest.transformer,
            }  # fmt: skip
            layers, final_norm = tuple(transformer["layers"]), transformer["final_norm"]
            output = transformer["output"]
            wanted = Wanted(where, layers, final_norm, request.layout, request.shape, False, output)
        states = read_hidden_states(held, wanted)
        first = request.first_position
        if first is None:
            first = _first_position(manifest.positions, where)
        known = manifest.known_prefix if request.known_prefix is None else request.known_prefix
        stored = Storage(**{"dtype": states.dtype, **manifest.storage})
        stored = replace(
            stored,
            centred=stored.centred or request.centred,
            scale=stored.scale * request.scale,
            noise=stored.noise or request.noise,
            largest=min(stored.largest, request.largest),
            noise_kind=stored.noise_kind if stored.noise else request.noise_kind,
        )
        captured = cls(
            states.prompts, transformer, stored, first, tuple(known), manifest.prompts,
            manifest.ids, manifest.versions, name,
            _understood(states, wanted, manifest, stored.dtype), _warnings(states, stored, where),
            request.order == "given",
            request.logits,
        )  # fmt: skip
        _check_known_prefix(captured, where)
        _check_prompts(captured, where)
        return captured

    # -- the model ---------------------------------------------------------------------------

    def check_for_fit(self) -> None:
        """Refuse what only ``predict`` can use.

        Raises:
            InputError: the rows are in unknown order, or logits.
        """
        for option, used in (("order unknown", not self.in_order), ("logits", self.logits)):
            if used:
                raise InputError(f"--data.{option} is for predict; leave it out, or use predict.")

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
        theirs, description = self.transformer, {"output": "hidden_states", **description}
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
        if width is not None and width != self.width and not self.logits:
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


# -- reading ---------------------------------------------------------------------------------


def _understood(states: HiddenStates, wanted: Wanted, manifest: Manifest, dtype: str) -> str:
    """One line on what was read."""
    lengths = [len(prompt) for prompt in states.prompts]
    shortest, longest = min(lengths), max(lengths)
    depths = [str(depth) for depth in wanted.depths or ()]
    parts = [
        f"{len(lengths)} prompt{'s' * (len(lengths) > 1)}",
        f"{shortest} to {longest} positions"
        if shortest < longest
        else f"{longest} position{'s' * (longest > 1)}",
        f"depth{'s' * (len(depths) > 1)} {' and '.join(depths) or 'of all blocks'}",
        *([wanted.output.replace("_", " and ")] if wanted.output != "hidden_states" else []),
        dtype,
        "from its manifest" if manifest.transformer else states.source,
    ]
    if states.padding:
        parts.append(f"{states.padding} rows of padding dropped")
    return ", ".join(parts)


def _warnings(states: HiddenStates, stored: Storage, where: str) -> tuple[str, ...]:
    found = []
    if states.ids_beside:
        found.append(
            f"{where} holds token ids ({', '.join(states.ids_beside)}) beside the hidden states: "
            "whoever reads the file needs no recovery. They are not used."
        )
    share = max(float((prompt != 0).float().mean(-1).max()) for prompt in states.prompts)
    if share < _MOSTLY and stored.largest == 1:
        found.append(
            f"{where}: at most {share:.3g} of the features of a position are not 0, as where only "
            f"the largest are kept; set --data.largest {share:.3g} then."
        )
    return tuple(found)


def _first_position(positions: int | str, where: str) -> int:
    first = 0 if positions in ("all", "last") else positions
    if isinstance(first, str) or first < 0:
        raise InputError(
            f"{where}: its manifest has positions {positions!r}; {WAYS_OUT['positions']}."
        )
    return first


def _refuse_unknown_prefix(what: str) -> NoReturn:
    raise InputError(
        f"{what}, whose features depend through attention on unknown tokens before it, none of "
        "which can be verified on the way; capture all positions, give every token before it as "
        "--data.known_prefix and their number as --data.first_position, or leave both out and read "
        "each row by itself with --model.recovery Reading."
    )


def _check_known_prefix(captured: Captured, where: str) -> None:
    first, known = captured.first_position, len(captured.known_prefix)
    if known < first:
        begins = f"{where} begins at position {first}, and {known} tokens before it are known"
        _refuse_unknown_prefix(begins)
    if known > min(captured.lengths):
        raise InputError(
            f"{where}: the known prefix has {known} tokens and the shortest prompt "
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
