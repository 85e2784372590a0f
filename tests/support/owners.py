"""Who owns which elements where ranks are only pretended."""

from __future__ import annotations

from qkov_dist.layout.heads import Projection
from qkov_dist.layout.rects import Rect, rects_of_flat_interval


def flat_owner(rank: int, world_size: int):
    def owned(projection: Projection, bias: bool) -> tuple[Rect, ...]:
        cols = 1 if bias else projection.shape[1]
        size = projection.shape[0] * cols
        return rects_of_flat_interval(size * rank // world_size, size * (rank + 1) // world_size, cols)

    return owned
