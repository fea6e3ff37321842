"""Gradient x input, integrated gradients and occlusion: one score per token for each query."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from lightning_inversion.attribution.config import Reduce
from lightning_inversion.attribution.measures import Measure, reduce_embedding
from lightning_inversion.attribution.model import CleanPrefix, Reader

_GRADIENT_ROWS = 16
"""Most rows of a backward pass. Each row may end at another position, and the logits of every row
are computed at all of these positions."""
_OUTPUT_BYTES = 256 * 2**20
"""Most memory for the outputs of a batch of occluded rows."""
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""How far logits of a continued pass may be from those of a whole one, relative to their size."""
_LOW_PRECISION_TOLERANCE = 0.1
_TRIED_TOKENS = 4
"""Enough to detect wrong positions, an ignored prefix, or attention to later positions."""


@dataclass(frozen=True)
class Task:
    """What is attributed.

    Args:
        reader: the model.
        embeds: [T, D], the text.
        at: [R], the position of each query, ascending; what is after it is not run.
        measure: the scalar or the distance of the outputs there.
        batch_size: rows in one forward; None for a size that fits the device.
    """

    reader: Reader
    embeds: Tensor
    at: Tensor
    measure: Measure
    batch_size: int | None = None

    @property
    def visible(self) -> Tensor:
        """[R, T], on the CPU: whether the token is not after the position."""
        return torch.arange(len(self.embeds)) <= self.at.cpu()[:, None]


def gradient_times_input(task: Task, reduce: Reduce = "l1") -> Tensor:
    """The gradient of the measure with respect to each token's vector, times that vector.

    The source's v = |grad_a O(a)| * a, reduced to one score per token (see `reduce_embedding`).
    Taken literally, the formula is negative wherever the vector is, and so no importance.

    Args:
        task: what is attributed. Of several scalars the root mean square is returned.
        reduce: gradient * vector [D] -> one score.

    Returns:
        [R, T], NaN where a token is after the position.
    """
    ends, repeats = task.at.tolist(), task.measure.repeats
    wanted = [(query, repeat) for query in range(len(ends)) for repeat in range(repeats)]
    rows = (task.embeds[: ends[query] + 1] for query, _ in wanted)
    scores = torch.full((len(ends), repeats, len(task.embeds)), torch.nan)
    for (query, repeat), row, gradient in _gradients(task, rows, wanted):
        scores[query, repeat, : len(row)] = reduce_embedding(gradient * row, reduce).float().cpu()
    if repeats == 1:
        return scores[:, 0]
    return scores.square().mean(1).sqrt()


class IntegratedGradients(NamedTuple):
    """Scores [R, T], NaN where a token is after the position, and what they should add up to."""

    scores: Tensor
    rise: Tensor
    """[R], the scalar of the text minus that of the baseline."""
    missing: Tensor
    """[R], the rise minus the sum of the signed scores."""


def integrated_gradients(
    task: Task, baseline: Tensor, steps: int = 32, reduce: Reduce = "sum"
) -> IntegratedGradients:
    """(a - b) * the mean gradient between the baseline b and the text a.

    Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365, by the Gauss-Legendre rule. The
    signed scores of a query add up to the rise of its scalar from the baseline to the text. The
    missing part falls with `steps`, except from a zero vector to a model that begins with a norm:
    there the whole rise happens at the first point.

    Args:
        task: what is attributed.
        baseline: [D], the vector from which each token starts.
        steps: points on the path.
        reduce: (a - b) * gradient [D] -> one score.
    """
    nodes, node_weights = leggauss(steps)  # on [-1, 1]
    points, weights = ((nodes + 1) / 2).tolist(), (node_weights / 2).tolist()
    difference, ends = task.embeds - baseline, task.at.tolist()
    total = torch.zeros(len(ends), *task.embeds.shape)
    wanted = [(query, step) for query in range(len(ends)) for step in range(steps)]
    rows = (baseline + points[step] * difference[: ends[query] + 1] for query, step in wanted)
    found = _gradients(task, rows, [(query, 0) for query, _ in wanted])
    for (query, step), (_, row, gradient) in zip(wanted, found, strict=True):
        total[query, : len(row)] += weights[step] * gradient.float().cpu()
    products = total * difference.float().cpu()
    scores = reduce_embedding(products, reduce).masked_fill(~task.visible, torch.nan)
    rise = _rise(task, baseline)
    return IntegratedGradients(scores, rise, rise - products.sum((1, 2)))


@torch.no_grad()
def _rise(task: Task, baseline: Tensor) -> Tensor:
    """The scalar of the text minus that of the baseline at each position: [R]."""
    query = torch.arange(len(task.at), device=task.embeds.device)
    clean, empty = (
        task.measure.value(task.reader.read(vectors[None], task.at)[0], query)
        for vectors in (task.embeds, baseline.expand_as(task.embeds))
    )
    return (clean - empty).cpu()


