"""Many ranks on integers: who owns what of thousands, and what ranks send beside the least that they could."""

from __future__ import annotations

import json

import numpy as np
import pytest
from workloads import work_of
from zoo import TINY

from qkov_dist.capture.forms import gradients_above, shared_inputs
from qkov_dist.config import ModelConfig, ParallelConfig
from qkov_dist.distributed.parallelism import resolve_parallelism
from qkov_dist.distributed.sharding import parameter_name, parameters_of
from qkov_dist.layout.heads import AttentionLayer, Layout, Projection, Site
from qkov_dist.layout.rects import Rect
from qkov_dist.layout.resolve import resolve
from qkov_dist.planning.cost import total
from qkov_dist.planning.described import described_model
from qkov_dist.planning.model_sizes import ModelSizes, model_sizes_of
from qkov_dist.planning.run_plan import plan_simulated
from qkov_dist.planning.simulated_ranks import simulated_topologies
from qkov_dist.planning.workload import Dealt, Workload

RANKS = 4096
LARGE = {
    "num_hidden_layers": 3,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 1000,
}
CUTS = {
    "ddp": {"shard": "ddp"},
    "fsdp": {"shard": "fsdp"},
    "hybrid": {"shard": "fsdp", "replicate": 32},
    "tp, fsdp": {"tp": 8, "shard": "fsdp"},
    "tp, hybrid": {"tp": 8, "shard": "fsdp", "replicate": 32},
    "tp, ddp": {"tp": 8, "shard": "ddp"},
    "zero3": {"shard": "zero3"},
}


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[ModelSizes, Layout]:
    """Layers as wide as those of Llama-3 405B."""
    path = tmp_path_factory.mktemp("large") / "model.json"
    path.write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16", **LARGE}))
    model = described_model(ModelConfig(path=str(path)))
    layout = resolve(model)
    return model_sizes_of(model, layout), layout


def times_owned(whole: Rect, pieces: list[Rect]) -> np.ndarray:
    """How often each element is owned, on the grid of all edges: an oracle that compares no two rectangles."""
    rows = np.unique([edge for rect in (whole, *pieces) for edge in (rect.row, rect.row_end)])
    cols = np.unique([edge for rect in (whole, *pieces) for edge in (rect.col, rect.col_end)])
    steps = np.zeros((len(rows), len(cols)), np.int64)
    for rect in pieces:
        (r, r_end), (c, c_end) = (
            np.searchsorted(rows, rect.bounds[:2]).tolist(),
            np.searchsorted(cols, rect.bounds[2:]).tolist(),
        )
        steps[r, c] += 1
        steps[r_end, c_end] += 1
        steps[r, c_end] -= 1
        steps[r_end, c] -= 1
    return steps.cumsum(0).cumsum(1)[:-1, :-1]


@pytest.mark.parametrize("cut", CUTS)
def test_each_element_has_one_owner_among_4096_ranks(cut, large):
    model_sizes, layout = large
    parallelism = resolve_parallelism(ParallelConfig(**CUTS[cut]), RANKS, {})
    topologies = simulated_topologies(model_sizes, layout, range(3), parallelism)
    ownership = topologies[0].ownership
    loads = np.zeros(RANKS, np.int64)
    for projection, bias in parameters_of(layout, range(3)):
        by_rank = ownership.owned[parameter_name(projection, bias)]
        pieces = [rect for rects in by_rank for rect in rects]
        assert (times_owned(projection.whole(bias), pieces) == 1).all()
        assert not (times_owned(projection.whole(bias), [*pieces, pieces[-1]]) == 1).all()
        loads += [sum(rect.area for rect in rects) for rects in by_rank]
        for mine, held in zip(by_rank, ownership.held[parameter_name(projection, bias)], strict=True):
            assert all(any(rect.intersect(one) == rect for one in held) for rect in mine)
    assert loads.sum() == sum(p.whole(b).area for p, b in parameters_of(layout, range(3)))
    assert loads.max() <= loads.mean() + 16384 * 4 * 3  # a row of each weight, where a share ends inside one
    assert all(topology.ownership is ownership for topology in topologies)


SMALL = {
    "ddp": (5, {"shard": "ddp"}),
    "fsdp": (3, {"shard": "fsdp"}),
    "hybrid": (6, {"shard": "fsdp", "replicate": 2}),
    "tp, fsdp": (6, {"tp": 2, "shard": "fsdp"}),
    "tp, hybrid": (8, {"tp": 2, "shard": "fsdp", "replicate": 2}),
    "tp, ddp": (4, {"tp": 2, "shard": "ddp"}),
    "zero3": (5, {"shard": "zero3"}),
    "zero3, less than a row each": (90, {"shard": "zero3"}),
    "ep": (4, {"ep": 2}),
    "ep, tp, fsdp": (4, {"ep": 4, "tp": 2, "shard": "fsdp"}),
}
EXACT = tuple(cut for cut in SMALL if "less" not in cut)


