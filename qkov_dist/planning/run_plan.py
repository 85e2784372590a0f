"""A whole run's costs, rank by rank, before its first batch: of a job that is loaded, or of ranks that are not there.

Both go the same way: the integers by which a run is cut (topology, work, rounds, sweeps) are those that the run itself
makes; what is counted over them is in ``planning.capture_cost``, ``planning.scoring_cost`` and
:mod:`~qkov_dist.planning.statistics_cost`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qkov_dist.distributed.parallelism import Parallelism
from qkov_dist.distributed.plans import check_experts, check_tensor_parallel
from qkov_dist.distributed.sharding import local_bytes
from qkov_dist.distributed.topology import Topology
from qkov_dist.job import Job
from qkov_dist.memory import host_memory
from qkov_dist.scoring.schedule import Round, gpu_budget, layers_of, make_rounds, make_sweeps

from .capture_cost import CaptureCost
from .cost import Cost
from .exchange_cost import ExchangeCost
from .hardware import GPU_OVERHEAD
from .model_sizes import model_sizes_of
from .rank_work import layer_work
from .scoring_cost import ScoringCost
from .simulated_ranks import simulated_topologies
from .statistics_cost import StatisticsCost
from .workload import Dealt, Workload

NO_LIMIT = 2**62
ACTIVATION_SLACK = 1.5  # by which the estimate of activations may be too small
MIB = 2**20


@dataclass(frozen=True, eq=False)
class RunPlan:
    """What a run will cost.

    Attributes:
        work: What is computed.
        parallelism: How the model is cut.
        costs: Every rank's, by rank.
        rounds: The rounds of each pass over the samples.
        gpu_room: Bytes of captured factors that may stay on each GPU.
        captures: How often the samples are run for each part of the layers: twice where ``sample_scale`` needs the
            norms of all layers before the first is scored, and not all of them fit.
    """

    work: Workload
    parallelism: Parallelism
    costs: tuple[Cost, ...]
    rounds: tuple[tuple[Round, ...], ...]
    gpu_room: int = 0
    captures: int = 1

    @cached_property
    def sweeps(self) -> tuple[tuple[int, ...], ...]:
        """The layers of each pass over the samples."""
        return tuple(map(layers_of, self.rounds))

    @property
    def num_ranks(self) -> int:
        """How many ranks."""
        return len(self.costs)

    def peak(self) -> tuple[int, int]:
        """The most bytes held by any rank on its GPU and in the host's memory."""
        peaks = [cost.peaks(on_gpu=self.work.on_gpu) for cost in self.costs]
        return max(gpu for gpu, _ in peaks), max(host for _, host in peaks)


def plan_simulated(work: Workload, parallelism: Parallelism) -> RunPlan:
    """The plan of ranks that are not there.

    Raises:
        QkovError: for a cut that the model cannot have, or factors of which no layer's fit.
    """
    styles = {work.model_sizes.styles.get(p.module) for layer in work.layout.layers for p in layer.projections}
    weights = work.model_sizes.weights
    check_experts({weight.shape[0] for weight in weights if weight.expert}, work.layout, parallelism.experts)
    cut = 1 if parallelism.whole else parallelism.tp
    check_tensor_parallel(styles, work.layout, cut, {weight.style for weight in weights if weight.layer is not None})
    topologies = simulated_topologies(work.model_sizes, work.layout, work.layers, parallelism)
    scene = _Scene.of(work, parallelism, topologies[0])
    sizes = [scene.scoring.factors(topology) for topology in topologies]
    room = min(scene.gpu_room(topology) for topology in topologies)
    sweeps = _sweeps(work, scene.rounds, sizes, room)
    costs = tuple(
        scene.cost(topology, sweeps, kept, room, captures=_captures(work, sweeps))
        for topology, kept in zip(topologies, sizes, strict=True)
    )
    return RunPlan(work, parallelism, costs, tuple(sweep.rounds for sweep in sweeps), room, _captures(work, sweeps))


def least_peak(work: Workload, parallelism: Parallelism) -> int:
    """Bytes that the first rank holds at least, on its GPU or else in the host's memory, while it runs its samples."""
    capture = CaptureCost(work, parallelism)
    batches = Dealt(work, parallelism.replicas, False, parallelism.context).passes_on(0)
    return capture.weights(0) + capture.gathered + capture.passes(batches, work.layers[0]).activations


