"""Sums of a head's scores over pairs of groups of samples, for many ways to form the groups: the work of the tests.

M [N, N] holds one head's scores among all samples, the n_a samples of task A first. A group is a vector that says how
often each sample is in it, and x'My is the sum of M over pairs (left role in x, right role in y). A sample paired with
itself says nothing about its task: the diagonal of M counts as zero throughout.

Relabelled, the groups are a and b = 1 - a. With r = M 1, c = M' 1, and U the part of M + M' above the diagonal:

    a'Ma = a'Ua      a'Mb = a'r - a'Ma      b'Ma = a'c - a'Ma      b'Mb = 1'r - a'r - a'c + a'Ma

so that P labellings cost one product U @ a, a [N, P]. Resampled, a and b stay within their task: two products of
triangles, and two of the rectangles between the tasks.

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
_CACHED_BYTES = 2 << 20


class PairSums(NamedTuple):
    """Sums of M over the pairs (left role, right role) of two groups without self-pairs, each [..., P].

    ``rounding`` [...] bounds the error of a sum: 2 N eps sum|M| for each of the at most four terms that make it up.
    """

    aa: Tensor
    ab: Tensor
    ba: Tensor
    bb: Tensor
    rounding: Tensor


def relabelled_sums(scores: Tensor, a: Tensor) -> PairSums:
    """The sums when the samples with a one in ``a`` [N, P] are called A, the others B; scores [..., N, N]."""

    def of(off_diagonal: Tensor) -> PairSums:
        aa = _within(off_diagonal, a)
        left, right = off_diagonal.sum(-1) @ a, off_diagonal.sum(-2) @ a  # a'r, a'c
        total = off_diagonal.sum((-2, -1)).unsqueeze(-1)
        return PairSums(aa, left - aa, right - aa, total - left - right + aa, _rounding(off_diagonal))

    return PairSums(*_by_heads(scores, a.shape[1], of))


def resampled_sums(scores: Tensor, weights: Tensor, n_a: int) -> PairSums:
    """The sums when sample i is taken ``weights[i]`` times (weights [N, P], A's samples first); scores [..., N, N]."""
    in_a, in_b = weights[:n_a], weights[n_a:]

    def of(off_diagonal: Tensor) -> PairSums:
        ab, ba = off_diagonal[:, :n_a, n_a:], off_diagonal[:, n_a:, :n_a]
        ab, ba = _bilinear(torch.cat([ab, ba.mT]), in_a, in_b).chunk(2)
        aa, bb = (_within(off_diagonal[:, part, part], weights[part]) for part in (slice(n_a), slice(n_a, None)))
        return PairSums(aa, ab, ba, bb, _rounding(off_diagonal))

    return PairSums(*_by_heads(scores, weights.shape[1], of))


def resampled_ab(scores: Tensor, weights: Tensor, n_a: int) -> Tensor:
    """The sum over pairs (A, B) alone, a third of the work of ``resampled_sums``."""
    in_a, in_b = weights[:n_a], weights[n_a:]
    (ab,) = _by_heads(scores, weights.shape[1], lambda part: (_bilinear(part[:, :n_a, n_a:], in_a, in_b),))
    return ab


def _rounding(off_diagonal: Tensor) -> Tensor:
    return 8 * off_diagonal.shape[-1] * torch.finfo(torch.float64).eps * off_diagonal.abs().sum((-2, -1))


def _by_heads(scores: Tensor, num_columns: int, sums: Callable[[Tensor], tuple[Tensor, ...]]) -> list[Tensor]:
    """Sums of a few heads at a time, each from a float64 copy [heads, N, N] with a diagonal of zeros."""
    num_samples = scores.shape[-1]
    chunk = max(_CACHED_BYTES // (8 * max(num_columns, 1) * min(num_samples, _ROWS)), 1)
    flat = scores.reshape(-1, num_samples, num_samples)
    parts = [sums(_off_diagonal(part)) for part in torch.split(flat, chunk)]
    joined = (torch.cat(part) for part in zip(*parts, strict=True))
    return [part.reshape(scores.shape[:-2] + part.shape[1:]) for part in joined]


def _off_diagonal(scores: Tensor) -> Tensor:
    copied = scores.to(torch.float64, copy=True)
    copied.diagonal(dim1=-2, dim2=-1).zero_()
    return copied


def _within(off_diagonal: Tensor, group: Tensor) -> Tensor:
    """X'Mx [heads, P], from M's elements above and below the diagonal folded into one triangle."""
    return _bilinear((off_diagonal + off_diagonal.mT).triu_(1), group, group, upper=True)


def _bilinear(matrices: Tensor, left: Tensor, right: Tensor, *, upper: bool = False) -> Tensor:
    """X'My [heads, P] of matrices [heads, n, m], left [n, P], right [m, P]; ``upper``: M is zero below its diagonal."""
    num_rows = matrices.shape[1]
    step = -(-num_rows // -(-num_rows // _ROWS))  # as many rows each time
    total = matrices.new_zeros(len(matrices), left.shape[1])
    for start in range(0, num_rows, step):
        rows, first = slice(start, start + step), start if upper else 0
        part = matrices[:, rows, first:]
        product = torch.mm(part.flatten(0, 1), right[first:])  # of all heads: faster than bmm
        total += product.view(*part.shape[:2], right.shape[1]).mul_(left[rows]).sum(-2)
    return total
