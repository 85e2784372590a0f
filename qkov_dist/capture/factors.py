"""Factors of one projection at the features that are at hand, and where each sample is in them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from qkov_dist.errors import QkovError
from qkov_dist.memory import moved

Span = tuple[int, int]


@dataclass(frozen=True)
class FeatureSlice:
    """Factors at the features [start, start + width) of their projection; they run along the last axis."""

    values: Tensor
    start: int = 0

    def features(self, part: slice) -> Tensor:
        """Some features, by their number in the whole projection.

        Raises:
            QkovError: for features outside the slice.
        """
        return self.values[..., _within(part, self.start, self.values.shape[-1])]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> FeatureSlice:
        """The same features elsewhere, in another type."""
        return FeatureSlice(moved(self.values, device, dtype), self.start)


@dataclass(frozen=True)
class Whole:
    """Gradients [n, out, in + 1] of samples kept as such, at some features; the last column is the bias's."""

    values: Tensor
    row: int = 0
    col: int = 0

    def rect(self, rows: slice, cols: slice) -> Tensor:
        """A rectangle of every gradient, [n, rows, cols]."""
        down = _within(rows, self.row, self.values.shape[1])
        return self.values[:, down, _within(cols, self.col, self.values.shape[2] - 1)]

    def bias(self, rows: slice) -> Tensor:
        """The bias's gradient at some output features, [n, rows, 1]."""
        return self.values[:, _within(rows, self.row, self.values.shape[1]), -1:]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Whole:
        """The same elsewhere, in another type."""
        return Whole(moved(self.values, device, dtype), self.row, self.col)


def _within(part: slice, start: int, width: int) -> slice:
    low, high = part.start - start, part.stop - start
    if low < 0 or high > width:
        raise QkovError(
            "captured factors",
            expected=f"features {part.start} to {part.stop}",
            got=f"{start} to {start + width}",
            remedy="Report this: the plan asks a rank for what its hooks do not see.",
        )
    return slice(low, high)


@dataclass
class SampleIndex:
    """Where samples are at the sites of one threshold.

    Attributes:
        spans: Rows (start, stop) of each sample kept as factors, by its pooled number.
        whole: The place of each sample kept as a gradient.
        num_rows: Rows of all factors.
    """

    spans: dict[int, Span] = field(default_factory=dict)
    whole: dict[int, int] = field(default_factory=dict)
    num_rows: int = 0

    def add(self, number: int, length: int, *, as_gradient: bool) -> None:
        """Take in one more sample."""
        if as_gradient:
            self.whole[number] = len(self.whole)
        else:
            self.spans[number] = (self.num_rows, self.num_rows + length)
            self.num_rows += length
