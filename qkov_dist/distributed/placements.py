"""Which part of a tensor a rank holds by the placements of a device mesh: one rule, in integers.

    placement on an axis of n ranks, this rank at coordinate c, of the interval left by the axes before it
    Replicate              the interval itself
    Shard(dim)             chunk c of n along ``dim``, each ceil(size / n) long, the last ones shorter or empty
    _StridedShard(dim)     the same, but cut after the plain shards of the other axes (FSDP2 over tensor parallel)

This module alone reads placements; what it hands out is integers, as it is for ranks that are not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qkov_dist.errors import QkovError
from qkov_dist.layout.rects import Rect, rects_of_flat_interval

HeldRects = tuple[Rect, ...]
Interval = tuple[int, int]


@dataclass(frozen=True)
class Placement:
    """How one mesh axis treats a weight: ``dim`` is the storage dim that it cuts, None where it replicates.

    ``late`` marks a shard that is cut after the plain shards of the other axes.
    """

    axis_size: int
    coordinate: int
    dim: int | None
    late: bool = False


def shard_interval(size: int, axis_size: int, coordinate: int) -> Interval:
    """The interval of chunk ``coordinate``: torch's rule, ceil(size / n) each, the last ones shorter or empty."""
    chunk = -(-size // axis_size)
    return min(chunk * coordinate, size), min(chunk * (coordinate + 1), size)


def intervals_by_placements(shape: Sequence[int], placements: Sequence[Placement]) -> tuple[Interval, ...]:
    """The interval along each storage dim that is left after every axis has cut its dim."""
    intervals = [(0, size) for size in shape]
    for placement in sorted(placements, key=lambda p: p.late):
        if placement.dim is not None:
            start, stop = intervals[placement.dim]
            low, high = shard_interval(stop - start, placement.axis_size, placement.coordinate)
            intervals[placement.dim] = (start + low, start + high)
    return tuple(intervals)


def held_by_placements(shape: tuple[int, int], placements: Sequence[Placement]) -> HeldRects:
    """The rectangle of a matrix in storage orientation that is left after every axis has cut its dim."""
    rows, cols = intervals_by_placements(shape, placements)
    rect = Rect(*rows, *cols)
    return (rect,) if rect.area else ()


def held_by_flat_partition(shape: tuple[int, int], num_partition: int, index: int) -> HeldRects:
    """The rectangles of ZeRO-3's partition ``index``: ``num_partition`` elements of the row-major flattened weight."""
    size = shape[0] * shape[1]
    start = min(num_partition * index, size)
    return rects_of_flat_interval(start, min(start + num_partition, size), shape[1])


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The first dim by all others; a vector is one column."""
    rows = shape[0] if shape else 1
    cols = 1
    for size in shape[1:]:
        cols *= size
    return rows, cols


def placements_of(tensor: Any) -> list[Placement]:
    """How each axis of a DTensor's mesh treats it; nothing treats any other tensor.

    Raises:
        QkovError: for a placement that is no plain shard or replica.
    """
    found = getattr(tensor, "placements", ())
    if not found:
        return []
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    return [_placement(p, mesh.size(n), coordinate[n], tensor.ndim) for n, p in enumerate(found)]


def placements_of_matrix(weight: Any) -> list[Placement]:
    """The same of a weight that is seen as a matrix.

    Raises:
        QkovError: for a cut along another dim than its first two too.
    """
    placements = placements_of(weight)
    for placement, found in zip(placements, getattr(weight, "placements", ()), strict=True):
        if placement.dim is not None and placement.dim > 1:
            raise _no_cut(found)
    return placements


def _placement(found: Any, axis_size: int, coordinate: int, ndim: int) -> Placement:
    if found.is_replicate():
        return Placement(axis_size, coordinate, None)
    dim = getattr(found, "dim", None)
    if dim is None:
        raise _no_cut(found)
    return Placement(axis_size, coordinate, dim % ndim, late=type(found).__name__ == "_StridedShard")


def _no_cut(found: Any) -> QkovError:
    return QkovError(
        "sharded weight",
        expected="DTensor placements Replicate, Shard(0) or Shard(1)",
        got=str(found),
        remedy="Shard the attention projections along their first two dims, or run them replicated.",
    )
