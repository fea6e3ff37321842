"""`lightning-inversion capture`: prompts -> a file of their features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from lightning_inversion.data.batch import PromptBatch, pack
from lightning_inversion.data.storage import Storage
from lightning_inversion.data.targets import Captured
from lightning_inversion.data.texts import ModelLimits, read_prompts, tokenize_each, warn_of_bad
from lightning_inversion.errors import InputError
from lightning_inversion.files import check_ending, check_writable, printable
from lightning_inversion.inputs import row_generator
from lightning_inversion.progress import counted
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.truncated import TruncatedTransformer
from lightning_inversion.verification.noise import NoiseName

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PACKAGES = ("lightning-inversion", "torch", "transformers", "safetensors")


@dataclass(frozen=True)
class CaptureOptions:
    """What is captured, and how it is stored.

    Args:
        prompts: a file of prompts, one a line (or .jsonl, key prompt); those that the model cannot
            run are named and left out.
        out: the safetensors file to write; whole or not at all.
        store: the type that the features are rounded to.
        largest: keep this share of each position's features, the largest by size; the others
            become 0.
        noise: standard deviation of noise added to these, in the features' own units.
        noise_kind: how it is distributed.
        seed: of the noise; each prompt draws its own.
        special_tokens: let the tokenizer add its special tokens (a BOS, say).
        keep_prompts: write the prompts and their tokens into the file, for scoring.
        tokens_per_batch: tokens of one batch, with their padding.
        overwrite: replace a file that is there.
    """

    prompts: Path
    out: Path
    store: Literal["float32", "bfloat16", "float16"] = "float32"
    largest: float = 1.0
    noise: float = 0.0
    noise_kind: NoiseName = "gaussian"
    seed: int = 0
    special_tokens: bool = False
    keep_prompts: bool = False
    tokens_per_batch: int = 2048
    overwrite: bool = False

    @property
    def storage(self) -> Storage:
        """What happens to the features between the model and the file."""
        return Storage(self.store, self.noise, self.noise_kind, largest=self.largest)

    def check(self) -> None:
        """Raise InputError for what cannot be done, before a model is loaded."""
        self.storage.check("--")
        if self.tokens_per_batch < 1:
            raise InputError(
                f"--tokens_per_batch must be at least 1, and is {self.tokens_per_batch}."
            )
        check_ending(self.out, "--out", ".safetensors")
        if self.out.is_dir():
            raise InputError(f"--out {str(self.out)!r} is a folder; give a file in it.")
        if self.out.exists() and not self.out.is_file():
            raise InputError(f"--out {str(self.out)!r} is no regular file; give another.")
        if self.out.exists() and not self.overwrite:
            raise InputError(
                f"--out {str(self.out)!r} exists; give another file, or --overwrite true."
            )
        check_writable(self.out, "--out")


def add_capture_arguments(parser: ArgumentParser) -> None:
    """The options of the command, flat: `CaptureOptions`, and those of the model."""
    parser.add_class_arguments(CaptureOptions)
    parser.add_class_arguments(TransformerSpec)


def run_capture(options: Namespace) -> int:
    """Run the command; returns the exit code.

    Args:
        options: what a parser with `add_capture_arguments` parsed.

    Raises:
        InputError: the options are wrong; before a model is loaded wherever that can be known.
    """
    stored = _options_of(CaptureOptions, options)
    capture(stored, _options_of(TransformerSpec, options))
    print(printable(str(stored.out)))
    return 0


def capture(
    options: CaptureOptions,
    spec: TransformerSpec,
    load: Callable[[TransformerSpec], TruncatedTransformer] = TransformerSpec.load,
) -> None:
    """Write the file of features that is asked for.

    Args:
        options: what to capture, and how to store it.
        spec: the model.
        load: loads it, or returns one in memory.

    Raises:
        InputError: the options are wrong, or no prompt fits the model. One that does not is left
            out, and named.
    """
    options.check()
    prompts = read_prompts(options.prompts, "--prompts")
    spec.check()
    tokenizer, limits = spec.load_tokenizer(), ModelLimits.of(spec.config())
    found, bad = tokenize_each(prompts, tokenizer, limits, options.special_tokens)
    warn_of_bad(bad, len(prompts), f"--prompts {str(options.prompts)!r}", others="captured")
    prompts, ids = [prompts[index] for index in found], list(found.values())
    transformer = load(spec)
    storage = options.storage
    captured = Captured(
        captured_features(transformer, ids, storage, options.seed, options.tokens_per_batch),
        transformer.description,
        storage,
        known_prefix=_added_before(prompts[0], ids, tokenizer),
        prompts=prompts if options.keep_prompts else None,
        ids=ids if options.keep_prompts else None,
        versions={package: version(package) for package in _PACKAGES},
        name=options.out.name,
    )
    captured.write(options.out)


@torch.no_grad()
def captured_features(
    transformer: TruncatedTransformer,
    ids: Sequence[Sequence[int]],
    storage: Storage,
    seed: int = 0,
    tokens_per_batch: int = 2048,
) -> list[Tensor]:
    """Features ``[T_i, F]`` of each prompt, as they come out of the storage; float32, on the CPU.

    Args:
        transformer: the frozen model.
        ids: tokens of each prompt; prompts of like length share a batch.
        storage: what happens to the features on their way.
        seed: of the storage's noise; each prompt draws its own.
        tokens_per_batch: tokens of one batch, with their padding.
    """
    features: dict[int, Tensor] = {}
    groups = pack([len(tokens) for tokens in ids], tokens_per_batch)
    for group in counted(groups, "capturing"):
        batch = PromptBatch.collate([(row, None, ids[row]) for row in group])
        batch = batch.to(transformer.device)
        assert batch.ids is not None
        for row, found in zip(group, transformer.features_of(batch.ids, batch.mask), strict=True):
            own = found[: len(ids[row])].cpu()
            features[row] = storage(own, row_generator(seed, row, "capture"))
    return [features[row] for row in range(len(ids))]


def _added_before(
    prompt: str, ids: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """The special tokens with which every prompt begins."""
    plain = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    first = list(ids[0])
    added = next(
        (count for count in range(len(first)) if first[count : count + len(plain)] == plain), 0
    )
    same = all(list(tokens[:added]) == first[:added] for tokens in ids)
    return tuple(first[:added]) if same else ()


def _options_of(kind: type[Any], options: Namespace) -> Any:
    return kind(**{field.name: options[field.name] for field in fields(kind)})
