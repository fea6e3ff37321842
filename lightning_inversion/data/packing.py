"""Which prompts share a batch: neighbours in length, as many as a budget of tokens allows."""

from collections.abc import Sequence


def pack(
    lengths: Sequence[int], tokens: int, rows: int | None = None, together: int = 1
) -> list[list[int]]:
    """Groups of row numbers, the longest prompts first, each group in its own order.

    It looks at the lengths alone, so that any number of processes forms the same batches.

    Args:
        lengths: tokens of each row.
        tokens: most tokens of a batch, its padding counted; a longer row is a batch by itself.
        rows: most rows of a batch; None for any number.
        together: that many rows, one after another, are never parted by the budget of tokens.

    >>> pack([3, 9, 4, 8], tokens=18)
    [[1, 3], [0, 2]]
    """
    units = [range(start, start + together) for start in range(0, len(lengths), together)]
    units.sort(key=lambda unit: -lengths[unit[0]])
    batches: list[list[int]] = []
    longest = 0
    for unit in units:
        size = len(batches[-1]) + together if batches else 0
        if not batches or size * longest > tokens or (rows is not None and size > rows):
            batches.append([])
            longest = lengths[unit[0]]
        batches[-1].extend(unit)
    return [part for batch in batches for part in _parts(sorted(batch), rows)]


def _parts(batch: list[int], rows: int | None) -> list[list[int]]:
    size = rows or len(batch)
    return [batch[start : start + size] for start in range(0, len(batch), size)]
