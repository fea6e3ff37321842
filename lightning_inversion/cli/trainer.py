"""Lightning's Trainer as this package uses it: its defaults, precision, processes, and advice."""

import logging
import os
import threading
import warnings
from typing import Any

from lightning import Trainer

from lightning_inversion import strategy
from lightning_inversion.errors import InputError
from lightning_inversion.files import FULL, MOST_PROCESSES
from lightning_inversion.transformer.loading import TransformerSpec

MOST_NODES = 10_000
"""Machines of one run: more are a mistake, and the first would wait for them."""
DEFAULTS = {
    "enable_progress_bar": False,  # TokenDecoding shows one beside the tokens
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "devices": 1,
    "max_epochs": -1,  # an epoch for each batch of prompts
    "log_every_n_steps": 10,
    "inference_mode": False,  # predict follows gradients too
}
COMPUTED_IN = {
    "bf16-true": "bfloat16", "bf16-mixed": "bfloat16", "bf16": "bfloat16",
    "16-true": "float16", "16-mixed": "float16", "16": "float16",
}  # fmt: skip
"""Lightning's precisions, and the type that the frozen model computes in."""
_EXPECTED = (
    ".*does not have many workers.*",  # the loader yields prepared batches
    ".*Total length of `Iterations` across ranks is zero.*",  # a fit validates nothing
    ".*smaller than the logging interval.*",
    ".*The dirpath has changed from.*",  # validate scores another run's checkpoint
    ".*in eval mode at the start of training.*",  # the frozen model, and it must be
    ".*`training_step` returned `None`.*",  # a batch that did not fit the memory
    ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning's own use of torch
)


def quiet_lightning() -> None:
    """Keep Lightning's tips and advice for training networks from the user's terminal."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what Lightning calls
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for advice in _EXPECTED:
        warnings.filterwarnings("ignore", message=advice)
    threading.excepthook = _ignore_a_full_disk


def _ignore_a_full_disk(thread: threading.ExceptHookArgs) -> None:
    """TensorBoard's writing thread fails as the main thread does, which reports it."""
    if not isinstance(thread.exc_value, OSError) or thread.exc_value.errno not in FULL:
        threading.__excepthook__(thread)


def compute_in_precision(config: Any) -> None:
    """Let ``--trainer.precision`` set what the frozen model computes in; the input stays float32.

    Lightning would round the input itself, whose steps are smaller than what 16 bits can hold.

    Args:
        config: of a command; changed in place.

    Raises:
        InputError: the precision is unknown, or --model.transformer.dtype contradicts it.
    """
    asked = config.trainer.precision
    if asked is None or str(asked) in ("32", "32-true"):
        return
    dtype = COMPUTED_IN.get(str(asked))
    transformer = config.model.transformer
    if dtype is None:
        raise InputError(
            f"--trainer.precision: {asked} is not one of 32-true, {', '.join(COMPUTED_IN)}; "
            "choose one, or leave it out and set --model.transformer.dtype."
        )
    if transformer.dtype not in (TransformerSpec.dtype, dtype):
        raise InputError(
            f"--trainer.precision {asked} contradicts --model.transformer.dtype "
            f"{transformer.dtype}; leave one of them out."
        )
    transformer.dtype, config.trainer.precision = dtype, None


def share_prompts_out(trainer: Any) -> None:
    """Choose this package's strategy where several processes are asked for and none is named.

    Args:
        trainer: settings of a Trainer; changed in place.
    """
    asked = str(trainer.devices)
    if asked.isdecimal():
        _check_processes(int(asked))  # Lightning would make a list of them
    if trainer.num_nodes > MOST_NODES:
        raise InputError(
            f"--trainer.num_nodes is {trainer.num_nodes}, and at most {MOST_NODES} can take part."
        )
    if trainer.strategy != "auto":
        return
    probe = Trainer(
        accelerator=trainer.accelerator,
        devices=trainer.devices,
        num_nodes=trainer.num_nodes,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    _check_processes(probe.num_devices)
    if probe.num_devices * probe.num_nodes > 1:
        trainer.strategy = strategy.NAME


def _check_processes(count: int) -> None:
    if count > MOST_PROCESSES:
        raise InputError(
            f"--trainer.devices: {count} processes are too many for this machine; give at most "
            f"{MOST_PROCESSES}."
        )
