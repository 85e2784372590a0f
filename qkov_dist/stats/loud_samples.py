r"""What samples of unequal gradient norms do to ``overlap``, and how its interval is freed of it.

Within a task, means leave out each sample's pair with itself; across tasks no pair is left out. Where norms vary, so
that M_ij is about u_i v_j k with loud samples loud in both roles, m_aa lacks just its largest products u_i v_i, and
overlap comes out too high: by 0.24 with 8 samples a task of log-norm sd 1 (as tests/studies/intervals.py draws them),
still by 0.1 with 32. How loud a sample is, its means with the *other* task say without its own pair:

    u_i = mean_b M_ib      v_i = mean_b M_bi      i in A, b over the samples of B (and the other way round)
    c_A = log( mean over pairs i != j of u_i v_j / (mean u_i  mean v_j) )

and overlap + (c_A + c_B) / 2 is free of norms: exactly where M_ij = u_i v_j k. Both have the same limit with ever more
samples. The shift without a sample, which the jackknife needs, follows from the same sums in O(N^2).

The same means say how much of its task a sample is, u_i / sum u and v_i / sum v: what a jackknife has to know of
samples that move a statistic by unequal amounts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .pair_sums import counted_pairs


class Shift(NamedTuple):
    """What to add to overlap: of all samples [heads], and without each of them [heads, N].

    And how much of its task each sample is in the role of i, u_i / sum u, and of j, [heads, N] each.
    """

    whole: Tensor
    left_out: Tensor
    rows: Tensor
    columns: Tensor


class _Task(NamedTuple):
    """One task's c [heads, 1 + N], of all samples, then without each of them; and its samples' shares [heads, n]."""

    c: Tensor
    rows: Tensor
    columns: Tensor


def shift(scores: Tensor, pairs: Tensor, num_a: int) -> Shift:
    """Half of c_A + c_B, and samples' shares of their tasks.

    Args:
        scores: [heads, N, N], A's samples first; NaN for an absent head.
        pairs: Which pairs are of different samples, bool [N, N].
        num_a: Samples of A.
    """
    counted, pairs = counted_pairs(scores, pairs), pairs.to(scores.device)
    of_a = _of_task(counted, pairs, num_a)
    of_b = _of_task(_other_first(counted, num_a), _other_first(pairs, num_a), len(pairs) - num_a)
    c_b = torch.cat([of_b.c[:, :1], of_b.c[:, 1:].roll(num_a, -1)], -1)  # its columns had B's samples first
    both = 0.5 * (of_a.c + c_b)
    rows, columns = torch.cat([of_a.rows, of_b.rows], -1), torch.cat([of_a.columns, of_b.columns], -1)
    return Shift(both[:, 0], both[:, 1:], rows, columns)


def _other_first(matrices: Tensor, num_a: int) -> Tensor:
    return matrices.roll((-num_a, -num_a), (-2, -1))


def _of_task(counted: Tensor, pairs: Tensor, num: int) -> _Task:
    """What is known of the first task."""
    left = _means(counted[:, :num, num:], pairs[:num, num:], num)
    right = _means(counted[:, num:, :num].mT, pairs[num:, :num].T, num)
    rows, columns = _shares(left[..., 0]), _shares(right[..., 0])
    kept = torch.cat([left.new_ones(num, 1), 1 - torch.eye(num, len(pairs), dtype=left.dtype, device=left.device)], 1)
    left, right = left * kept, right * kept
    products, number = _over_pairs(left, right, pairs[:num, :num]), _over_pairs(kept, kept, pairs[:num, :num])
    return _Task((products / number * kept.sum(0).square() / (left.sum(-2) * right.sum(-2))).log(), rows, columns)


def _shares(means: Tensor) -> Tensor:
    """Of a task's means [heads, n]; all alike where all are 0."""
    total = means.sum(-1, keepdim=True)
    return torch.where(total == 0, 1 / means.shape[-1], means / total)


def _means(across: Tensor, pairs: Tensor, num: int) -> Tensor:
    """Each sample's mean with the other task [heads, num, 1 + N]; the columns of its own task leave it as it is."""
    sums, counts = across.sum(-1, keepdim=True), pairs.sum(-1, keepdim=True)
    whole = (sums / counts).expand(-1, -1, 1 + num)
    return torch.cat([whole, (sums - across) / (counts - pairs.to(counts))], -1)


def _over_pairs(left: Tensor, right: Tensor, pairs: Tensor) -> Tensor:
    """Sum of left_i right_j over pairs of different samples, for each column."""
    total = left.sum(-2) * right.sum(-2) - (left * right).sum(-2)
    copied = (~pairs).fill_diagonal_(False)
    rows = copied.any(1)
    if rows.any():  # samples that occur twice in a task
        total = total - (left[..., rows, :] * (copied[rows].to(right) @ right)).sum(-2)
    return total
