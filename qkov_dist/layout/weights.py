"""A weight as it lies in this process: whether it can be changed in place, and regions of it that are, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .heads import Projection
from .rects import Rect


def is_plain(weight: object) -> bool:
    """Whether a weight is an ordinary dense floating tensor that can be nudged in place."""
    return (
        isinstance(weight, Tensor)
        and type(weight.detach()) is Tensor
        and weight.is_floating_point()
        and weight.device.type != "meta"
        and not is_sharded(weight)
    )


def is_sharded(weight: object) -> bool:
    """Whether this process holds only a part of a weight (DTensor placements, ZeRO-3 partitions)."""
    return hasattr(weight, "placements") or hasattr(weight, "ds_id")


def region_of(linear: nn.Module, projection: Projection, rect: Rect) -> Tensor:
    """A view of a rectangle of a plain weight, [out, in] however it is stored; changes of it change the weight."""
    stored = projection.stored(rect)
    region = linear.get_parameter("weight").detach()[stored.rows, stored.cols]
    return region.T if projection.transposed else region


@contextmanager
def changed(regions: Iterable[Tensor], change: Callable[[Tensor], object]) -> Iterator[None]:
    """Change regions of weights in place; at the end what they were is copied back exactly."""
    saved = [(region, region.detach().clone()) for region in regions]
    try:
        with torch.no_grad():
            for region, _ in saved:
                change(region)
        yield
    finally:
        with torch.no_grad():
            for region, values in saved:
                region.copy_(values)