def plan_of_job(job: Job, rounds: Sequence[Round] | None = None, *, norms_known: bool = False) -> RunPlan:
    """The plan of a job on its ranks; all of them call this alike, and all have the plan of all.

    Args:
        job: What is loaded.
        rounds: What is left to score, of a run that goes on; all layers by default.
        norms_known: Whether norms of samples' gradients are known from before.

    Raises:
        QkovError: for factors of which no layer's fit.
    """
    world, work = job.topology.world, workload_of(job)
    scene = _Scene.of(work, parallelism_of(job), job.topology, None if rounds is None else layers_of(rounds))
    mine = scene.scoring.factors(job.topology)
    sizes = [{int(layer): size for layer, size in theirs.items()} for theirs in world.all_gather(mine)]
    weights = sum(map(local_bytes, (*job.loaded.model.parameters(), *job.loaded.model.buffers())))
    room = min(world.all_gather(scene.gpu_room(job.topology, weights)))
    sweeps = _sweeps(work, scene.rounds if rounds is None else rounds, sizes, room)
    captures = 1 if norms_known else _captures(work, sweeps)
    cost = scene.cost(job.topology, sweeps, mine, room, weights, captures=captures, norms_known=norms_known)
    costs = tuple(Cost(**theirs) for theirs in world.all_gather(asdict(cost)))
    return RunPlan(work, scene.capture.parallelism, costs, tuple(sweep.rounds for sweep in sweeps), room, captures)


def workload_of(job: Job) -> Workload:
    """A loaded job's work."""
    on_gpu = job.device.type == "cuda"
    room = job.topology.world.all_gather(_room(job.config.compute.factor_disk_mb, job.folder))
    return Workload(
        config=job.config,
        model_sizes=model_sizes_of(job.loaded.model, job.layout),
        layout=job.layout,
        tasks=job.tasks,
        batch_tokens=job.batch_tokens,
        objective=job.objective,
        on_gpu=on_gpu,
        gpu_memory=min(job.topology.world.all_gather(_gpu_memory(job.device))) if on_gpu else None,
        memory=host_memory() // ranks_per_node(job.topology.world.size),
        workers=1 if on_gpu else torch.get_num_threads(),
        disk=min(room),
    )


def ranks_per_node(num_ranks: int) -> int:
    """How many of the ranks share this node, as the launcher says; all of them where it does not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))


def parallelism_of(job: Job) -> Parallelism:
    """How a loaded model is cut, as what its ranks hold shows."""
    topology, replicas = job.topology, job.topology.dp_group.size
    data = "ddp" if replicas > 1 else "none"
    if topology.ownership is not None and any(
        len({by_rank[rank] for rank in topology.dp_ranks}) > 1 for by_rank in topology.ownership.held.values()
    ):
        zero3 = any(hasattr(parameter, "ds_id") for parameter in job.loaded.model.parameters())
        data = "zero3" if zero3 else "fsdp"
    if len({parameter.device for parameter in job.loaded.model.parameters()}) > 1:
        data = "device_map"
    asked = job.parallelism
    copies = asked.copies if data == "fsdp" else 1
    tp = topology.world.size // replicas
    return Parallelism(tp, data, replicas, copies, asked.experts, asked.whole, asked.context)


def _room(limit_mb: int | None, folder: Path) -> int:
    """Bytes of factors that there is room for on disk, as a run finds them."""
    if limit_mb is not None:
        return limit_mb * MIB
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(place).free * 9 // 10


def _gpu_memory(device: torch.device) -> int:
    """Bytes of a GPU that this process has or can have."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device)) + GPU_OVERHEAD  # the context is there already


@dataclass(frozen=True)
class _Sweep:
    """The rounds of one pass over the samples, and the layers in them."""

    rounds: tuple[Round, ...]
    layers: tuple[int, ...]


def _captures(work: Workload, sweeps: Sequence[_Sweep]) -> int:
    """How often samples are run for each part of the layers."""
    return 2 if work.config.metric.sample_scale == "unit" and len(sweeps) > 1 else 1


def _sweeps(work: Workload, rounds: Sequence[Round], sizes: Sequence[Mapping[int, int]], gpu_room: int) -> list[_Sweep]:
    largest = {layer: max(size[layer] for size in sizes) for layer in sizes[0]}
    disk = NO_LIMIT if work.disk is None else work.disk
    budget = work.config.compute.factor_memory_mb * MIB + disk
    sweeps = make_sweeps(rounds, largest, budget, gpu_budget(gpu_room, largest))
    return [_Sweep(tuple(sweep), layers_of(sweep)) for sweep in sweeps]


