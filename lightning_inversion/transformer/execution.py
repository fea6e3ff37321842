"""Other ways to run the same blocks: with less memory, or compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks_(blocks: Sequence[nn.Module]) -> None:
    """Keep a block's input alone for the backward pass, and run the block again there, in place.

    transformers' own gradient checkpointing wants a model that is in training mode, which a frozen
    one never is.
    """
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks_(blocks: Sequence[nn.Module]) -> None:
    """Compile each block's forward by torch.compile, for any length of text, in place.

    The block's hooks, by which features are heard, stay outside. Behind kept keys and values, whose
    number grows with every token, blocks run as they are: each growth would be compiled anew.
    """
    for block in blocks:
        compiled = torch.compile(block.forward, dynamic=True)
        block.forward = partial(_forward, block.forward, compiled)


def _forward(
    plain: Callable[..., Any], compiled: Callable[..., Any], *args: Any, **options: Any
) -> Any:
    kept = options.get("past_key_values") is not None
    return (plain if kept else compiled)(*args, **options)
