"""Dealing out what ranks hold, so that every element of every weight is owned by exactly one of them.

Ranks that hold the very same rectangles are replicas of each other. They share the sequence of all parameters that they
hold in common, cut into equal shares at row boundaries: a share is a few whole layers and two cut ones, so that
captured factors travel to few ranks. Integers only; the exact cover is proved before anything runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import Layout, Projection
from qkov_dist.layout.rects import Rect, check_exact_cover

from .placements import HeldRects
from .sharding import parameter_name, parameters_of


@dataclass(frozen=True)
class Ownership:
    """What every rank owns of every parameter, weights as [out, in].

    Attributes:
        held: Parameter name -> each rank's held rectangles, by rank.
        owned: Parameter name -> each rank's owned rectangles, by rank.
    """

    held: Mapping[str, tuple[HeldRects, ...]]
    owned: Mapping[str, tuple[HeldRects, ...]]

    def of_rank(self, projection: Projection, bias: bool, rank: int) -> HeldRects:
        """What a rank owns of a projection's weight or bias."""
        return self.owned[parameter_name(projection, bias)][rank]

    @property
    def digest(self) -> str:
        """A short hash of what every rank owns; equal for equal cuts."""
        bounds = {name: [[r.bounds for r in rects] for rects in by_rank] for name, by_rank in self.owned.items()}
        return hashlib.sha256(json.dumps(bounds, sort_keys=True).encode()).hexdigest()[:16]


def assign(layout: Layout, layers: Sequence[int], held_by_rank: Sequence[Mapping[str, list[list[int]]]]) -> Ownership:
    """Deal out what replicas hold in common, and prove that every element has exactly one owner.

    Args:
        layout: The projections.
        layers: The layers to own.
        held_by_rank: :func:`qkov_dist.distributed.sharding.held_parameters` of every rank.

    Raises:
        QkovError: for a gap or an overlap; names the parameter and the ranks.
    """
    rects: dict[tuple[tuple[int, ...], ...], HeldRects] = {}  # those that are equal are one object: layers are alike
    columns: dict[tuple[int, ...], tuple[HeldRects, ...]] = {}
    held = {}
    for name in (parameter_name(projection, bias) for projection, bias in parameters_of(layout, layers)):
        bounds = [tuple(map(tuple, of_rank[name])) for of_rank in held_by_rank]
        rects |= {one: tuple(Rect(*of_one) for of_one in one) for one in {*bounds} - rects.keys()}
        by_rank = tuple(rects[one] for one in bounds)
        held[name] = columns.setdefault(tuple(map(id, by_rank)), by_rank)
    return deal_out(layout, layers, held)


def deal_out(layout: Layout, layers: Sequence[int], held: Mapping[str, tuple[HeldRects, ...]]) -> Ownership:
    """The same of rectangles.

    Args:
        layout: The projections.
        layers: The layers to own.
        held: Parameter name -> each rank's held rectangles, by rank.

    Raises:
        QkovError: for a gap or an overlap; names the parameter and the ranks.
    """
    num_ranks = len(next(iter(held.values()), ()))
    owned: dict[str, list[HeldRects]] = {name: [()] * num_ranks for name in held}
    families: dict[tuple[int, ...], list[tuple[str, HeldRects]]] = {}
    known: dict[int, list[tuple[HeldRects, tuple[int, ...]]]] = {}  # of what several parameters have in common
    for name, by_rank in held.items():
        if id(by_rank) not in known:
            known[id(by_rank)] = _replicas(by_rank)
        for rects, replicas in known[id(by_rank)]:
            if len(replicas) == 1:
                owned[name][replicas[0]] = rects
            else:
                families.setdefault(replicas, []).append((name, rects))
    for replicas, in_common in families.items():
        for place, name, band in _deal(in_common, len(replicas)):
            owned[name][replicas[place]] = (*owned[name][replicas[place]], band)
    proved: dict[tuple[Rect, tuple[int, ...]], tuple[HeldRects, ...]] = {}
    found = {}
    for projection, bias in parameters_of(layout, layers):
        name, whole = parameter_name(projection, bias), projection.whole(bias)
        if (key := (whole, tuple(map(id, owned[name])))) not in proved:
            _check_cover(name, whole, owned[name])
            proved[key] = tuple(owned[name])
        found[name] = proved[key]
    return Ownership(held, found)


def _replicas(by_rank: Sequence[HeldRects]) -> list[tuple[HeldRects, tuple[int, ...]]]:
    """What is held of one parameter, and the ranks that hold the very same."""
    found: dict[HeldRects, list[int]] = {}
    for rank, rects in enumerate(by_rank):
        if rects:
            found.setdefault(rects, []).append(rank)
    return [(rects, tuple(ranks)) for rects, ranks in found.items()]


def _deal(in_common: list[tuple[str, HeldRects]], num_ranks: int) -> Iterator[tuple[int, str, Rect]]:
    """Cut a sequence of rectangles into shares of about equal area, at row boundaries: (whose share, name, band)."""
    total = sum(rect.area for _, rects in in_common for rect in rects)
    done = 0
    for name, rects in in_common:
        for rect in rects:
            num_rows, width = rect.shape
            first = -(-(done + 1) * num_ranks // total) - 1  # share that does not end before this rectangle
            for share in range(first, num_ranks):
                low, high = (max(-(-(total * n // num_ranks - done) // width), 0) for n in (share, share + 1))
                if low >= num_rows:
                    break
                if low < high:
                    band = Rect(rect.row + low, rect.row + min(high, num_rows), rect.col, rect.col_end)
                    yield share, name, band
            done += rect.area


def _check_cover(name: str, whole: Rect, by_rank: Sequence[HeldRects]) -> None:
    try:
        check_exact_cover(name, whole, [rect for rects in by_rank for rect in rects])
    except QkovError as error:
        owners = {rank: [str(rect.bounds) for rect in rects] for rank, rects in enumerate(by_rank) if rects}
        raise QkovError(
            f"{name}, ranks {', '.join(map(str, owners))}",
            expected=error.expected,
            got=f"{error.got}; owned {owners}",
            remedy=error.remedy,
        ) from error


Owned = Callable[[Projection, bool], tuple[Rect, ...]]
