"""Sums of a head's scores over pairs of groups of samples, for many ways to form the groups: the work of the tests.

M [N, N] holds one head's scores among all samples, the n_a samples of task A first. A group is a vector of zeros and
ones, and x'My is the sum of M over pairs (left role in x, right role in y). A sample paired with itself, or with a copy
of itself, says nothing about its task: M counts as zero there throughout.

Relabelled, the groups are a and b = 1 - a. With r = M 1, c = M' 1, and U the part of M + M' above the diagonal:

    a'Ma = a'Ua      a'Mb = a'r - a'Ma      b'Ma = a'c - a'Ma      b'Mb = 1'r - a'r - a'c + a'Ma

so that P labellings cost one product U @ a, a [N, P]. Without sample i, M loses that sample's row and column, and the
same four formulas hold of what is left, from two products M a and M' a:

    a'Ma loses a_i (M a + M' a)_i    a'r loses a_i r_i + (M' a)_i    a'c loses a_i c_i + (M a)_i    1'r loses r_i + c_i

Sums are float64 because b'Mb is a difference: where task A's gradients are r times larger, it is about r^-3 of the
total, which leaves no digit in float32 at r = 200 and eight in float64. A sum is off by at most about N eps sum|M| for
each of its terms, which is what ``rounding`` bounds.

Nearly all the time of a test goes into x'My = sum_i x_i (M y)_i. Heads and rows are taken a few at a time, so that M y,
[heads, rows, P], is still in the cache when it is summed up, and U's rows lose the zeros before the diagonal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_ROWS = 64
_CACHED_BYTES, GPU_BYTES = 2 << 20, 256 << 20


class PairSums(NamedTuple):
    """Sums of M over the pairs (left role, right role) of two groups of different samples, each [..., P].

    ``rounding`` [...] bounds the error of a sum: 2 N eps sum|M| for each of the at most four terms that make it up.
    """

    aa: Tensor
    ab: Tensor
    ba: Tensor
    bb: Tensor
    rounding: Tensor


def relabelled_sums(scores: Tensor, a: Tensor, pairs: Tensor) -> PairSums:
    """The sums when the samples with a one in ``a`` [N, P] are called A, the others B.

    Args:
        scores: [..., N, N].
        a: The labellings.
        pairs: Which pairs are of different samples, bool [N, N]; the others count as zero.
    """

    def of(counted: Tensor) -> PairSums:
        left, right = (_with_groups(counted.sum(dim), a) for dim in (-1, -2))  # a'r, a'c
        total = counted.sum((-2, -1)).unsqueeze(-1)
        return _of_groups(_within(counted, a), left, right, total, _rounding(counted))

    return PairSums(*_by_heads(scores, a.shape[1], pairs, of))


def left_out_sums(scores: Tensor, a: Tensor, pairs: Tensor) -> tuple[PairSums, PairSums]:
    """The same sums [heads, P] of scores [heads, N, N], and those without each sample [heads, N, P]."""
    counted = counted_pairs(scores, pairs)
    of_heads = a.expand(len(counted), -1, -1)  # one product a head: its numbers are the same beside any others
    of_a, to_a = (torch.bmm(m, of_heads) for m in (counted, counted.mT))  # M a, M' a
    rows, columns = (counted.sum(dim).unsqueeze(-1) for dim in (-1, -2))  # r, c
    rounding = _rounding(counted)
    whole = (of_a * a).sum(-2), _with_groups(rows.squeeze(-1), a), _with_groups(columns.squeeze(-1), a), rows.sum(-2)
    within = (of_a + to_a).mul_(a)
    lost = within, to_a.addcmul_(a, rows), of_a.addcmul_(a, columns), rows + columns
    aa, left, right, total = (
        torch.sub(of_all.unsqueeze(-2), of, out=of) for of_all, of in zip(whole, lost, strict=True)
    )
    return _of_groups(*whole, rounding), _of_groups(aa, left, right, total, rounding.unsqueeze(-1))


def _with_groups(sums: Tensor, a: Tensor) -> Tensor:
    """Sums over A [heads, P] of one vector [heads, N] a head; one product a head, as its numbers are its own."""
    return torch.matmul(sums.unsqueeze(1), a.expand(len(sums), -1, -1)).squeeze(1)


def _of_groups(aa: Tensor, left: Tensor, right: Tensor, total: Tensor, rounding: Tensor) -> PairSums:
    """The four sums from a'Ma, a'r, a'c and 1'r."""
    return PairSums(aa, left - aa, right - aa, (total - left).sub_(right).add_(aa), rounding)


def _rounding(counted: Tensor) -> Tensor:
    return 8 * counted.shape[-1] * torch.finfo(torch.float64).eps * counted.abs().sum((-2, -1))


def _by_heads(
    scores: Tensor, num_columns: int, pairs: Tensor, sums: Callable[[Tensor], tuple[Tensor, ...]]
) -> list[Tensor]:
    """Sums of a few heads at a time, each from a float64 copy [heads, N, N], zero where no pair is counted."""
    num_samples = scores.shape[-1]
    at_once = _CACHED_BYTES if scores.device.type == "cpu" else GPU_BYTES
    chunk = max(at_once // (8 * max(num_columns, 1) * min(num_samples, _ROWS)), 1)
    flat = scores.reshape(-1, num_samples, num_samples)
    parts = [sums(counted_pairs(part, pairs)) for part in torch.split(flat, chunk)]
    joined = (torch.cat(part) for part in zip(*parts, strict=True))
    return [part.reshape(scores.shape[:-2] + part.shape[1:]) for part in joined]


def counted_pairs(scores: Tensor, pairs: Tensor) -> Tensor:
    """A float64 copy of scores [..., N, N], zero where two samples are no pair of different ones (bool [N, N])."""
    return scores.to(torch.float64, copy=True).masked_fill_(~pairs.to(scores.device), 0.0)


def _within(counted: Tensor, group: Tensor) -> Tensor:
    """X'Mx [heads, P], from M's elements above and below the diagonal folded into one triangle."""
    return _bilinear((counted + counted.mT).triu_(1), group, group)


def _bilinear(matrices: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """X'My [heads, P] of matrices [heads, n, n] that are zero below their diagonal, left and right [n, P]."""
    num_rows = matrices.shape[1]
    step = -(-num_rows // -(-num_rows // _ROWS))  # as many rows each time
    total = matrices.new_zeros(len(matrices), left.shape[1])
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        part = matrices[:, rows, start:]
        product = torch.bmm(part, right[start:].expand(len(part), -1, -1))  # a head's numbers are its own
        total += product.mul_(left[rows]).sum(-2)
    return total