@dataclass(frozen=True, eq=False)
class _Scene:
    """What the costs of all ranks have in common."""

    work: Workload
    capture: CaptureCost
    scoring: ScoringCost
    exchange: ExchangeCost
    statistics: StatisticsCost

    @staticmethod
    def of(work: Workload, parallelism: Parallelism, topology: Topology, left: Sequence[int] | None = None) -> _Scene:
        """The scene of a topology's ranks, which have these layers still to score; all by default."""
        dealt = Dealt(work, topology.dp_group.size, topology.gathers_weights, parallelism.context)
        by_rank = layer_work(work.layout, work.layers, topology, work.scoring)
        scoring = ScoringCost(work, dealt, by_rank, None if left is None else frozenset(left))
        capture, exchange, statistics = CaptureCost(work, parallelism), ExchangeCost(scoring), StatisticsCost(scoring)
        return _Scene(work, capture, scoring, exchange, statistics)

    @cached_property
    def rounds(self) -> list[Round]:
        """What every rank scores, and when."""
        return make_rounds([[n for n, here in of.items() if here.heads] for of in self.scoring.by_rank])

    def gpu_room(self, topology: Topology, weights: int | None = None) -> int:
        """Bytes of captured factors that may stay on a rank's GPU: most of what is left, or what is asked for.

        Where other ranks need factors and their group has no back end for GPUs, or layers are on several GPUs, they
        wait in the host's memory.

        Args:
            topology: The rank's.
            weights: Bytes of its weights, where they can be counted.
        """
        work, rank = self.work, topology.world.rank
        if not (work.on_gpu and topology.dp_group.carries("cuda")) or self.capture.parallelism.data == "device_map":
            return 0
        asked = work.config.compute.factor_gpu_mb
        if work.gpu_memory is None:
            return 0
        batches = self.scoring.dealt.passes[topology.dp_group.rank]
        activations = self.capture.passes(batches, work.layers[0]).activations * ACTIVATION_SLACK
        capturing = self.capture.gathered + int(activations)
        used = self.capture.weights(rank) if weights is None else weights
        scoring = self.scoring.buffers(rank, work.layers) + self.exchange.sent(topology, self.rounds).largest_round
        scoring += self.statistics.early(rank)
        used += GPU_OVERHEAD + max(capturing, scoring)
        room = max(work.gpu_memory - used, 0) * 9 // 10
        return room if asked is None else min(asked * MIB, room)

    def cost(
        self,
        topology: Topology,
        sweeps: Sequence[_Sweep],
        kept: Mapping[int, int],
        gpu_room: int,
        weights: int | None = None,
        *,
        captures: int = 1,
        norms_known: bool = False,
    ) -> Cost:
        """One rank's.

        Args:
            topology: The rank's.
            sweeps: Each pass over the samples.
            kept: By layer, bytes of its factors.
            gpu_room: Bytes of them that may stay on its GPU.
            weights: Bytes of its weights, where they can be counted.
            captures: How often the samples are run for each sweep.
            norms_known: Whether norms of samples' gradients are known from before.
        """
        rank, batches = topology.world.rank, self.scoring.dealt.passes[topology.dp_group.rank]
        passes = captures * [self.capture.passes(batches, sweep.layers[0]) for sweep in sweeps]
        factors = max((sum(kept[layer] for layer in sweep.layers) for sweep in sweeps), default=0)
        on_gpu = min(factors, gpu_room)
        in_memory = min(factors - on_gpu, self.work.config.compute.factor_memory_mb * MIB)
        mine = [turn[rank] for sweep in sweeps for turn in sweep.rounds]
        scored = [layer for layer in mine if layer is not None]
        every = [layer for sweep in sweeps for layer in sweep.layers]
        sent = [self.exchange.sent(topology, sweep.rounds) for sweep in sweeps]
        return Cost(
            weights=self.capture.weights(rank) if weights is None else weights,
            gathered=self.capture.gathered,
            activations=_most(one.activations for one in passes),
            factors_gpu=on_gpu,
            factors_memory=in_memory,
            factors_disk=factors - on_gpu - in_memory,
            exchange=_most(one.largest_round for one in sent),
            buffers=self.scoring.buffers(rank, scored) + self.statistics.early(rank),
            scores=self.scoring.scores(rank, scored),
            statistics=self.statistics.bytes(rank),
            sent_factors=sum(one.to_others for one in sent),
            least_factors=sum(one.at_least for one in sent),
            sent_scores=self.scoring.sent_scores(rank),
            moved_weights=sum(one.moved_weights for one in passes),
            moved_sums=sum(one.moved_sums for one in passes),
            moved_tokens=sum(one.moved_tokens for one in passes),
            written=self.scoring.partials(rank) + (0 if rank else self.scoring.heatmap()),
            flops_forward=sum(one.forward for one in passes),
            flops_backward=sum(one.backward for one in passes),
            flops_kept=captures * self.scoring.flops_kept(topology, every),
            flops_scoring=self.scoring.flops(rank, scored),
            flops_narrow=self.scoring.flops_narrow(rank, scored),
            flops_norms=self.scoring.flops_norms(topology, every, norms_known=norms_known),
            flops_statistics=self.statistics.flops(rank),
            heads=self.scoring.num_tested(rank),
            heads_early=self.scoring.num_tested_early(rank),
            elements=self.scoring.elements(rank, scored),
            batches=captures * len(batches) * len(sweeps),
            at_once=_most(one.at_once for one in passes),
        )


def _most(numbers: Any) -> int:
    return max(numbers, default=0)
