"""Occlusion: replace each token in turn, and see what that does to the output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_inversion.attribution.batching import rows_at_a_time
from lightning_inversion.attribution.model import Reader
from lightning_inversion.attribution.prefix import CleanPrefix
from lightning_inversion.attribution.scores import Measure

# How far logits of a continued pass may be from those of a whole one, relative to their size.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_LOW_PRECISION_TOLERANCE = 0.1
# Enough to see wrong positions, a forgotten prefix, or attention to what is later.
_TRIED_TOKENS = 4


@dataclass(frozen=True)
class CleanPass:
    """The text as it is.

    Args:
        outputs: [R, K] at the position of each query.
        prefix: what occluded rows share of it; None if they are run whole.
        why_plain: why there is no prefix.
    """

    outputs: Tensor
    prefix: CleanPrefix | None
    why_plain: str = ""


@torch.no_grad()
def occlusion(
    reader: Reader,
    embeds: Tensor,
    at: Tensor,
    measure: Measure,
    replacement: Tensor,
    batch_size: int | None = None,
    clean: CleanPass | None = None,
    advance: Callable[[int], None] = lambda rows: None,
) -> Tensor:
    """What replacing each token does to what is measured at each position.

    The document's v = ||O(a_c) - O(a)||_1; T forwards, in batches. A row whose token c is replaced
    is run from c on where the model allows (see `CleanPrefix`).

    Args:
        reader: the model.
        embeds: [T, D], the text.
        at: [R] ascending, the position of each query.
        measure: what is read there, and its distance.
        replacement: [D], what a token becomes.
        batch_size: rows in one forward; None chooses, and takes fewer when memory runs out.
        clean: the result of `clean_pass`, to reuse.
        advance: called with the number of rows after each batch.

    Returns:
        [R, T], NaN where a token is after the position.
    """
    clean = clean or clean_pass(reader, embeds, at)
    length = int(at[-1]) + 1
    scores = torch.full((len(at), embeds.shape[0]), torch.nan)
    start, limit = 0, batch_size
    while start < length:
        begin = start if clean.prefix else 0
        query = (at >= start).nonzero()[:, 0]
        most = limit or rows_at_a_time(
            length - begin, len(query) * clean.outputs.shape[-1], embeds.device
        )
        rows = min(most, length - start)
        try:
            change = _occlude(reader, embeds[:length], at, measure, replacement, clean, start, rows)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            limit = rows // 2
            continue
        tokens = torch.arange(start, start + rows)
        visible = tokens[:, None] <= at[query].cpu()
        scores[query.cpu(), start : start + rows] = (
            change.float().cpu().masked_fill(~visible, torch.nan).T
        )
        start += rows
        advance(rows)
    return scores


def _occlude(
    reader: Reader,
    embeds: Tensor,
    at: Tensor,
    measure: Measure,
    replacement: Tensor,
    clean: CleanPass,
    start: int,
    rows: int,
) -> Tensor:
    """Tokens start .. start + rows replaced, a row each -> [rows, Q] for the queries not before."""
    begin = start if clean.prefix else 0
    occluded = embeds[begin:].repeat(rows, 1, 1)
    row = torch.arange(rows, device=embeds.device)
    occluded[row, start - begin + row] = replacement
    query = (at >= start).nonzero()[:, 0]
    prefix = (clean.prefix, begin) if clean.prefix else None
    outputs = reader.read(occluded, at[query] - begin, prefix)
    return measure.change(clean.outputs[query], outputs, query)


@torch.no_grad()
def clean_pass(reader: Reader, embeds: Tensor, at: Tensor, share: bool = True) -> CleanPass:
    """Run the text, and find out whether rows may continue it from the middle.

    No table of models says so: the last tokens are run on the keys and values of those before, and
    have to give the logits of the whole pass.

    Args:
        reader: the model.
        embeds: [T, D].
        at: [R] ascending positions.
        share: False runs every row whole.
    """
    if not share:
        return CleanPass(reader.read(embeds[None], at)[0], None, "it was asked for")
    try:
        outputs, prefix = reader.clean(embeds, at)
        length = int(at[-1]) + 1
        begin = max(length // 2, length - _TRIED_TOKENS)
        late = at >= begin
        continued = reader.read(embeds[None, begin:length], at[late] - begin, (prefix, begin))[0]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model does with a cache it did not make
        return CleanPass(reader.read(embeds[None], at)[0], None, str(error).splitlines()[0])
    expected = outputs[late]
    off = float((continued - expected).abs().max() / expected.abs().max().clamp_min(1.0))
    if off > _TOLERANCE.get(embeds.dtype, _LOW_PRECISION_TOLERANCE):
        plain = reader.read(embeds[None], at)[0]
        return CleanPass(plain, None, f"a continued pass is off by {off:.1g}")
    return CleanPass(outputs, prefix)
