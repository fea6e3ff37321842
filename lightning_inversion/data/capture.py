"""`lightning-inversion capture`: prompts -> a file of their features; no prompt is needed after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_inversion.data.packing import pack
from lightning_inversion.data.targets import Captured, Storage
from lightning_inversion.data.texts import read_prompts
from lightning_inversion.errors import InputError
from lightning_inversion.files import check_writable
from lightning_inversion.inputs import row_generator
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.truncated import TruncatedTransformer

_PACKAGES = ("lightning-inversion", "torch", "transformers", "safetensors")


@dataclass(frozen=True)
class CaptureOptions:
    """What is captured, and how it is stored.

    Args:
        prompts: a file of texts, one a line (or .jsonl, key prompt).
        out: the safetensors file to write; whole or not at all.
        store: the type that the features are rounded to.
        noise: standard deviation of Gaussian noise added before, in the features' own units.
        seed: of the noise; each prompt draws its own.
        special_tokens: let the tokenizer add its special tokens (a BOS, say).
        keep_prompts: write the prompts and their tokens into the file, for scoring.
        tokens_per_batch: tokens of one batch, with their padding.
        overwrite: replace a file that is there.
    """

    prompts: Path
    out: Path
    store: Literal["float32", "bfloat16", "float16"] = "float32"
    noise: float = 0.0
    seed: int = 0
    special_tokens: bool = False
    keep_prompts: bool = False
    tokens_per_batch: int = 2048
    overwrite: bool = False

    def check(self) -> None:
        """Raise InputError for what cannot be done, before a model is loaded."""
        if not 0 <= self.noise < float("inf"):
            raise InputError(f"--noise is a standard deviation, 0 or more, and is {self.noise}.")
        if self.tokens_per_batch < 1:
            raise InputError(
                f"--tokens_per_batch must be at least 1, and is {self.tokens_per_batch}."
            )
        if self.out.is_dir():
            raise InputError(f"--out {str(self.out)!r} is a folder; give a file in it.")
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
    asked = _made(CaptureOptions, options)
    try:
        capture(asked, _made(TransformerSpec, options), TransformerSpec.load)
    except InputError as error:
        raise InputError(str(error).replace("--model.transformer.", "--")) from error
    print(asked.out)
    return 0


def capture(
    asked: CaptureOptions,
    spec: TransformerSpec,
    load: Callable[[TransformerSpec], TruncatedTransformer],
) -> None:
    """Write the file of features that is asked for.

    Args:
        asked: what to capture, and how to store it.
        spec: the model.
        load: loads it, or has it in memory.

    Raises:
        InputError: the options are wrong, or a prompt does not fit the model.
    """
    asked.check()
    texts = read_prompts(asked.prompts, "--prompts")
    spec.check()
    tokenizer = spec.load_tokenizer()
    ids = _tokenized(texts, tokenizer, spec, asked)
    transformer = load(spec)
    storage = Storage(asked.store, asked.noise)
    captured = Captured(
        features_of_texts(transformer, ids, storage, asked.seed, asked.tokens_per_batch),
        transformer.description,
        storage,
        known_prefix=_added_before(texts[0], ids, tokenizer),
        prompts=texts if asked.keep_prompts else None,
        ids=ids if asked.keep_prompts else None,
        versions={package: version(package) for package in _PACKAGES},
        name=asked.out.name,
    )
    captured.write(asked.out)


@torch.no_grad()
def features_of_texts(
    transformer: TruncatedTransformer,
    ids: Sequence[Sequence[int]],
    storage: Storage,
    seed: int = 0,
    tokens_per_batch: int = 2048,
) -> list[Tensor]:
    """Features ``[T_i, F]`` of each text, as they come out of the storage; float32, on the CPU.

    Args:
        transformer: the frozen model.
        ids: tokens of each text; texts of like length share a batch.
        storage: what happens to the features on their way.
        seed: of the storage's noise; each text draws its own.
        tokens_per_batch: tokens of one batch, with their padding.
    """
    features: dict[int, Tensor] = {}
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("capturing"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,  # it would leave empty lines in a file
    )
    with bar:
        task = bar.add_task("capturing", total=len(ids))
        for group in pack([len(text) for text in ids], tokens_per_batch):
            longest = max(len(ids[text]) for text in group)
            batch = torch.zeros(len(group), longest, dtype=torch.long)
            mask = torch.zeros(len(group), longest, dtype=torch.bool)
            for row, text in enumerate(group):
                batch[row, : len(ids[text])] = torch.tensor(ids[text])
                mask[row, : len(ids[text])] = True
            batch, mask = batch.to(transformer.device), mask.to(transformer.device)
            for text, found in zip(group, transformer.features_of(batch, mask), strict=True):
                own = found[: len(ids[text])].cpu()
                features[text] = storage(own, row_generator(seed, text, "capture"))
            bar.advance(task, len(group))
    return [features[text] for text in range(len(ids))]


def _tokenized(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    spec: TransformerSpec,
    options: CaptureOptions,
) -> list[list[int]]:
    longest = getattr(spec.config(), "max_position_embeddings", None)
    tokens = []
    for number, text in enumerate(texts, start=1):
        ids = list(tokenizer(text, add_special_tokens=options.special_tokens)["input_ids"])
        where = f"--prompts {str(options.prompts)!r}, prompt {number}"
        if not text.strip() or not ids:
            raise InputError(f"{where} is empty; give it a text, or remove it.")
        if longest is not None and len(ids) > longest:
            raise InputError(
                f"{where} has {len(ids)} tokens, and the model reads at most {longest}; shorten it."
            )
        tokens.append(ids)
    return tokens


def _added_before(
    text: str, ids: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """The special tokens with which every text begins."""
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    first = list(ids[0])
    added = next(
        (count for count in range(len(first)) if first[count : count + len(plain)] == plain), 0
    )
    same = all(list(tokens[:added]) == first[:added] for tokens in ids)
    return tuple(first[:added]) if same else ()


def _made(kind: type[Any], options: Namespace) -> Any:
    return kind(**{field.name: options[field.name] for field in fields(kind)})