def planned(cut: str, model: str, **sections: object) -> tuple[int, int, int]:
    """Bytes of factors that are sent as planned, the least as planned, and by elements."""
    num_ranks, parallel = SMALL[cut]
    work = work_of(TINY[model].build(), model, **sections)
    parallelism = resolve_parallelism(ParallelConfig(**parallel), num_ranks, {})
    every = total(plan_simulated(work, parallelism).costs)
    return every.sent_factors, every.least_factors, least_by_elements(work, parallelism)


def least_by_elements(work: Workload, parallelism) -> int:
    """Every element that a rank scores, in every weight, marks the features that it needs of others' samples."""
    topologies = simulated_topologies(work.model_sizes, work.layout, work.layers, parallelism)
    dealt = Dealt(work, parallelism.replicas, gathers_weights=topologies[0].gathers_weights)
    needed = 0
    for topology in topologies:
        mine = topology.dp_group.rank
        lengths = [n for place, of_one in enumerate(dealt.lengths) if place != mine for n in of_one]
        for layer in map(work.layout.layer, work.layers):
            needed += _needed(work, layer, topology.owned(), lengths)
    return needed


def _needed(work: Workload, layer: AttentionLayer, owned, lengths: list[int]) -> int:
    size, above, needed = work.scoring.factor_itemsize, gradients_above([layer], work.scoring.factor_itemsize), 0
    scored = {Site(layer.index, p.module): _scored(work, layer, p, owned) for p in layer.projections}
    for sharing in shared_inputs(layer):
        sites = [site for site, _ in sharing]
        tokens = sum(n for n in lengths if n <= above[sites[0]])
        wholes = sum(n > above[sites[0]] for n in lengths)
        needed += size * tokens * int(sum(scored[site][:, :-1].any(0) for site in sites).astype(bool).sum())
        for of_site in (scored[site] for site in sites):
            needed += size * tokens * int(of_site.any(1).sum()) + 4 * wholes * int(of_site.sum())
    return needed


def _scored(work: Workload, layer: AttentionLayer, projection: Projection, owned) -> np.ndarray:
    """The elements of a weight, and of its bias in a last column, that a rank scores."""
    is_scored, is_owned = (np.zeros((projection.shape[0], projection.shape[1] + 1), bool) for _ in range(2))
    for piece in projection.slices:
        group = layer.group if piece.block in "KV" else 1
        if work.config.metric.heads is None or piece.head in {head // group for head in work.config.metric.heads}:
            is_scored[piece.rect.rows, piece.rect.cols] = True
            is_scored[piece.rect.rows, -1] |= work.config.metric.include_bias and piece.block != "O"
    for rect in owned(projection, False):
        is_owned[rect.rows, rect.cols] = True
    for rect in owned(projection, True) if projection.has_bias else ():
        is_owned[rect.rows, -1] = True
    return is_scored & is_owned


CASES = [
    *((cut, "qwen3_moe" if "ep" in cut else "llama") for cut in SMALL),
    *((cut, "qwen2") for cut in SMALL if "ep" not in cut),  # its Q, K and V have biases
]


@pytest.mark.parametrize(("cut", "model"), CASES)
@pytest.mark.parametrize("bias", [False, True])
def test_the_least_that_is_sent_is_that_of_every_element(cut, model, bias):
    sent, least, by_elements = planned(cut, model, metric={"layers": None, "include_bias": bias})
    assert least == by_elements > 0
    assert sent == least if cut in EXACT else least < sent < 2 * least


def test_of_samples_that_are_kept_as_gradients_a_bias_goes_along():
    sent, least, by_elements = planned("fsdp", "llama", tokens=60)
    assert least == by_elements
    assert least < sent < 1.04 * least  # one number more than the 32 or 64 of a row


@pytest.mark.parametrize("cut", [cut for cut in EXACT if "ep" not in cut])
def test_nothing_is_sent_for_heads_that_are_not_scored(cut):
    alone, least, by_elements = planned(cut, "llama", metric={"layers": None, "heads": [1]})
    assert alone == least == by_elements
    assert alone < 0.7 * planned(cut, "llama")[0]
    apart, least, by_elements = planned(cut, "llama", metric={"layers": None, "heads": [0, 3]})
    assert apart >= least == by_elements  # what lies between two heads of one owner goes along
