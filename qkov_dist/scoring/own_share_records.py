r"""Records of what single samples do to scores through the Fisher, as they are kept (``scoring.own_shares``).

A record is float64 [heads, 7 T N]: sums of rows and columns of M', then of M; then V of each sample for the pairs of
its own task with task t, of t with its own, and of t among itself. Each is [T, N]. Records add up over tiles, ranks and
files. Of two tasks they say

    rows, columns   the sums of M' over those of M, by the task of the other sample [2, N] each
    overlap         by how much overlap of M' would move, were sample k no part of I:
                    1/2 log(F_ab F_ba / (F_aa F_bb)), F = 1 + V / S, S the sums of M' over pairs without k
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from .score_kinds import may_be_negative

Records = npt.NDArray[np.float64]
SUMS = 7  # of every task and sample in a record
KNOWN = ("rows_a", "rows_b", "columns_a", "columns_b", "overlap")  # what a record of two tasks says of every sample
LEAST_LEFT = 1e-3  # of the sums over all pairs: where the others' pairs are less, rounding decides what a sample moves


def formed_with(score: str, *, pooled: bool) -> bool:
    """Whether a run forms them: with scores of all pairs that have an overlap."""
    return pooled and not may_be_negative(score)


def no_shares(num_heads: int, num_samples: int | None = None, num_tasks: int = 2) -> Records:
    """Records of heads without any element; with None those of a run that forms none, of nothing at all."""
    return np.zeros((num_heads, 0 if num_samples is None else SUMS * num_tasks * num_samples))


def of_pair(records: Records, sizes: Sequence[int], a: int, b: int) -> Records:
    """The record of two of many tasks, [..., SUMS * 2 * (n_a + n_b)]; b is the later one."""
    starts = [0, *accumulate(sizes)]
    samples = np.r_[starts[a] : starts[a + 1], starts[b] : starts[b + 1]]
    by_task = records.reshape(*records.shape[:-1], SUMS, len(sizes), starts[-1])
    found: Records = by_task[..., [a, b], :][..., samples].reshape(*records.shape[:-1], -1)
    return found


def known(records: Records, num_a: int) -> Records:
    """What a record of two tasks says of each sample, [..., KNOWN, N], A's first; 1 and 0 where there is nothing."""
    sums = records.reshape(*records.shape[:-1], SUMS, 2, -1)
    without, given, lost = sums[..., :2, :, :], sums[..., 2:4, :, :], sums[..., 4:, :, :]
    ratios = np.divide(without, given, out=np.where(np.isnan(given), np.nan, 1.0), where=given > 0)
    moves = _moves(without, lost, num_a)
    found: Records = np.concatenate([ratios.reshape(*moves.shape[:-1], 4, -1), moves[..., None, :]], axis=-2)
    return found


def _moves(without: Records, lost: Records, num_a: int) -> Records:
    """By how much overlap moves with each sample [..., N], from rows and columns of M' and V, [..., which, 2, N].

    It is 0 where the pairs of one sample are nearly all there is.
    """
    rows, columns = without[..., 0, :, :], without[..., 1, :, :]
    parts = slice(0, num_a), slice(num_a, rows.shape[-1])
    moves = np.zeros(rows.shape[:-2] + rows.shape[-1:])
    for own, other in ((0, 1), (1, 0)):
        part = parts[own]
        row, column = rows[..., own, part], columns[..., own, part]
        lacking = np.stack([rows[..., other, part], columns[..., other, part], row + column, np.zeros_like(row)])
        pairs = ((own, other), (other, own), (own, own), (other, other))
        sums = np.stack([rows[..., task, parts[of]].sum(-1, keepdims=True) for of, task in pairs])
        left = sums - lacking
        of_k = np.stack(
            [lost[..., which, task, part] for which, task in ((0, other), (1, other), (0, own), (2, other))]
        )
        seen = (left > LEAST_LEFT * sums).all(0)
        shares = np.divide(of_k, left, out=np.where(np.isnan(left), np.nan, 0.0), where=seen)
        ab, ba, aa, bb = np.log1p(np.maximum(shares, -0.5))  # less is rounding: I without k is at most twice I
        moves[..., part] = (ab + ba - aa - bb) / 2
    return moves
