r"""Records of what samples' own shares of the Fisher do to scores, as they are kept (``scoring.own_shares``).

A record is float64 [heads, 4 T N]: sums of rows and columns of M', then of M, each [T, N]. Records add up over tiles,
ranks and files.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from .score_kinds import may_be_negative

Records = npt.NDArray[np.float64]


def formed_with(score: str, *, pooled: bool) -> bool:
    """Whether a run forms them: with scores of all pairs that have an overlap."""
    return pooled and not may_be_negative(score)


def no_shares(num_heads: int, num_samples: int | None = None, num_tasks: int = 2) -> Records:
    """Records of heads without any element; with None those of a run that forms none, of nothing at all."""
    return np.zeros((num_heads, 0 if num_samples is None else 4 * num_tasks * num_samples))


def of_pair(records: Records, sizes: Sequence[int], a: int, b: int) -> Records:
    """The record of two of many tasks, [..., 4 * 2 * (n_a + n_b)]; b is the later one."""
    starts = [0, *accumulate(sizes)]
    samples = np.r_[starts[a] : starts[a + 1], starts[b] : starts[b + 1]]
    by_task = records.reshape(*records.shape[:-1], 4, len(sizes), starts[-1])
    found: Records = by_task[..., [a, b], :][..., samples].reshape(*records.shape[:-1], -1)
    return found


def ratios(records: Records, num_tasks: int = 2) -> Records:
    """Sums of M' as multiples of those of M, [..., rows or columns, T, N]; 1 where there is nothing."""
    both = records.reshape(*records.shape[:-1], 2, 2, num_tasks, -1)
    without, given = both[..., 0, :, :, :], both[..., 1, :, :, :]
    return np.divide(without, given, out=np.where(np.isnan(given), np.nan, 1.0), where=given > 0)
