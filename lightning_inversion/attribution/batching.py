"""How many rows go through the model at once."""

from __future__ import annotations

import torch

_OUTPUT_BYTES = 256 * 2**20


def tokens_at_a_time(device: torch.device) -> int:
    """Tokens in one forward that keep the device busy; more only take memory."""
    return 256 if device.type == "cpu" else 16384


def rows_at_a_time(length: int, output_size: int, device: torch.device) -> int:
    """Rows of `length` tokens in one forward.

    Args:
        length: tokens that are run in each row.
        output_size: numbers that are read from each row.
        device: where.
    """
    by_tokens = tokens_at_a_time(device) // length
    by_outputs = _OUTPUT_BYTES // (4 * output_size)
    return max(1, min(by_tokens, by_outputs))
