"""Which rows of a batch are padding, and where its prompts begin."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_inversion.data.layout import Beside, Wanted


def rows_of_prompts(wanted: Wanted, states: Tensor, beside: Beside) -> list[Tensor]:
    """``[B, T, F]`` -> ``[T_i, F]``, without padding that a mask, lengths or zeros show."""
    B, T = states.shape[:2]
    lengths = wanted.layout.lengths or beside.lengths
    if lengths is not None:
        if B == 1 and sum(lengths) == T:  # prompts one after the other
            return list(torch.split(states[0], list(lengths)))
        if len(lengths) != B or max(lengths) > T:
            raise wanted.error(
                f" has {B} prompts of {T} rows, and lengths {list(lengths)}; give the tokens of "
                "each prompt as --data.layout.lengths."
            )
        columns, sizes = torch.arange(T), torch.tensor(lengths)[:, None]
        left = wanted.layout.padding == "left"
        kept = columns >= T - sizes if left else columns < sizes
    elif beside.mask is not None:
        mask = beside.mask.reshape(-1, beside.mask.shape[-1])
        if len(mask) != B or mask.shape[1] > T:
            raise wanted.error(
                f" has {B} prompts of {T} rows and a mask of shape {list(beside.mask.shape)}; "
                "save the mask of these prompts."
            )
        kept = torch.nn.functional.pad(mask, (0, T - mask.shape[1]), value=True)
    else:
        kept = _rows_between_empty_ones(states)
    prompts = [own[rows] for own, rows in zip(states, kept, strict=True)]
    if not all(map(len, prompts)):
        raise wanted.error(" holds a prompt whose rows are all padding, nan or 0; leave it out.")
    return prompts


def tokens_of_mask(mask: Tensor) -> Tensor:
    """Which positions ``[..., T]`` are tokens, by a mask of attention of any kind.

    Of an additive one 0 marks tokens, and what is below padding. Of ``[B, heads, T, T]``, with a
    row for each query, the last query sees every token.
    """
    while mask.dim() > 2:
        mask = mask[:, -1]
    return mask >= 0 if bool((mask < 0).any()) else mask.bool()


def pads_each_by_itself(tensor: Tensor) -> bool:
    """Whether rows at the ends are empty, and others than in the next entry: prompts, no layers."""
    kept = _rows_between_empty_ones(tensor)
    return bool((kept != kept[0]).any())


def _rows_between_empty_ones(states: Tensor) -> Tensor:
    """``[B, T]``: rows but for those at the ends of a prompt that are all 0 or all nan."""
    values = states.float()
    full = ~((values == 0).all(-1) | values.isnan().all(-1))
    after = full.long().cummax(dim=1).values.bool()
    before = full.flip(1).long().cummax(dim=1).values.flip(1).bool()
    return after & before
