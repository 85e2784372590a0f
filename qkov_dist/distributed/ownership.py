"""Dealing out what ranks hold, so that every element of every weight is owned by exactly one of them.

Ranks that hold the very same rectangles are replicas of each other. They share the sequence of all parameters that they
hold in common, cut into equal shares at row boundaries: a share is a few whole layers and two cut ones, so that
captured factors travel to few ranks. Integers only; the exact cover is proved before anything runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
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
    names = [(projection, bias, parameter_name(projection, bias)) for projection, bias in parameters_of(layout, layers)]
    everything = {n: tuple(tuple(Rect(*r) for r in rank[n]) for rank in held_by_rank) for _, _, n in names}
    owned: dict[str, list[HeldRects]] = {name: [()] * len(held_by_rank) for name in everything}
    families: dict[tuple[int, ...], list[tuple[str, HeldRects]]] = {}
    for name, by_rank in everything.items():
        for rects in dict.fromkeys(by_rank):
            if rects:
                replicas = tuple(rank for rank, other in enumerate(by_rank) if other == rects)
                families.setdefault(replicas, []).append((name, rects))
    for replicas, in_common in families.items():
        for rank, of_rank in zip(replicas, _deal(in_common, len(replicas)), strict=True):
            for name, rects in of_rank:
                owned[name][rank] = (*owned[name][rank], *rects)
    for projection, bias, name in names:
        _check_cover(name, projection.whole(bias), owned[name])
    return Ownership(everything, {name: tuple(by_rank) for name, by_rank in owned.items()})


def _deal(in_common: list[tuple[str, HeldRects]], num_ranks: int) -> list[list[tuple[str, HeldRects]]]:
    """Cut a sequence of rectangles into shares of about equal area, at row boundaries."""
    total = sum(rect.area for _, rects in in_common for rect in rects)
    dealt: list[list[tuple[str, HeldRects]]] = [[] for _ in range(num_ranks)]
    done = 0
    for name, rects in in_common:
        for rect in rects:
            width = rect.shape[1]
            cuts = [min(max(-(-(total * n // num_ranks - done) // width), 0), rect.shape[0]) for n in range(num_ranks)]
            for n, (low, high) in enumerate(zip(cuts, [*cuts[1:], rect.shape[0]], strict=True)):
                if low < high:
                    band = Rect(rect.row + low, rect.row + high, rect.col, rect.col_end)
                    dealt[n].append((name, (band,)))
            done += rect.area
    return dealt


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
