"""Which part of a tensor a rank holds by the placements of a device mesh: one rule, in integers.

    placement on an axis of n ranks, this rank at coordinate c, of the interval left by the axes before it
    Replicate              the interval itself
    Shard(dim)             chunk c of n along ``dim``, each ceil(size / n) long, the last ones shorter or empty
    _StridedShard(dim)     the same, but cut after the plain shards of the other axes (FSDP2 over tensor parallel);
                           where these do not make up its split factor: chunk c of each of so many equal parts (gates
                           and values of experts, packed into one weight)

This module alone reads placements; what it hands out is integers, as it is for ranks that are not there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qkov_dist.errors import QkovError
from qkov_dist.layout.rects import Rect, rects_of_flat_interval

HeldRects = tuple[Rect, ...]
Interval = tuple[int, int]


@dataclass(frozen=True)
class Placement:
    """How one mesh axis treats a weight: ``dim`` is the storage dim that it cuts, None where it replicates.

    ``late`` marks a shard that is cut after the plain shards of the other axes; ``parts`` is into how many equal parts
    it divides what it cuts, to take a chunk of each.
    """

    axis_size: int
    coordinate: int
    dim: int | None
    late: bool = False
    parts: int = 1


def shard_interval(size: int, axis_size: int, coordinate: int) -> Interval:
    """The interval of chunk ``coordinate``: torch's rule, ceil(size / n) each, the last ones shorter or empty."""
    chunk = -(-size // axis_size)
    return min(chunk * coordinate, size), min(chunk * (coordinate + 1), size)


def intervals_by_placements(shape: Sequence[int], placements: Sequence[Placement]) -> tuple[Interval, ...]:
    """The interval along each storage dim that is left after every axis has cut its dim.

    Raises:
        QkovError: where several are left.
    """
    pieces = pieces_by_placements(shape, placements)
    if packed := next((found for found in pieces if len(found) > 1), None):
        raise _no_cut(f"one that leaves {len(packed)} pieces")
    return tuple(piece for (piece,) in pieces)


def pieces_by_placements(shape: Sequence[int], placements: Sequence[Placement]) -> tuple[tuple[Interval, ...], ...]:
    """The same for any cut: along each storage dim one or more intervals, in the order in which they lie in memory."""
    pieces: list[tuple[Interval, ...]] = [((0, size),) for size in shape]
    for placement in sorted(placements, key=lambda p: p.late):
        if placement.dim is not None:
            left = pieces[placement.dim]
            size, odd = divmod(sum(stop - start for start, stop in left), placement.parts)
            if odd:
                raise _no_cut(f"one of {placement.parts} parts that are not equal")
            low, high = shard_interval(size, placement.axis_size, placement.coordinate)
            cut = (_within(left, n * size + low, n * size + high) for n in range(placement.parts))
            pieces[placement.dim] = tuple(piece for part in cut for piece in part) or (left[0][:1] * 2,)
    return tuple(pieces)


def _within(pieces: Sequence[Interval], low: int, high: int) -> Iterator[Interval]:
    """What lies from ``low`` to ``high`` of pieces that are laid one after the other."""
    for start, stop in pieces:
        first, last = start + max(low, 0), min(start + high, stop)
        if first < last:
            yield first, last
        low, high = low - (stop - start), high - (stop - start)


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
    made = [_placement(p, mesh.size(n), coordinate[n], tensor.ndim) for n, p in enumerate(found)]
    return [_of_strided(p, made[n], made[n + 1 :]) for n, p in enumerate(found)]


def _of_strided(found: Any, placement: Placement, behind: Sequence[Placement]) -> Placement:
    """What a strided shard means before the axes behind it: cut after theirs, or a chunk of each of its parts.

    Raises:
        QkovError: for one that is neither.
    """
    parts = getattr(found, "split_factor", 1)
    others = math.prod(p.axis_size for p in behind if p.dim == placement.dim)
    if parts in {1, others}:
        return replace(placement, late=parts > 1)
    if others > 1:
        raise _no_cut(found)
    return replace(placement, parts=parts)


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
    return Placement(axis_size, coordinate, dim % ndim)


def _no_cut(found: object) -> QkovError:
    return QkovError(
        "sharded weight",
        expected="DTensor placements Replicate, Shard(0) or Shard(1)",
        got=str(found),
        remedy="Shard the attention projections along their first two dims, or run them replicated.",
    )
