"""Ownership on integers, for simulated ranks and meshes; no process is started."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from zoo import TINY

from qkov_dist.config import ParallelConfig
from qkov_dist.distributed.ownership import assign
from qkov_dist.distributed.parallelism import Parallelism, resolve_parallelism
from qkov_dist.distributed.placements import (
    Placement,
    held_by_flat_partition,
    held_by_placements,
    intervals_by_placements,
    placements_of,
    shard_interval,
)
from qkov_dist.distributed.sharding import parameter_name, parameters_of
from qkov_dist.distributed.topology import deal_samples
from qkov_dist.errors import QkovError
from qkov_dist.layout.rects import Rect, check_exact_cover
from qkov_dist.layout.resolve import resolve
from qkov_dist.loading.architecture import meta_model

SIZES = st.integers(1, 40)
AXES = st.integers(1, 6)


@given(size=SIZES, num=AXES)
def test_shards_of_a_dim_are_those_of_torch_chunk(size, num):
    import torch

    chunks = [len(chunk) for chunk in torch.arange(size).chunk(num)]
    lengths = [high - low for low, high in (shard_interval(size, num, c) for c in range(num))]
    assert lengths == chunks + [0] * (num - len(chunks))


def mesh(shape, axes):
    """What each rank of a two-axis mesh holds; ``axes`` are (dim, late) per axis."""
    sizes = (2, 3)
    return [
        held_by_placements(shape, [Placement(n, c, *axis) for n, c, axis in zip(sizes, place, axes, strict=True)])
        for place in ((i, j) for i in range(sizes[0]) for j in range(sizes[1]))
    ]


@given(rows=SIZES, cols=SIZES)
@pytest.mark.parametrize("axes", [((0, False), (1, False)), ((0, True), (0, False)), ((1, False), (0, False))])
def test_shards_on_a_mesh_cover_the_weight_exactly_once(rows, cols, axes):
    pieces = [rect for held in mesh((rows, cols), axes) for rect in held]
    check_exact_cover("weight", Rect.of_shape(rows, cols), pieces)


def test_fully_sharded_rows_are_cut_inside_the_tensor_parallel_shard():
    held = mesh((12, 4), ((0, True), (0, False)))
    assert held[0] == (Rect(0, 2, 0, 4),)  # fsdp 0 of tp 0
    assert held[3] == (Rect(2, 4, 0, 4),)  # fsdp 1 of tp 0
    assert held[1] == (Rect(4, 6, 0, 4),)  # fsdp 0 of tp 1


KINDS = {
    "both replicate": (Replicate(), Replicate()),
    "fsdp": (Shard(0), Replicate()),
    "tp columns": (Replicate(), Shard(1)),
    "rows and columns": (Shard(0), Shard(1)),
    "rows twice": (Shard(0), Shard(0)),
    "fsdp inside tp": (_StridedShard(0, split_factor=3), Shard(0)),
}


class Mesh:
    """One place of a mesh of 4 x 3 ranks."""

    ndim = 2

    def __init__(self, place: tuple[int, int]) -> None:
        self.place = place

    def size(self, axis: int) -> int:
        return (4, 3)[axis]

    def get_coordinate(self) -> list[int]:
        return list(self.place)


@given(rows=SIZES, cols=SIZES, place=st.tuples(st.integers(0, 3), st.integers(0, 2)))
@pytest.mark.parametrize("kind", KINDS)
def test_shards_lie_where_torch_says_that_they_do(kind, rows, cols, place):
    rows *= 3  # heads are cut evenly by tensor parallelism; where it is uneven torch's own word is not what FSDP2 does
    tensor = SimpleNamespace(ndim=2, device_mesh=Mesh(place), placements=KINDS[kind])
    intervals = intervals_by_placements((rows, cols), placements_of(tensor))
    shape, offset = _compute_local_shape_and_global_offset((rows, cols), (4, 3), list(place), KINDS[kind])
    assert tuple(stop - start for start, stop in intervals) == shape
    if 0 not in shape:
        assert tuple(start for start, _ in intervals) == offset


@given(rows=SIZES, cols=SIZES, num=AXES)
def test_flat_partitions_cover_the_weight_in_at_most_three_rectangles(rows, cols, num):
    size = -(-rows * cols // num)
    held = [held_by_flat_partition((rows, cols), size, index) for index in range(num)]
    assert all(len(rects) <= 3 for rects in held)
    check_exact_cover("weight", Rect.of_shape(rows, cols), [rect for rects in held for rect in rects])


LAYOUT = resolve(meta_model(TINY["llama"].config()))
LAYERS = [0, 1]


def held_of(cut) -> dict[str, list[list[int]]]:
    """What a rank holds, when ``cut`` says it of a weight of this many rows and columns."""
    found = {}
    for projection, bias in parameters_of(LAYOUT, LAYERS):
        rows, cols = projection.shape[0], 1 if bias else projection.shape[1]
        found[parameter_name(projection, bias)] = [list(rect.bounds) for rect in cut(rows, cols)]
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_replicas_share_the_work_evenly_and_each_holds_few_layers(world_size):
    ownership = assign(LAYOUT, LAYERS, [held_of(lambda r, c: [Rect.of_shape(r, c)])] * world_size)
    loads = [
        sum(rect.area for by_rank in ownership.owned.values() for rect in by_rank[rank]) for rank in range(world_size)
    ]
    assert sum(loads) == 2 * 6144
    assert max(loads) - min(loads) <= 2 * 64  # a row each
    if world_size == 2:
        names = [{n for n, by_rank in ownership.owned.items() if by_rank[rank]} for rank in range(2)]
        assert all("layers.0" in name for name in names[0])
        assert all("layers.1" in name for name in names[1])


def test_replicas_of_shards_share_their_shard():
    halves = [held_of(lambda r, c, n=n: [Rect(*shard_interval(r, 2, n), 0, c)]) for n in (0, 1, 0, 1)]
    ownership = assign(LAYOUT, LAYERS, halves)
    for name, by_rank in ownership.owned.items():
        for rank in range(4):
            for rect in by_rank[rank]:
                (shard,) = ownership.held[name][rank]
                assert rect.intersect(shard) == rect


def test_a_gap_names_the_parameter_and_the_ranks():
    held = [held_of(lambda r, c, n=n: [Rect(*shard_interval(r, 3, n), 0, c)]) for n in (0, 1)]
    with pytest.raises(
        QkovError, match=r"layers.0.self_attn.q_proj.weight, ranks 0, 1: expected 2048 covered elements"
    ):
        assign(LAYOUT, LAYERS, held)


def test_an_overlap_names_the_parameter_and_the_ranks():
    held = [held_of(lambda r, c, n=n: [Rect(n * (r // 2 - 1), r // 2 + n * (r // 2), 0, c)]) for n in (0, 1)]
    with pytest.raises(QkovError, match=r"q_proj.weight, ranks 0, 1: expected disjoint pieces"):
        assign(LAYOUT, LAYERS, held)


@given(lengths=st.lists(st.integers(1, 100), max_size=30), size=AXES)
def test_every_sample_is_run_by_exactly_one_rank_of_a_dp_group(lengths, size):
    dealt = deal_samples(lengths, size)
    assert sorted(n for numbers in dealt for n in numbers) == list(range(len(lengths)))
    loads = [sum(lengths[n] for n in numbers) for numbers in dealt]
    assert max(loads) - min(loads) <= max(lengths, default=0)


HYBRID = {
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    **{f"PARALLELISM_CONFIG_{name}_SIZE": "2" for name in ("DP_REPLICATE", "DP_SHARD", "TP")},
}
TOKENS = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


@pytest.mark.parametrize(
    ("config", "world_size", "environment", "expected"),
    [
        ({}, 1, {}, Parallelism(1, "none", 1)),
        ({}, 4, {}, Parallelism(1, "ddp", 4)),
        ({"tp": 2}, 4, {}, Parallelism(2, "ddp", 2)),
        ({"tp": 4}, 4, {}, Parallelism(4, "none", 1)),
        ({"tp": 2, "shard": "fsdp"}, 4, {}, Parallelism(2, "fsdp", 2)),
        ({}, 2, {"ACCELERATE_USE_FSDP": "true"}, Parallelism(1, "fsdp", 2)),
        ({}, 2, ZERO3, Parallelism(1, "zero3", 2)),
        ({"shard": "ddp"}, 2, {"ACCELERATE_USE_FSDP": "true"}, Parallelism(1, "ddp", 2)),
        ({"shard": "device_map"}, 1, {}, Parallelism(1, "device_map", 1)),
        ({"shard": "zero3"}, 1, {}, Parallelism(1, "none", 1)),
        ({"shard": "fsdp", "replicate": 2, "tp": 2}, 8, {}, Parallelism(2, "fsdp", 4, copies=2)),
        ({"replicate": 2}, 4, {}, Parallelism(1, "fsdp", 4, copies=2)),
        ({"shard": "fsdp", "replicate": 4}, 4, {}, Parallelism(1, "ddp", 4)),
        ({}, 8, HYBRID, Parallelism(2, "fsdp", 4, copies=2)),
        ({"ep": 2}, 4, {}, Parallelism(2, "ddp", 2, experts=2, whole=True)),
        ({"ep": 2, "tp": 2}, 2, {}, Parallelism(2, "none", 1, experts=2)),
        ({"ep": 4, "tp": 2, "shard": "fsdp"}, 4, {}, Parallelism(2, "fsdp", 2, experts=4)),
        ({"ep": 2, "shard": "fsdp", "replicate": 2}, 4, {}, Parallelism(1, "fsdp", 4, copies=2, experts=2)),
        ({"cp": 2}, 4, {}, Parallelism(1, "ddp", 4, context=2)),
        ({"cp": 2, "shard": "fsdp", "replicate": 2}, 4, {}, Parallelism(1, "fsdp", 4, copies=2, context=2)),
        ({}, 4, TOKENS | {"PARALLELISM_CONFIG_CP_SIZE": "2"}, Parallelism(1, "fsdp", 4, context=2)),
        ({"cp": 4}, 4, TOKENS | {"PARALLELISM_CONFIG_CP_SIZE": "2"}, Parallelism(1, "fsdp", 4, context=4)),
        ({}, 4, TOKENS | ZERO3 | {"PARALLELISM_CONFIG_SP_SIZE": "4"}, Parallelism(1, "zero3", 4, context=4)),
    ],
)
def test_the_launcher_decides_where_nothing_is_set(config, world_size, environment, expected):
    assert resolve_parallelism(ParallelConfig(**config), world_size, environment) == expected


@pytest.mark.parametrize(
    ("config", "world_size", "message"),
    [
        ({"tp": 3}, 4, "parallel.tp: expected a divisor of the 4 ranks, got 3"),
        ({"shard": "none"}, 2, "expected a way to use 2 ranks"),
        ({"shard": "device_map"}, 2, "expected a way to use 2 ranks"),
        ({"tp": 2, "shard": "zero3"}, 4, "tensor and expert parallelism alone or with ddp or fsdp"),
        ({"ep": 2, "shard": "zero3"}, 4, "tensor and expert parallelism alone or with ddp or fsdp"),
        ({"shard": "zero3", "replicate": 2}, 4, "parallel.replicate: expected 1, or with shard: fsdp"),
        ({"shard": "fsdp", "replicate": 3}, 4, "parallel.replicate: expected .* a divisor of the ranks"),
        ({"ep": 3}, 4, "parallel.ep: expected a multiple of parallel.tp"),
        ({"ep": 4, "tp": 2, "shard": "ddp"}, 4, "parallel.ep: expected a multiple of parallel.tp"),
        ({"ep": 4, "shard": "fsdp", "replicate": 2}, 4, "parallel.ep: expected a multiple of parallel.tp"),
        ({"ep": 2, "shard": "none"}, 4, "parallel.ep: expected a multiple of parallel.tp"),
        ({"cp": 3}, 4, "parallel.cp: expected a divisor of the 4 ranks, got 3"),
        ({"cp": 2, "tp": 2}, 4, "parallel.cp: expected 1, or .* got cp: 2 with shard: auto, tp: 2, ep: 1"),
        ({"cp": 2, "ep": 2}, 4, "parallel.cp: expected 1, or .* got cp: 2 with shard: auto, tp: 1, ep: 2"),
        ({"cp": 2, "shard": "device_map"}, 2, "parallel.cp: expected 1, or ranks"),
    ],
)
def test_what_cannot_be_arranged_is_refused(config, world_size, message):
    with pytest.raises(QkovError, match=message):
        resolve_parallelism(ParallelConfig(**config), world_size, {})
