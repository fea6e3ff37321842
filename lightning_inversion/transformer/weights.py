"""A model's weights, read from files: all of them, or those of its first blocks alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lightning_inversion.errors import InputError, first_line
from lightning_inversion.transformer.blocks import (
    cut_blocks_,
    replace_module_,
    text_config,
    without_head,
)
from lightning_inversion.transformer.limits import OPTION
from lightning_inversion.transformer.quiet import quiet_transformers
from lightning_inversion.transformer.sources import ModelFiles


def causal_class(config: PretrainedConfig, name: str) -> type[PreTrainedModel]:
    """transformers' own class of a causal language model; no code of a model's folder is run.

    Args:
        config: of the model.
        name: of the model, for messages.

    Raises:
        InputError: there is none.
    """
    mapping: Any = AutoModelForCausalLM._model_mapping
    kind: type[PreTrainedModel] | None = mapping.get(type(config), None)
    if kind is None:  # the language model of one that sees, saved by itself
        named = getattr(transformers, (config.architectures or [""])[0], None)
        if getattr(named, "config_class", None) is type(config) and named in mapping.values():
            kind = named
    if kind is None:
        raise InputError(
            f"{OPTION}: {name!r} is of type {config.model_type}, "
            "which is no causal language model of transformers; choose another."
        )
    return kind


def read_weights(
    files: ModelFiles,
    config: PretrainedConfig,
    kind: type[PreTrainedModel],
    depth: int | None,
    options: dict[str, Any],
) -> PreTrainedModel:
    """The model with its head; with `depth`, its first blocks, and no more is read.

    Args:
        files: of the model.
        config: of the model, all blocks counted.
        kind: the model's class.
        depth: blocks kept, or None.
        options: for `from_pretrained`.

    Raises:
        InputError: the files cannot be read, or lack weights.
    """
    if kind.config_class is type(text_config(config)):
        config = text_config(config)  # the language model of one that sees
    built: Any = kind if depth is None else first_blocks_of(kind, depth)
    model: PreTrainedModel
    with readable(files.name), torch.random.fork_rng(devices=[]):
        model, report = built.from_pretrained(
            files.location,
            revision=files.revision,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and refused below
            **options,
        )
    model.__class__ = kind
    _check_complete(files.name, model, report, depth)
    return model


def first_blocks_of(kind: type[PreTrainedModel], depth: int) -> type[PreTrainedModel]:
    """The class of a model with its head, built whole and cut to its first `depth` blocks.

    transformers builds a model on torch's meta device before it reads weights: what is cut there is
    never read, and never takes memory. A head that shares no weights is cut off too.
    """

    def build(self: PreTrainedModel, *args: Any, **options: Any) -> None:
        kind.__init__(self, *args, **options)
        cut_blocks_(without_head(self), depth)
        tied = self.all_tied_weights_keys
        head = self.get_output_embeddings()  # type: ignore[no-untyped-call]
        if head is not None:
            name = next(name for name, module in self.named_modules() if module is head)
            if not any(key.startswith(f"{name}.") for key in [*tied, *tied.values()]):
                replace_module_(self, head, nn.Identity())
        left = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        self.all_tied_weights_keys = {
            target: source for target, source in tied.items() if {target, source} <= left
        }

    return type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})


@contextmanager
def readable(model: str) -> Iterator[None]:
    """Raise one `InputError` for every way in which a model's files cannot be read.

    The files come from elsewhere, and what transformers raises for a wrong one is of any kind.
    """
    try:
        with quiet_transformers():
            yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = first_line(error).rstrip(".")
        raise InputError(
            f"--model.transformer.model: {model!r} could not be loaded ({reason}); look "
            "at the name and the network, or give a local folder."
        ) from error


def _check_complete(
    name: str, model: PreTrainedModel, report: dict[str, Any], depth: int | None
) -> None:
    """Weights that a file lacks, or has in another shape, are drawn at random by transformers.

    With `depth` a head is not used, and need not be there.
    """
    used = model if depth is None else without_head(model)
    path = next(path for path, module in model.named_modules() if module is used)
    prefix = f"{path}." if path else ""
    lacking = sorted(key for key in report["missing_keys"] if key.startswith(prefix))
    if lacking:
        raise InputError(
            f"--model.transformer.model: {name!r} lacks {len(lacking)} weights, "
            f"{lacking[0]} the first; give a complete model, or ask for untrained weights."
        )
    for key, stored, built in sorted(report["mismatched_keys"]):
        if key.startswith(prefix):
            raise InputError(
                f"--model.transformer.model: {name!r} stores {key} in shape {list(stored)}, and "
                f"its config.json asks for {list(built)}; correct its config.json."
            )
