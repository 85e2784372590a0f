"""What is known of I over each head's elements: one record from a tile to the file, which adds up.

    column            over a head's elements                        two of them make
    sum               the sum of I                                  their sum
    count             how many elements                             their sum
    min               the smallest I                                the smaller
    num_ridge_above   elements where epsilon or lambda exceeds I    their sum
    sum_of_a          the part of ``sum`` that A's samples add      their sum

A record is float64 [heads, columns]; tiles, projections, ranks and files add up by :func:`add`. One column more is one
row of ``FISHER_COLUMNS`` more, and a value for it in ``score.fisher_sums``.
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


def no_sums(num_heads: int) -> FisherSums:
    """The record of heads without any element, [heads, columns]."""
    return np.tile([_NOTHING[combine] for combine in FISHER_COLUMNS.values()], (num_heads, 1))


def column(sums: FisherSums, name: str) -> FisherSums:
    """One column of records [..., columns], as a view."""
    return sums[..., list(FISHER_COLUMNS).index(name)]


def records(columns: Mapping[str, npt.ArrayLike]) -> FisherSums:
    """Records [heads, columns] from every column, by its name."""
    return np.stack(np.broadcast_arrays(*(columns[name] for name in FISHER_COLUMNS)), axis=-1).astype(np.float64)


def add(
    total: FisherSums, more: FisherSums, at: int | Sequence[int] | npt.NDArray[np.int64] | slice = slice(None)
) -> None:
    """Add records to those of some heads, in place.

    Args:
        total: [heads, columns].
        more: One for each head at ``at``.
        at: Heads of ``total``, each at most once.
    """
    for place, combine in enumerate(FISHER_COLUMNS.values()):
        total[at, place] = combine(total[at, place], more[..., place])


def sums_over_ranks(sums: FisherSums, world: World) -> FisherSums:
    """The sum of all ranks' records of the same heads, on every rank; all of them call this alike."""
    are_added = [combine is np.add for combine in FISHER_COLUMNS.values()]
    total = world.all_reduce(np.where(are_added, sums, 0.0))
    for place, combine in enumerate(FISHER_COLUMNS.values()):
        if not are_added[place]:
            total[:, place] = combine.reduce(world.all_gather(sums[:, place].tolist()))
    return total
