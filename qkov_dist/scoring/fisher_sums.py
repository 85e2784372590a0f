"""What is known of I over each head's elements: one record from a tile to the file, which adds up.

    column            over a head's elements                        two of them make
    sum               the sum of I                                  their sum
    count             how many elements                             their sum
    min               the smallest I                                the smaller
    num_ridge_above   elements where epsilon or lambda exceeds I    their sum
    sum_of_a          the part of ``sum`` that A's samples add      their sum

A record is float64 [heads, columns]; tiles, projections, ranks and files add up by :func:`add`. That of more than two
tasks goes on with what each further task adds, but for the last, which adds the rest. ``score.fisher_sums`` makes it of
a tile, where heads are scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from qkov_dist.distributed.world import World

FisherSums = npt.NDArray[np.float64]
FISHER_COLUMNS: Mapping[str, np.ufunc] = {
    "sum": np.add,
    "count": np.add,
    "min": np.minimum,
    "num_ridge_above": np.add,
    "sum_of_a": np.add,
}
_NOTHING: Mapping[np.ufunc, float] = {np.add: 0.0, np.minimum: np.inf}  # what changes nothing when it is added


def num_columns(num_tasks: int) -> int:
    """Columns of a record."""
    return len(FISHER_COLUMNS) + num_tasks - 2


def num_tasks_of(sums: FisherSums) -> int:
    """The number of tasks that records [..., columns] are of."""
    return int(sums.shape[-1]) - len(FISHER_COLUMNS) + 2


def _combines(width: int) -> list[np.ufunc]:
    """How each column adds up."""
    return [*FISHER_COLUMNS.values(), *[np.add] * (width - len(FISHER_COLUMNS))]


def no_sums(num_heads: int, num_tasks: int = 2) -> FisherSums:
    """The record of heads without any element, [heads, columns]."""
    return np.tile([_NOTHING[combine] for combine in _combines(num_columns(num_tasks))], (num_heads, 1))


def column(sums: FisherSums, name: str) -> FisherSums:
    """One column of records [..., columns], as a view."""
    return sums[..., list(FISHER_COLUMNS).index(name)]


def of_pair(sums: FisherSums, a: int, b: int) -> FisherSums:
    """The records of two of many tasks. ``sum_of_a`` becomes A's part where these two alone make up ``sum``."""
    first = list(FISHER_COLUMNS).index("sum_of_a")
    total, known = column(sums, "sum"), sums[..., first:]
    of_tasks = np.concatenate([known, (total - known.sum(-1))[..., None]], axis=-1)
    both = of_tasks[..., a] + of_tasks[..., b]
    of_a = np.divide(total * of_tasks[..., a], both, out=np.zeros_like(total), where=both > 0)
    return np.concatenate([sums[..., :first], of_a[..., None]], axis=-1)


def add(
    total: FisherSums, more: FisherSums, at: int | Sequence[int] | npt.NDArray[np.int64] | slice = slice(None)
) -> None:
    """Add records to those of some heads, in place.

    Args:
        total: [heads, columns].
        more: One for each head at ``at``.
        at: Heads of ``total``, each at most once.
    """
    for place, combine in enumerate(_combines(total.shape[-1])):
        total[at, place] = combine(total[at, place], more[..., place])


def sums_over_ranks(sums: FisherSums, world: World) -> FisherSums:
    """The sum of all ranks' records of the same heads, on every rank; all of them call this alike."""
    combines = _combines(sums.shape[-1])
    are_added = [combine is np.add for combine in combines]
    total = world.all_reduce(np.where(are_added, sums, 0.0))
    for place, combine in enumerate(combines):
        if not are_added[place]:
            total[:, place] = combine.reduce(world.all_gather(sums[:, place].tolist()))
    return total
