"""Plans against what runs really hold, send and compute: tiny models, in this process and on real ranks."""

from __future__ import annotations

import math
import warnings
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from running import settings
from samples import mixed_samples, write_task
from torch.utils.flop_counter import FlopCounterMode
from workloads import work_of
from zoo import TINY, VOCAB

from qkov_dist.capture.collect import Collection
from qkov_dist.capture.forms import factor_bytes, shared_inputs
from qkov_dist.capture.hooks import capture
from qkov_dist.capture.store import FactorStore
from qkov_dist.config import ParallelConfig
from qkov_dist.config_file import from_dict
from qkov_dist.data.batches import make_batches
from qkov_dist.distributed.connect import current
from qkov_dist.distributed.ownership import assign
from qkov_dist.distributed.parallelism import Parallelism, resolve_parallelism
from qkov_dist.errors import QkovError
from qkov_dist.job import Job, prepare
from qkov_dist.layout.heads import Site
from qkov_dist.layout.resolve import resolve
from qkov_dist.planning.capture_cost import CaptureCost
from qkov_dist.planning.cost import Cost, total
from qkov_dist.planning.described import made_up_task
from qkov_dist.planning.hardware import GPU_OVERHEAD, hardware
from qkov_dist.planning.measured import Measured, comparison_lines
from qkov_dist.planning.rank_work import layer_work
from qkov_dist.planning.run_plan import RunPlan, plan_of_job, plan_simulated, workload_of
from qkov_dist.planning.scoring_cost import ScoringCost
from qkov_dist.planning.simulated_ranks import local_shape, simulated_topologies
from qkov_dist.planning.time_model import PHASES, Phase, expected
from qkov_dist.planning.workload import Dealt, SimulatedWorld, Workload
from qkov_dist.results.metadata import LayerAxes
from qkov_dist.results.partial_schema import BlockPartial, LayerPartial
from qkov_dist.results.reduce import add_dealt, deal_heads
from qkov_dist.run import run
from qkov_dist.scoring.engine import rounds_of, score_rounds
from qkov_dist.scoring.exchange import Exchange
from qkov_dist.scoring.head_batches import head_batches
from qkov_dist.scoring.influence_records import no_influences
from qkov_dist.scoring.own_share_records import no_shares
from qkov_dist.scoring.schedule import layers_of, make_sweeps
from qkov_dist.scoring.settings import ScoreSettings
from qkov_dist.scoring.tiles import LayerTiles, Selection, make_tile_plan
from qkov_dist.stats import head_tests
from qkov_dist.stats.statistics import QKOVStatistics

