"""Which tasks are alike: the cosine of their mean gradients, and an order in which like tasks stand together.

    cosine[t, u] = -change[t, u] / sqrt(change[t, t] change[u, u]),

of the changes that all heads (or those of a block) add up to: the cosine of two tasks' mean gradients in the
optimizer's metric. Changes are over pairs of different samples, so with few samples it may lie beyond 1. It is not
known (NaN) where a step on a task does not lower its own loss. The order is that of the leaves of an average-linkage
tree of 1 - cosine, turned so that neighbours are as alike as can be; without effects it is by overlap.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def cosines_of(change: Floats) -> Floats:
    """Of all pairs, from the changes of all pairs [task, task]; 1 on the diagonal where it is known."""
    own = np.diagonal(change)
    norms = np.sqrt(np.where(own < 0, -own, np.nan))
    found: Floats = -change / np.outer(norms, norms)
    return found


def clustered(likeness: Floats) -> tuple[int, ...]:
    """Places of the tasks, like beside like, from their likeness [task, task]: at most 1, NaN where not known.

    Of both ends the task that was configured first comes first.
    """
    if len(likeness) < 3 or not np.isfinite(likeness).any():
        return tuple(range(len(likeness)))
    from scipy.cluster.hierarchy import leaves_list, linkage  # only who asks for the order pays for it
    from scipy.spatial.distance import squareform

    distances = 1 - np.clip(np.nan_to_num((likeness + likeness.T) / 2), -1, 1)
    np.fill_diagonal(distances, 0.0)
    places = leaves_list(linkage(squareform(distances, checks=False), "average", optimal_ordering=True)).tolist()
    return tuple(places if places[0] < places[-1] else places[::-1])
