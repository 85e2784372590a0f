r"""Squared norms of samples' gradients in a part of a projection, without the gradients where that takes less.

    ||D^T X||^2 = sum_{s,t} (D D^T)_{st} (X X^T)_{st}

The right side costs T^2 (rows + cols) in place of T rows cols operations, and X X^T is formed once for the projections
that share X. Its terms cancel where a gradient is small beside its factors: ||g||^2 is at most (sum_t |d_t| |x_t|)^2,
and where it is less than 1/256 of that, float32 keeps too few of its digits, and who asks is told so; as of factors
whose squares overflow or underflow in float32. (Of SmolLM2's gradients on code the least is 1/117, and float32 is off
by at most 7e-7.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qkov_dist.capture.factors import FeatureSlice
from qkov_dist.memory import moved

from .native_kernel import NativeKernel

CHUNK_BYTES = 32 * 2**20  # of a projection's factors or gradients at a time
CANCELLED = 1 / 256  # of the most that a squared norm can be; below, float32 keeps too few of its digits
FAINT = 1e-30  # of a sample's largest |d_t|^2 or |x_t|^2; below, products of float32 underflow


class GramProducts:
    """X of some samples, [n, T, in], and the Gram matrices of it that several projections need.

    Args:
        x: X.
        start: The feature at which it begins.
        num_sites: Projections that share it.
        kernel: What forms Gram matrices, if not torch's products.
    """

    def __init__(self, x: Tensor, start: int, num_sites: int, kernel: NativeKernel | None = None) -> None:
        self._x, self._start, self._num_sites, self._kernel = x, start, num_sites, kernel
        self._grams: dict[tuple[int, ...], Tensor] = {}

    def squares(self, d: Tensor, cols: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """||D^T X||^2 of each sample, float64 [n], for D [n, T, rows] and some columns of X; of a bias without any.

        And whose terms cancel too far for the type in which they are summed, or leave its range, bool [n]; these are 0.
        """
        if not cols:
            return square_norms(d.to(_at_least_float32(d.dtype)).sum(1)), None
        length, num_rows = d.shape[1:]
        if gram_is_cheaper(length, num_rows, len(cols), self._num_sites):
            return self._by_grams(d, cols)
        x = features_of(self._x, cols, self._start)
        dtype = _at_least_float32(d.dtype)
        squares = d.new_zeros(len(d), dtype=torch.float64)
        for rows in chunks(num_rows, len(d) * len(cols) * dtype.itemsize):
            squares += square_norms(torch.bmm(d[..., rows].to(dtype).mT, x.to(dtype)))
        return squares, None

    def _by_grams(self, d: Tensor, cols: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        of_d, of_x = gram(d, self._kernel), self._gram_of(cols)
        squares = (of_d * of_x).sum((1, 2), dtype=torch.float64)
        if of_d.dtype == torch.float64:
            return squares, None
        rows_d, rows_x = _squares_of_rows(of_d), _squares_of_rows(of_x)
        most = (rows_d * rows_x).sqrt().sum(1).square()  # not finite where products are not
        sound = (squares >= CANCELLED * most) & most.isfinite()
        sound &= (rows_d.amax(1) >= FAINT) & (rows_x.amax(1) >= FAINT)
        return squares.masked_fill_(~sound, 0.0), ~sound

    def _gram_of(self, cols: tuple[int, ...]) -> Tensor:
        if cols not in self._grams:
            self._grams[cols] = gram(features_of(self._x, cols, self._start), self._kernel)
        return self._grams[cols]


def gram_is_cheaper(length: int, num_rows: int, num_cols: int, num_sites: int) -> bool:
    """Whether Gram matrices of T tokens, X's shared by some projections, take less than the gradient itself."""
    return length * (num_rows + num_cols / num_sites) < num_rows * num_cols


def norm_flops(length: int, num_rows: int, num_cols: int, num_sites: int) -> int:
    """Operations of one sample's norm; of X's Gram matrix a projection's part."""
    if gram_is_cheaper(length, num_rows, num_cols, num_sites):
        return 2 * length * length * (num_rows + num_cols // num_sites)
    return 2 * length * num_rows * num_cols


def gram(values: Tensor, kernel: NativeKernel | None = None) -> Tensor:
    """The products of all pairs of a sample's tokens, [n, T, T], in float32 or better.

    A kernel for that type forms half of them.
    """
    wide = values.to(_at_least_float32(values.dtype))
    return kernel.gram(wide) if kernel is not None and kernel.dtype == wide.dtype else torch.bmm(wide, wide.mT)


def _squares_of_rows(gram: Tensor) -> Tensor:
    """What rows' products with themselves are, float64, never below 0."""
    return gram.diagonal(dim1=1, dim2=2).clamp_min(0).double()


def square_norms(values: Tensor) -> Tensor:
    """The squared norm of each sample's values, float64 [n]."""
    norms: Tensor = torch.linalg.vector_norm(values.flatten(1), dim=1, dtype=torch.float64)
    return norms.square()


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def features_of(values: Tensor, wanted: tuple[int, ...], start: int) -> Tensor:
    """Some features along the last axis, a view where they lie one behind another."""
    first, last = wanted[0], wanted[-1]
    if last - first + 1 == len(wanted):
        return FeatureSlice(values, start).features(slice(first, last + 1))
    return values[..., moved(torch.tensor(wanted) - start, values.device)]


def chunks(num: int, num_bytes: int) -> Iterator[slice]:
    """Slices of ``num`` things, as many at a time as may be worked on, each of so many bytes."""
    step = max(CHUNK_BYTES // max(num_bytes, 1), 1)
    return (slice(start, min(start + step, num)) for start in range(0, num, step))