UNCOUNTED = ("qwen3_next", "qwen3_5")  # their linear attention pads these few tokens to a chunk of 64
MODELS = ("llama", "gpt2", "phi3", "olmo2")
DATA = [(2, {"shard": "ddp"}), (2, {"shard": "fsdp"})]
ZERO3 = (3, {"shard": "zero3"})
TENSOR = [(2, {"tp": 2}), (4, {"tp": 2, "shard": "fsdp"}), (4, {"tp": 2, "shard": "ddp"})]
CASES = [
    *(("llama", cut) for cut in (*DATA, *TENSOR)),  # under ZeRO-3 DeepSpeed hides that q, k and v share their input
    *(("phi3", cut) for cut in (*TENSOR, ZERO3)),  # runs attention whole on tensor-parallel ranks
    *(("gpt2", cut) for cut in (*DATA, ZERO3)),  # weights stored [in, out]; no tensor-parallel plan
    ("llama", (4, {"shard": "fsdp", "replicate": 2})),
    ("qwen3_moe", (2, {"ep": 2})),  # attention runs whole on both ranks
    ("qwen3_moe", (4, {"tp": 2, "ep": 4, "shard": "fsdp"})),
    ("llama", (4, {"cp": 2, "shard": "fsdp"})),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny models and two tasks of samples short and long (most gradients of the latter are smaller than factors)."""
    folder = tmp_path_factory.mktemp("planning")
    for task, seed, num in (("a", 1, 5), ("b", 2, 4)):
        samples = [*mixed_samples(num, VOCAB, seed=seed), *mixed_samples(1, VOCAB, seed=seed + 9, lengths=(40, 41))]
        write_task(folder / f"{task}.jsonl", samples)
    for name in (*MODELS, "qwen3_moe"):
        TINY[name].build().save_pretrained(folder / name)
    return folder


def measure(raw: dict, folder: Path) -> tuple[list[Cost], list[list[int]], list[Measured]]:
    """Plan a job and run it as `qkov run` does; every rank's costs, the sweeps, and what this rank measured."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        job = prepare(from_dict(raw), current())
        plan = plan_of_job(job)
        measured = Measured()
        measured.see_model(job.loaded.model)
        for sweep in sweeps_of(job):
            score(job, sweep, measured, folder)
    gathered = [Measured(**one) for one in job.topology.world.all_gather(asdict(measured))]
    return list(plan.costs), [list(sweep) for sweep in plan.sweeps], gathered


def sweeps_of(job: Job):
    compute, world = job.config.compute, job.topology.world
    sizes = world.all_gather({str(layer.layer): kept_bytes(job, layer) for layer in job.tile_plan.layers})
    largest = {int(layer): max(size[layer] for size in sizes) for layer in sizes[0]}
    disk = 2**40 if compute.factor_disk_mb is None else compute.factor_disk_mb * 2**20
    return make_sweeps(rounds_of(job.tile_plan, job.topology), largest, compute.factor_memory_mb * 2**20 + disk)


def kept_bytes(job: Job, layer: LayerTiles) -> int:
    """Bytes of a layer's factors on this rank, as its hooks leave them."""
    size = job.scoring.factor_itemsize
    return factor_bytes(job.layout.layer(layer.layer), layer.sites, job.lengths_here, size, job.topology.tp_rects)


def score(job: Job, sweep, measured: Measured, folder: Path) -> None:
    tile_plan, compute = job.tile_plan.only(layers_of(sweep)), job.config.compute
    store = FactorStore(
        compute.factor_memory_mb * 2**20,
        folder,
        job.topology.tp_rects,
        lengths=job.lengths_here,
        gradients_above=job.gradients_above(),
    )
    with closing(store):
        collection = Collection(
            store, tile_plan.sites, job.objective, batch_tokens=job.batch_tokens, topology=job.topology
        )
        with measured.phase("capture"):
            for task in job.tasks:
                collection.run(job.loaded.model, task.name, task.samples)
        measured.see_factors(store)
        exchange = Exchange(job.topology, store, job.layout, tile_plan)
        with measured.phase("scoring"):
            for _, blocks in score_rounds(tile_plan, sweep, exchange, job.roles(), job.settings(), job.topology):
                measured.see_scores(blocks)
        measured.see_sent(exchange.bytes_sent)
    measured.see_peaks()


def assert_as_planned(costs: list[Cost], measured: list[Measured]) -> None:
    for rank, (cost, found) in enumerate(zip(costs, measured, strict=True)):
        assert cost.weights == found.weights, rank
        assert (cost.factors_memory, cost.factors_disk) == (found.factors_memory, found.factors_disk), rank
        assert cost.sent_factors == found.sent_factors, rank
        assert (cost.flops_scoring, cost.flops_kept) == (found.flops_scoring or 0, found.flops_kept), rank
        assert cost.scores == (found.scores or 0), rank


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"statistics": {"enabled": True}, "metric": {"include_bias": True, "score": "curvature"}},
        {"metric": {"heads": [1], "layers": [1]}, "ridge": {"relative": 0.1}},
    ],
    ids=["plain", "pooled and symmetric with biases", "one head"],
)
def test_the_plan_of_a_process_is_what_it_holds_and_computes(model, sections, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("qkov_dist.scoring.kernel.HALF_PAIRS", 3)
    costs, _, measured = measure(settings(folder, model, "x", {}, **sections), tmp_path)
    assert costs[0].flops_kept > 0
    assert_as_planned(costs, measured)


@pytest.mark.long
@pytest.mark.parametrize(("model", "cut"), CASES, ids=str)
def test_the_plan_of_ranks_is_what_each_holds_sends_and_computes(model, cut, ranks, folder, tmp_path):
    world_size, parallel = cut
    raw = settings(folder, model, "x", parallel, ridge={"relative": 0.1})
    for costs, _, measured in ranks(world_size).run(measure, raw, tmp_path):
        assert_as_planned(costs, measured)
    simulated = simulate(raw, world_size)
    assert list(simulated.costs) == costs


def simulate(raw: dict, world_size: int) -> RunPlan:
    """The plan of the same ranks, from one process that is none of them."""
    parallelism = resolve_parallelism(ParallelConfig(**raw["parallel"]), world_size, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return plan_simulated(workload_of(prepare(from_dict({**raw, "parallel": {}}), current())), parallelism)


def test_factors_beyond_memory_and_disk_are_planned_as_they_are_kept(folder, tmp_path):
    for task, seed in (("many_a", 3), ("many_b", 4)):
        samples = mixed_samples(80, VOCAB, seed=seed, lengths=(8, 20))
        write_task(folder / f"{task}.jsonl", samples)
    raw = settings(folder, "llama", "x", {}, compute={"batch_tokens": 200, "factor_memory_mb": 1, "factor_disk_mb": 1})
    raw["tasks"] = [{"name": task, "path": str(folder / f"{task}.jsonl")} for task in ("many_a", "many_b")]
    (cost,), sweeps, (found,) = measure(raw, tmp_path)
    assert sweeps == [[0], [1]]
    assert cost.factors_disk > 2**17
    assert cost.factors_memory == pytest.approx(found.factors_memory, rel=0.1)
    assert cost.factors_disk == pytest.approx(found.factors_disk, rel=0.1)
    assert (cost.flops_scoring, cost.scores) == (found.flops_scoring, found.scores)


def test_norms_of_samples_have_them_run_twice_where_factors_need_several_sweeps(folder, tmp_path):
    """And never again where they are known from before."""
    write_task(folder / "few.jsonl", mixed_samples(80, VOCAB, seed=3, lengths=(8, 20)))

    def planned(disk_mb: int, scale: str, **known: bool) -> RunPlan:
        compute = {"batch_tokens": 200, "factor_memory_mb": 1, "factor_disk_mb": disk_mb}
        raw = settings(folder, "llama", "x", {}, compute=compute, metric={"sample_scale": scale})
        raw["tasks"] = [{"name": task, "path": str(folder / "few.jsonl")} for task in "ab"]
        raw["statistics"]["allow_shared_samples"] = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return plan_of_job(prepare(from_dict(raw), current()), **known)

    for disk_mb, num_sweeps in ((1, 2), (100, 1)):
        none, unit = planned(disk_mb, "none"), planned(disk_mb, "unit")
        known = planned(disk_mb, "unit", norms_known=True)
        assert [len(plan.sweeps) for plan in (none, unit, known)] == [num_sweeps] * 3
        assert [plan.captures for plan in (none, unit, known)] == [1, num_sweeps, 1]
        for name in ("flops_forward", "flops_backward", "flops_kept", "batches"):
            once, twice, again = (getattr(plan.costs[0], name) for plan in (none, unit, known))
            assert (twice, again) == (num_sweeps * once, once), name
        norms = [plan.costs[0].flops_norms for plan in (none, unit, known)]
        assert norms == [norms[0], 2 * norms[0], norms[0]]
        assert norms[0] > 0


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("name", [name for name in TINY if name not in UNCOUNTED])
def test_operations_of_both_passes_are_those_that_torch_counts(name, place):
    # torch counts no operations of a CPU's fused attention; Falcon looks at its setting once, when it is made
    model = TINY[name].build(attn_implementation="eager")
    model.set_attn_implementation("eager")
    lowest = resolve(model).layers[place].index
    work = work_of(model, name, layers=[lowest], num=4)  # one batch of each task
    passes = CaptureCost(work, Parallelism(1, "none", 1)).passes(Dealt(work, 1, False).passes[0], lowest)
    sites = [Site(lowest, projection.module) for projection in work.layout.layer(lowest).projections]
    with FlopCounterMode(display=False) as counter, capture(model, sites) as session:
        for task in work.tasks:
            names = [sample.id for sample in task.samples]
            for batch in make_batches(task.samples, names=names, batch_tokens=64, objective=work.objective):
                session.run(batch, Kept([]))
    assert passes.forward + passes.backward == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert passes.backward != passes.forward or (name, lowest) == (
        "gpt_bigcode_mqa",
        0,
    )  # there they happen to be equal


class Kept:
    """A sink that keeps the inputs of projections."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors = tensors

    def add(self, factors) -> None:
        self.tensors.append(factors.x)


def test_batches_that_run_side_by_side_are_planned_with_activations_and_factors_of_each(monkeypatch):
    alone, tp = Parallelism(1, "none", 1), Parallelism(2, "none", 1)
    work = replace(work_of(TINY["llama"].build(), "llama", num=30), workers=3)
    batches = Dealt(work, 1, False).passes[0]
    few = CaptureCost(work, alone).passes(batches, 0)
    one, cut = few.activations, CaptureCost(work, tp).passes(batches, 0).activations
    monkeypatch.setattr("qkov_dist.capture.side_by_side.WORTH", 0)
    factors = factor_bytes(work.layout.layer(0), [Site(0, p.module) for p in work.layout.layer(0).projections], [1], 4)
    side_by_side = CaptureCost(work, alone).passes(batches, 0)
    assert (few.at_once, side_by_side.at_once) == (1, 3)
    of_a_batch = max(batch.tokens for batch in batches) * 2 * factors  # of two layers
    assert side_by_side.activations == 3 * one + 4 * of_a_batch
    assert CaptureCost(work, tp).passes(batches, 0).activations == cut
    assert CaptureCost(replace(work, on_gpu=True), alone).passes(batches, 0).activations == one
    of_each = one + of_a_batch
    for room, at_once in ((0, 1), (2 * of_each - 1, 1), (2 * of_each, 2), (9 * of_each, 3)):
        limited = CaptureCost(replace(work, memory=2 * (CaptureCost(work, alone).weights(0) + room)), alone)
        assert limited.passes(batches, 0).at_once == at_once


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_activations_are_estimated_within_a_third(attention):
    model = TINY["llama"].build(hidden_size=128, intermediate_size=320, num_hidden_layers=3)
    model.set_attn_implementation(attention)
    work = work_of(model, "llama", num=4, tokens=33, compute={"batch_tokens": 128})
    planned = CaptureCost(work, Parallelism(1, "none", 1)).passes(Dealt(work, 1, False).passes[0], 0).activations
    sites = [Site(layer.index, p.module) for layer in work.layout.layers for p in layer.projections]
    tensors: list[torch.Tensor] = []
    (batch,) = make_batches(work.tasks[0].samples, names=["x"] * 4, batch_tokens=128, objective="causal")
    with (
        capture(model, sites) as session,
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensors.append(tensor) or tensor, lambda x: x),
    ):
        session.run(batch, Kept(tensors))
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    kept = sum(size for place, size in storages.items() if place not in own)
    logits = 4 * 32 * VOCAB * 4
    assert planned == pytest.approx(kept + 2 * logits, rel=1 / 3)  # two more copies while their gradient is formed


@pytest.mark.parametrize("score", ["interference", "signed"])
def test_operations_of_tests_are_those_of_their_products(score, monkeypatch):
    num_a, num_b = 70, 30
    counted: list[int] = []
    product = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: counted.append(2 * a.numel() * b.shape[-1]) or product(a, b))
    scores, with_overlap = torch.rand(3, num_a + num_b, num_a + num_b), score != "signed"
    names = ("cross_mean", "overlap") if with_overlap else ("cross_mean",)
    design = QKOVStatistics(n_permutations=400).design(num_a, num_b, names)
    _ = design.counts, design.left_out  # of the pairs themselves, once for all heads
    counted.clear()
    head_tests.head_tests({"Q": scores}, design)
    work = replace(
        work_of(TINY["llama"].build(), "llama", statistics={"permutations": 400}, metric={"score": score}),
        tasks=(made_up_task("a", num_a, 5), made_up_task("b", num_b, 5)),
    )
    (cost,) = plan_simulated(work, Parallelism(1, "none", 1)).costs
    assert cost.flops_statistics * 3 == sum(counted) * 24  # 2 layers of 4 + 2 + 2 + 4 heads


GIB = 2**30
ALONE = Parallelism(1, "none", 1)


def on_gpu(gpu_memory: int | None, **compute) -> Workload:
    """The work of a tiny model whose factors are about 10 MiB, on a GPU."""
    work = work_of(TINY["llama"].build(), "llama", num=100, tokens=50, on_gpu=True, compute=compute)
    return replace(work, gpu_memory=gpu_memory)


@pytest.mark.parametrize("asked", [0, 1, 3, None])
@pytest.mark.parametrize("memory_mb", [1, 2])
def test_factors_wait_on_the_gpu_first_then_in_memory_then_on_disk(asked, memory_mb):
    (cost,) = plan_simulated(on_gpu(8 * GIB, factor_gpu_mb=asked, factor_memory_mb=memory_mb), ALONE).costs
    places = (cost.factors_gpu, cost.factors_memory, cost.factors_disk)
    whole = sum(places)
    assert whole > 8 * 2**20
    room = whole if asked is None else asked * 2**20
    assert places == (room, min(whole - room, memory_mb * 2**20), max(whole - room - memory_mb * 2**20, 0))


def test_layers_that_a_gpu_has_whole_are_planned_to_be_tested_there_as_they_are_scored(monkeypatch):
    whole, sharded = Parallelism(1, "ddp", 2), Parallelism(1, "fsdp", 2)
    early = plan_simulated(on_gpu(8 * GIB), whole)
    assert all(cost.heads_early == cost.heads > 0 for cost in early.costs)
    assert all(cost.heads_early == 0 < cost.heads for cost in plan_simulated(on_gpu(8 * GIB), sharded).costs)
    times = expected(early, hardware("H100"), 8)
    assert [phase.name for phase in times if phase.terms.get("tests", 0) > 0] == ["scoring"]
    monkeypatch.setattr("qkov_dist.scoring.settings.KEPT_BYTES", 1)
    later = plan_simulated(on_gpu(8 * GIB), whole)
    assert all(cost.heads_early == 0 < cost.heads for cost in later.costs)
    assert [cost.sent_scores > 0 for cost in early.costs] == [False, True]  # of its own heads, to rank 0
    for cost, of_later in zip(early.costs, later.costs, strict=True):
        assert cost.sent_scores < of_later.sent_scores
        assert cost.buffers > of_later.buffers
    times = expected(later, hardware("H100"), 8)
    assert [phase.name for phase in times if phase.terms.get("tests", 0) > 0] == ["combining"]


def test_layers_on_disk_are_planned_to_be_tested_with_all_others_when_a_run_goes_on():
    work = on_gpu(8 * GIB)
    (topology,) = simulated_topologies(work.model_sizes, work.layout, work.layers, ALONE)
    by_rank = layer_work(work.layout, work.layers, topology, work.scoring)
    every, left = (ScoringCost(work, Dealt(work, 1, False), by_rank, of) for of in (None, frozenset({1})))
    assert every.num_tested_early(0) == every.num_tested(0) == left.num_tested(0) == 2 * left.num_tested_early(0) > 0


def test_what_is_planned_to_stay_on_a_gpu_leaves_room_for_the_rest():
    plans = {size: plan_simulated(on_gpu(int(size * GIB)), ALONE) for size in (1.0, 1.02, 1.05, 1.1, 2)}
    for size, plan in plans.items():
        (cost,) = plan.costs
        assert cost.factors_gpu <= plan.gpu_room
        assert plan.gpu_room == 0 or plan.peak()[0] + GPU_OVERHEAD <= size * GIB
    rooms = [plan.gpu_room for plan in plans.values()]
    assert rooms == sorted(rooms)
    assert rooms[0] == 0 < rooms[-1]


def test_factors_that_other_ranks_need_stay_on_gpus_where_these_send_them(monkeypatch):
    two = Parallelism(1, "ddp", 2)
    plan = plan_simulated(on_gpu(8 * GIB), two)
    assert all(cost.factors_memory == 0 < cost.factors_gpu <= plan.gpu_room for cost in plan.costs)
    assert plan.gpu_room < plan_simulated(on_gpu(8 * GIB), ALONE).gpu_room  # what is sent has its place there too
    in_memory = [plan_simulated(on_gpu(None), ALONE)]
    monkeypatch.setattr(SimulatedWorld, "carries", lambda self, device_type: device_type == "cpu")
    in_memory.append(plan_simulated(on_gpu(8 * GIB), two))
    for plan in in_memory:
        assert plan.gpu_room == 0
        assert all(cost.factors_gpu == 0 < cost.factors_memory for cost in plan.costs)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "falcon_new"])
@pytest.mark.parametrize("limit", [1, 3000, 20_000, 10**9])
def test_tiles_of_a_gpu_are_those_that_are_worked_on_together(name, limit, monkeypatch):
    monkeypatch.setattr("qkov_dist.scoring.tiles.GPU_TILE_BYTES", limit)
    monkeypatch.setattr("qkov_dist.scoring.settings.GPU_TILE_BYTES", limit)
    work = work_of(TINY[name].build(), name, on_gpu=True)
    (topology,) = simulated_topologies(work.model_sizes, work.layout, work.layers, ALONE)
    (work_by_rank,) = layer_work(work.layout, work.layers, topology, work.scoring)
    tile_plan = make_tile_plan(work.layout, Selection(), include_bias=False, num_samples=16, tile_bytes=limit)
    most = ScoreSettings(device="cuda").max_elements(16)
    for layer in tile_plan.layers:
        found, as_one = [], set()
        for reading in shared_inputs(work.layout.layer(layer.layer)):
            of_sites = [[tile for tile in layer.tiles if tile.site == site] for site, _ in reading]
            together = head_batches([tile for of_site in of_sites for tile in of_site], most, 16)
            if len(reading) > 1 and len(together) == 1:
                as_one.add(reading[0][0].module)
                found += together
            else:
                found += [batch for of_site in of_sites for batch in head_batches(of_site, most, 16)]
        largest = max(sum(tile.rect.area for tile in band) for batch in found for band in batch.bands)
        planned = work_by_rank[layer.layer]
        assert planned.tile == largest
        assert {work.layout.layer(layer.layer).projections[place].module for place in planned.as_one} == as_one
        assert bool(as_one) == (name == "llama" and limit == 10**9)


def test_while_a_layer_comes_in_that_of_the_last_ones_last_projection_is_still_there():
    works = [work_of(TINY["llama"].build(num_hidden_layers=num), "llama", num=30) for num in (2, 4)]
    one_round, two_rounds = (plan_simulated(work, Parallelism(1, "ddp", 2)) for work in works)
    assert [len(turns) for plan in (one_round, two_rounds) for turns in plan.rounds] == [1, 2]
    query = next(p for p in works[0].layout.layer(0).projections if p.module.endswith("q_proj"))
    size = sum(works[0].lengths_pooled) * sum(query.shape) * works[0].scoring.factor_itemsize
    for first, second in zip(one_round.costs, two_rounds.costs, strict=True):
        assert second.exchange - first.exchange == size


@pytest.mark.parametrize("data", ["ddp", "fsdp"])
def test_partial_scores_are_sent_as_planned(data):
    work = work_of(TINY["llama"].build(), "llama", num=30)
    plan = plan_simulated(work, Parallelism(1, data, 3))
    topologies = simulated_topologies(work.model_sizes, work.layout, work.layers, plan.parallelism)
    work_by_rank = layer_work(work.layout, work.layers, topologies[0], work.scoring)
    for rank, cost in enumerate(plan.costs):
        sent = 0
        for layer, work_here in work_by_rank[rank].items():
            blocks = {
                b: BlockPartial(
                    np.array(h),
                    np.zeros((len(h), 60, 60), "f4"),
                    np.zeros((len(h), 5)),
                    no_influences(len(h), 60),
                    no_shares(len(h), 60),
                )
                for b, h in work_here.heads.items()
            }
            axes = LayerAxes(layer, 2, (0, 1, 2, 3), work_here.every_head)
            world = Recording(rank, 3)
            add_dealt(LayerPartial(blocks, {}), axes, world)
            dealt = deal_heads(axes, 3)[rank]
            sent += world.sent + (sum(map(len, dealt.values())) * 30 * 30 * 4 if rank else 0)
        assert cost.sent_scores == pytest.approx(sent, rel=0.1)


class Recording(SimulatedWorld):
    """Counts what would be sent."""

    sent = 0

    def all_to_all(self, parts):
        object.__setattr__(self, "sent", sum(p.numel() for rank, p in enumerate(parts) if rank != self.rank))
        return [parts[self.rank]]


@pytest.mark.parametrize(
    "parallelism", [Parallelism(1, "fsdp", 3), Parallelism(1, "zero3", 5), Parallelism(2, "fsdp", 3)]
)
def test_ranks_that_are_not_there_own_what_real_ones_would(parallelism):
    work = work_of(TINY["qwen2"].build(), "qwen2")
    (topology, *_) = simulated_topologies(work.model_sizes, work.layout, work.layers, parallelism)
    held = [
        {name: [list(rect.bounds) for rect in by_rank[rank]] for name, by_rank in topology.ownership.held.items()}
        for rank in range(topology.world.size)
    ]
    assert topology.ownership == assign(work.layout, work.layers, held)


@pytest.mark.parametrize(
    "parallelism", [Parallelism(1, "fsdp", 5), Parallelism(2, "fsdp", 3), Parallelism(4, "none", 1)]
)
def test_what_ranks_hold_of_a_cut_weight_adds_up_to_it(parallelism):
    work = work_of(TINY["llama"].build(), "llama")
    num_ranks = parallelism.tp * parallelism.replicas
    for weight in work.model_sizes.weights:
        held = sum(math.prod(local_shape(weight, parallelism, rank)) for rank in range(num_ranks))
        assert held in (weight.numel, weight.numel * parallelism.tp), weight  # norms are copied to all tp ranks
        assert (held == weight.numel) == (parallelism.tp == 1 or weight.style is not None)


def test_ranks_that_share_tokens_leave_less_each_and_compute_the_same_together():
    work = work_of(TINY["llama"].build(), "llama", num=4, tokens=33, compute={"batch_tokens": 64})
    plans = {n: plan_simulated(work, Parallelism(1, "ddp", 4, context=n)) for n in (1, 2, 4)}
    alone = plans[1]
    others = 32 * sum(layer.num_kv_heads * (layer.head_dim + layer.v_head_dim) for layer in work.layout.layers) * 4
    for context, plan in plans.items():
        own = max(cost.activations for cost in plan.costs) - (others if context > 1 else 0)
        assert own == alone.costs[0].activations // context
        for name in ("flops_forward", "flops_backward"):
            assert sum(getattr(c, name) for c in plan.costs) == sum(getattr(c, name) for c in alone.costs), name
        assert {cost.batches for cost in plan.costs} == {context * alone.costs[0].batches}
        assert all((cost.moved_tokens > 0) == (context > 1) for cost in plan.costs)


def test_more_ranks_hold_less_each_and_compute_the_same_together():
    work = work_of(TINY["llama"].build(), "llama", num=24)
    plans = {n: plan_simulated(work, Parallelism(1, "fsdp" if n > 1 else "none", n)) for n in (1, 2, 4, 8)}
    for more, fewer in ((2, 1), (4, 2), (8, 4)):
        for name in ("weights", "factors_memory", "flops_scoring"):
            one, other = (max(getattr(cost, name) for cost in plans[n].costs) for n in (more, fewer))
            assert one < 0.7 * other, name
        assert total(plans[more].costs).flops_scoring == total(plans[fewer].costs).flops_scoring
        assert total(plans[more].costs).flops_forward == total(plans[fewer].costs).flops_forward


def test_tensor_parallelism_that_cannot_be_is_refused():
    llama, gpt2 = (work_of(TINY[name].build(), name) for name in ("llama", "gpt2"))
    with pytest.raises(QkovError, match=r"parallel.tp: expected a divisor of the 4 query and 2 kv heads"):
        plan_simulated(llama, Parallelism(4, "none", 1))
    with pytest.raises(QkovError, match="tensor-parallel plan"):
        plan_simulated(gpt2, Parallelism(2, "none", 1))


def test_measured_figures_stand_beside_planned_ones(folder, tmp_path):
    raw = settings(folder, "llama", "x", {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = plan_of_job(prepare(from_dict(raw), current()))
    _, _, measured = measure(raw, tmp_path)
    (cost,) = plan.costs
    measured[0].weights = cost.weights // 2
    phases = [Phase(name, {"products": 1.5}) for name in PHASES]
    table = {line.split("  ")[0]: line for line in comparison_lines(plan, phases, measured)}
    assert "+100.0%" in table["weights"]
    assert table["operations: scoring"].split()[-1] == "0%"
    assert table["time: capture"].split()[2:4] == ["1.5", "s"]
    assert "time: combining" not in table  # nobody measured it
    assert "network: factors" not in table  # nothing was, or was to be, sent
    assert "peak in the host's memory" in table


@pytest.mark.parametrize("pairs", ["none", "cross", "all"])
def test_files_are_planned_as_they_are_written(pairs, folder, tmp_path):
    for task, seed in (("more_a", 5), ("more_b", 6)):
        write_task(folder / f"{task}.jsonl", mixed_samples(24, VOCAB, seed=seed))
    sections = {"statistics": {"permutations": 50}, "output": {"dir": str(tmp_path), "pairs": pairs}}
    raw = settings(folder, "llama", "x", {}, **sections)
    raw["tasks"] = [{"name": task, "path": str(folder / f"{task}.jsonl")} for task in ("more_a", "more_b")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (cost,) = plan_of_job(prepare(from_dict(raw), current())).costs
        run(from_dict(raw))
    written = sum((tmp_path / name).stat().st_size for name in ("heatmap.h5", "partial_rank00000.h5"))
    assert cost.written == pytest.approx(written, rel=0.1)
