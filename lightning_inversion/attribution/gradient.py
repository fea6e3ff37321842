"""Gradient x input: the slope of the output in each token's vector, times that vector."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lightning_inversion.attribution.batching import tokens_at_a_time
from lightning_inversion.attribution.config import Reduce
from lightning_inversion.attribution.model import Reader
from lightning_inversion.attribution.scores import Measure, reduce_embedding

# Each row of a batch may end at another position, and the logits of all of them are computed.
_MOST_ROWS = 16


def gradient_times_input(
    reader: Reader,
    embeds: Tensor,
    at: Tensor,
    measure: Measure,
    reduce: Reduce = "l1",
    batch_size: int | None = None,
) -> Tensor:
    """How much each token's vector moves what is measured at each position.

    The document's v = |grad_a O(a)| * a, reduced to one number a token (see `reduce_embedding`).
    Read literally the formula is negative wherever the vector is, and is no importance.

    Args:
        reader: the model.
        embeds: [T, D], the text.
        at: [R], the position of each query; what is after it is not run.
        measure: what is read there. Of several numbers the root mean square is returned.
        reduce: gradient * vector -> one number.
        batch_size: rows in one forward; None for as many as `tokens_at_a_time` says.

    Returns:
        [R, T], NaN where a token is after the position.
    """
    wanted = [(query, repeat) for query in range(len(at)) for repeat in range(measure.repeats)]
    rows = (embeds[: int(at[query]) + 1] for query, _ in wanted)
    scores = torch.full((len(at), measure.repeats, embeds.shape[0]), torch.nan)
    found = gradients(reader, rows, wanted, measure, batch_size)
    for (query, repeat), row, gradient in found:
        scores[query, repeat, : len(row)] = reduce_embedding(gradient * row, reduce).float().cpu()
    if measure.repeats == 1:
        return scores[:, 0]
    return scores.square().mean(1).sqrt()


def gradients(
    reader: Reader,
    rows: Iterable[Tensor],
    wanted: Iterable[tuple[int, int]],
    measure: Measure,
    batch_size: int | None = None,
) -> Iterator[tuple[tuple[int, int], Tensor, Tensor]]:
    """The gradient of what is measured at the last position of each row, in each of its vectors.

    Args:
        reader: the model.
        rows: vectors [t, D], of any lengths; taken a batch at a time.
        wanted: for each row, the query and which of its numbers.
        measure: what is read.
        batch_size: rows in one forward.

    Yields:
        what was wanted, the row [t, D], and its gradient [t, D].
    """
    for batch in _batches(zip(wanted, rows, strict=True), reader.device, batch_size):
        lengths = torch.tensor([len(row) for _, row in batch])
        with torch.enable_grad():
            padded = _pad([row for _, row in batch]).requires_grad_()
            at, which = torch.unique(lengths - 1, return_inverse=True)
            outputs = reader.read(padded, at.to(padded.device))
            total = torch.zeros((), device=outputs.device)
            for row, ((query, repeat), _) in enumerate(batch):
                total = total + measure.value(
                    outputs[row, which[row]], torch.tensor(query, device=outputs.device), repeat
                )
            # Rows are independent, so the gradient of the sum is each row's own gradient.
            (gradient,) = torch.autograd.grad(total, padded)
        for row, (what, vectors) in enumerate(batch):
            yield what, vectors, gradient[row, : len(vectors)]


def _pad(rows: list[Tensor]) -> Tensor:
    """Rows [t, D] -> [B, T, D]. Nothing at the right reaches what is before it.

    The padding repeats the row's first vector: a zero vector is a NaN in some quantised layers.
    """
    longest = max(len(row) for row in rows)
    return torch.stack([torch.cat([row, row[:1].expand(longest - len(row), -1)]) for row in rows])


def _batches(
    rows: Iterable[tuple[tuple[int, int], Tensor]], device: torch.device, batch_size: int | None
) -> Iterator[list[tuple[tuple[int, int], Tensor]]]:
    batch: list[tuple[tuple[int, int], Tensor]] = []
    for row in rows:
        longest = max([len(row[1]), *(len(vectors) for _, vectors in batch)])
        most = batch_size or min(_MOST_ROWS, max(1, tokens_at_a_time(device) // 2 // longest))
        if len(batch) >= most:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
