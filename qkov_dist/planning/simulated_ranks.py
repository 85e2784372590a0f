"""Ranks that are not there: what each would hold of a model, see of it, and own, by the rules of those that cut it.

Ranks count tensor-parallel places first, as transformers' device mesh does: rank = replica * tp + place, and of hybrid
sharding replica = copy * shards + shard. Experts lie over the same ranks of a copy, their places first. Where a rank of
a real run is described by what it finds in its memory (``distributed.sharding``), these are by the same integers.

    style of transformers' plan   dim of a matrix that tensor parallelism cuts    of a vector
    *colwise*                     that of the outputs, the last but one           its only one
    *rowwise*                     that of the inputs, the last                    none: every rank holds it
    embedding_rowwise, _colwise   the vocabulary's, the width's
    all others, and none          none
"""

from __future__ import annotations

from collections.abc import Sequence

from qkov_dist.distributed.ownership import deal_out
from qkov_dist.distributed.parallelism import SHARDED, Parallelism
from qkov_dist.distributed.placements import (
    HeldRects,
    Placement,
    held_by_flat_partition,
    held_by_placements,
    intervals_by_placements,
)
from qkov_dist.distributed.sharding import parameter_name, parameters_of
from qkov_dist.distributed.topology import Topology
from qkov_dist.layout.heads import Layout, Projection, Site
from qkov_dist.layout.rects import Rect

from .model_sizes import ModelSizes, Weight
from .workload import SimulatedWorld


def simulated_topologies(
    model_sizes: ModelSizes, layout: Layout, layers: Sequence[int], parallelism: Parallelism
) -> list[Topology]:
    """Every rank's topology.

    Args:
        model_sizes: The model.
        layout: Its projections.
        layers: The layers to own.
        parallelism: How it is cut.
    """
    tp, size = parallelism.tp, parallelism.tp * parallelism.replicas
    held = _held_by_rank(model_sizes, layout, layers, parallelism)
    owned = None if size == 1 else deal_out(layout, layers, held)
    cut = tp > 1 and not parallelism.whole
    seen = [_seen(model_sizes, layout, layers, tp, place) if cut else {} for place in range(tp)]
    dp_ranks = [tuple(range(place, size, tp)) for place in range(tp)]
    return [
        Topology(
            world=SimulatedWorld(rank, size),
            dp_group=SimulatedWorld(rank // tp, parallelism.replicas),
            dp_ranks=dp_ranks[rank % tp],
            ownership=owned,
            tp_rects=seen[rank % tp],
            gathers_weights=_keeps_step(parallelism),
        )
        for rank in range(size)
    ]


def local_shape(weight: Weight, parallelism: Parallelism, rank: int, *, gathered: bool = False) -> tuple[int, ...]:
    """The shape of what a rank holds of a weight; ``gathered``: of what it works with in a pass.

    ZeRO-3 pads the last partition, so that all are of one length.
    """
    if parallelism.data == "zero3" and parallelism.replicas > 1 and not gathered:
        return (-(-weight.numel // parallelism.replicas),)
    placements = _placements(weight.style, len(weight.shape), parallelism, rank, expert=weight.expert)
    intervals = intervals_by_placements(weight.shape, placements[:1] if gathered else placements)
    return tuple(stop - start for start, stop in intervals)


def _placements(
    style: str | None, num_dims: int, parallelism: Parallelism, rank: int, *, expert: bool = False
) -> list[Placement]:
    """How tensor or expert parallelism cuts a tensor, and FSDP2 what is left."""
    tp, shards = parallelism.tp, parallelism.shards
    within, num_parts = rank % (shards * tp), tp  # a copy's ranks, counted in parts of a pass
    dim = _cut_dim(style, num_dims) if tp > 1 and not parallelism.whole else None
    if expert and parallelism.experts > 1:
        num_parts, dim = parallelism.experts, 0
    shard, place = divmod(within, num_parts)
    cut = [Placement(num_parts, place, dim)]
    if parallelism.data == "fsdp" and num_dims:
        cut.append(Placement(shards * tp // num_parts, shard, 0, late=True))
    return cut


def _keeps_step(parallelism: Parallelism) -> bool:
    """Whether all ranks have to pass together: also where transformers makes replicas of tensor-parallel groups."""
    return parallelism.replicas > 1 and (parallelism.data in SHARDED or parallelism.tp > 1)


def _cut_dim(style: str | None, num_dims: int) -> int | None:
    """The storage dim that tensor parallelism cuts; see the table above."""
    if style in ("embedding_rowwise", "embedding_colwise"):
        return int(style == "embedding_colwise")
    if style is None or not num_dims:
        return None
    if "colwise" in style:
        return max(num_dims - 2, 0)
    return num_dims - 1 if "rowwise" in style and num_dims > 1 else None


def _held(
    model_sizes: ModelSizes, projection: Projection, bias: bool, parallelism: Parallelism, rank: int
) -> HeldRects:
    """What a rank would hold of a projection's weight or bias, [out, in]."""
    shape = (projection.whole(bias) if bias else projection.stored(projection.whole())).shape
    if parallelism.data == "zero3" and parallelism.replicas > 1:
        rects = held_by_flat_partition(shape, -(-shape[0] * shape[1] // parallelism.replicas), rank // parallelism.tp)
    else:
        style = model_sizes.styles.get(projection.module)
        rects = held_by_placements(shape, _placements(style, 1 if bias else 2, parallelism, rank))
    return rects if bias else tuple(map(projection.stored, rects))


def _seen(model_sizes: ModelSizes, layout: Layout, layers: Sequence[int], tp: int, place: int) -> dict[Site, Rect]:
    """The tensor-parallel shard of each projection that a rank works with."""
    alone = Parallelism(tp, "none", 1)
    return {
        Site(index, projection.module): (_held(model_sizes, projection, False, alone, place) or (Rect(0, 0, 0, 0),))[0]
        for index in layers
        for projection in layout.layer(index).projections
    }


def _held_by_rank(
    model_sizes: ModelSizes, layout: Layout, layers: Sequence[int], parallelism: Parallelism
) -> dict[str, tuple[HeldRects, ...]]:
    """What every rank would hold of each parameter; parameters that are cut alike share one tuple."""
    size = parallelism.tp * parallelism.replicas
    known: dict[tuple[object, ...], tuple[HeldRects, ...]] = {}
    held = {}
    for projection, bias in parameters_of(layout, layers):
        kind = projection.shape, projection.transposed, bias, model_sizes.styles.get(projection.module)
        if kind not in known:
            known[kind] = tuple(_held(model_sizes, projection, bias, parallelism, rank) for rank in range(size))
        held[parameter_name(projection, bias)] = known[kind]
    return held
