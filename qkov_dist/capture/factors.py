"""Factors of one projection at the features that are at hand, and where each sample is in them.

Factors or gradient: which of the two is smaller while a sample waits for its layer to be scored.

A sample of T tokens leaves T (I + O) numbers as the factors X and D of a projection [O, I], where projections that read
the same input keep one X, and O (I + 1) as its gradient with that of its bias. Integers only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import AttentionLayer, Site
from qkov_dist.layout.rects import Rect

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

    def to(self, device: torch.device | str, dtype: torch.dtype) -> FeatureSlice:
        """The same features elsewhere, in another type."""
        return FeatureSlice(self.values.to(device, dtype), self.start)


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
        return Whole(self.values.to(device, dtype), self.row, self.col)


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


GRADIENT_BYTES = 4  # of one element: gradients are kept in float32


def shared_inputs(layer: AttentionLayer, sites: Collection[Site] | None = None) -> list[list[tuple[Site, Rect]]]:
    """Projections by the input they read, each with its shape as [out, in].

    Q, K and V are taken to read one input where it is as wide; capture finds out what they really share.

    Args:
        layer: The layer.
        sites: Its projections that are captured, perhaps among others; all by default.
    """
    groups: dict[tuple[bool, int], list[tuple[Site, Rect]]] = {}
    for projection in layer.projections:
        site = Site(layer.index, projection.module)
        if sites is None or site in sites:
            key = "O" in projection.blocks, projection.shape[1]
            groups.setdefault(key, []).append((site, projection.whole()))
    return list(groups.values())


def gradients_above(layers: Iterable[AttentionLayer], itemsize: int) -> dict[Site, int]:
    """By site, the number of tokens above which a sample's gradients are smaller than its factors.

    Args:
        layers: The layers.
        itemsize: Bytes of one number of a factor.
    """
    return {
        site: _gradient_bytes(group) // _token_bytes(group, itemsize)
        for layer in layers
        for group in shared_inputs(layer)
        for site, _ in group
    }


def factor_bytes(
    layer: AttentionLayer,
    sites: Collection[Site],
    lengths: Sequence[int],
    itemsize: int,
    tp_rects: Mapping[Site, Rect] | None = None,
) -> int:
    """Bytes in which the factors of some samples wait, each sample in the smaller form.

    Args:
        layer: The layer.
        sites: Its projections that are captured, perhaps among others.
        lengths: Tokens of each sample.
        itemsize: Bytes of one number of a factor.
        tp_rects: The tensor-parallel shard that this rank sees of a projection, [out, in].
    """
    total, above = 0, gradients_above([layer], itemsize)
    for group in shared_inputs(layer, sites):
        seen = [(site, (tp_rects or {}).get(site, rect)) for site, rect in group]
        whole, token = _gradient_bytes(seen), _token_bytes(seen, itemsize)
        threshold = above[group[0][0]]
        total += sum(whole if length > threshold else token * length for length in lengths)
    return total


def _token_bytes(group: Sequence[tuple[Site, Rect]], itemsize: int) -> int:
    return itemsize * (max(rect.shape[1] for _, rect in group) + sum(rect.shape[0] for _, rect in group))


def _gradient_bytes(group: Sequence[tuple[Site, Rect]]) -> int:
    return GRADIENT_BYTES * sum(rect.shape[0] * (rect.shape[1] + 1) for _, rect in group)