def _gradients(
    task: Task, rows: Iterable[Tensor], wanted: Iterable[tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], Tensor, Tensor]]:
    """The gradient of the scalar at the last position of each row, in each of the row's vectors.

    Args:
        task: what is attributed.
        rows: vectors [t, D], of any lengths; taken a batch at a time.
        wanted: for each row, the query and which of its scalars.

    Yields:
        the entry of `wanted`, the row [t, D], and its gradient [t, D].
    """
    reader = task.reader
    for batch in _batches(zip(wanted, rows, strict=True), reader.device, task.batch_size):
        lengths = torch.tensor([len(row) for _, row in batch])
        with torch.enable_grad():
            padded = _pad([row for _, row in batch]).requires_grad_()
            at, which = torch.unique(lengths - 1, return_inverse=True)
            outputs = reader.read(padded, at.to(padded.device))
            total = torch.zeros((), device=outputs.device)
            for row, ((query, repeat), _) in enumerate(batch):
                total = total + task.measure.value(
                    outputs[row, which[row]], torch.tensor(query, device=outputs.device), repeat
                )
            # Rows are independent, so the gradient of the sum is each row's own gradient.
            (gradient,) = torch.autograd.grad(total, padded)
        for row, (entry, vectors) in enumerate(batch):
            yield entry, vectors, gradient[row, : len(vectors)]


def _pad(rows: list[Tensor]) -> Tensor:
    """Rows [t, D] -> [B, T, D]; positions at the right do not change those before them.

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
        fitting = max(1, _tokens_at_a_time(device) // 2 // longest)
        if len(batch) >= (batch_size or min(_GRADIENT_ROWS, fitting)):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@dataclass(frozen=True)
class CleanPass:
    """A forward of the text as it is.

    Args:
        outputs: [R, K] at the position of each query.
        prefix: the keys and values that occluded rows share; None if rows are run whole.
        why_plain: why there is no prefix.
    """

    outputs: Tensor
    prefix: CleanPrefix | None
    why_plain: str = ""


@torch.no_grad()
def clean_pass(reader: Reader, embeds: Tensor, at: Tensor) -> CleanPass:
    """Run the text [T, D], and test whether rows may continue it from the middle.

    There is no table of models: the last tokens are run on the keys and values of those before
    them, and have to give the logits of the whole pass at the positions `at` [R], ascending.
    """
    try:
        outputs, prefix = reader.clean(embeds, at)
        length = int(at[-1]) + 1
        begin = max(length // 2, length - _TRIED_TOKENS)
        late = at >= begin
        continued = reader.read(embeds[None, begin:length], at[late] - begin, (prefix, begin))[0]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model does with a cache it did not make
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return CleanPass(reader.read(embeds[None], at)[0], None, reason)
    expected = outputs[late]
    error_size = float((continued - expected).abs().max() / expected.abs().max().clamp_min(1.0))
    if error_size > _TOLERANCE.get(embeds.dtype, _LOW_PRECISION_TOLERANCE):
        plain = reader.read(embeds[None], at)[0]
        return CleanPass(plain, None, f"a continued pass is off by {error_size:.1g}")
    return CleanPass(outputs, prefix)


@torch.no_grad()
def occlusion(
    task: Task,
    replacement: Tensor,
    clean: CleanPass | None = None,
    advance: Callable[[int], None] = lambda rows: None,
) -> Tensor:
    """How replacing each token changes the outputs at each position.

    The source's v = ||O(a_c) - O(a)||_1; T forwards, in batches, halved when memory runs out. A
    row whose token c is replaced is run from c on where the model allows (see `CleanPrefix`).

    Args:
        task: what is attributed.
        replacement: [D], what a token becomes.
        clean: the result of `clean_pass`, to reuse.
        advance: called with the number of rows after each batch.

    Returns:
        [R, T], NaN where a token is after the position.
    """
    clean = clean or clean_pass(task.reader, task.embeds, task.at)
    length = int(task.at[-1]) + 1
    scores = torch.full((len(task.at), len(task.embeds)), torch.nan)
    start, limit = 0, task.batch_size
    while start < length:
        query = (task.at >= start).nonzero()[:, 0]
        run = length - start if clean.prefix else length
        outputs = len(query) * clean.outputs.shape[-1]
        rows = min(limit or _rows_at_a_time(run, outputs, task.embeds.device), length - start)
        try:
            change = _occlude(task, replacement, clean, query, start, rows)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            limit = rows // 2
            continue
        scores[query.cpu(), start : start + rows] = change.float().cpu().T
        start += rows
        advance(rows)
    return scores.masked_fill(~task.visible, torch.nan)


def _occlude(
    task: Task, replacement: Tensor, clean: CleanPass, query: Tensor, start: int, rows: int
) -> Tensor:
    """Tokens start .. start + rows replaced, a row each -> [rows, Q] for the queries [Q]."""
    begin = start if clean.prefix else 0
    occluded = task.embeds[begin : int(task.at[-1]) + 1].repeat(rows, 1, 1)
    row = torch.arange(rows, device=occluded.device)
    occluded[row, start - begin + row] = replacement
    prefix = (clean.prefix, begin) if clean.prefix else None
    outputs = task.reader.read(occluded, task.at[query] - begin, prefix)
    return task.measure.change(clean.outputs[query], outputs, query)


def _rows_at_a_time(length: int, outputs: int, device: torch.device) -> int:
    """Rows of `length` tokens in one forward, from each of which `outputs` numbers are read."""
    by_tokens = _tokens_at_a_time(device) // length
    by_outputs = _OUTPUT_BYTES // (4 * outputs)
    return max(1, min(by_tokens, by_outputs))


def _tokens_at_a_time(device: torch.device) -> int:
    """Tokens in one forward that keep the device busy; more only take memory."""
    return 256 if device.type == "cpu" else 16384
