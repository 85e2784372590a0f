"""A whole run's costs, rank by rank, before its first batch: of a job that is loaded, or of ranks that are not there.

Both go the same way: the integers by which a run is cut (teams, shares, rounds, windows) are those that the run itself
makes; what is counted over them is in ``planning.capture_cost``, ``planning.scoring_cost`` and
:mod:`~qkov_dist.planning.statistics_cost`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qkov_dist.distributed.parallelism import Parallelism, check_tensor_parallel
from qkov_dist.distributed.sharding import local_bytes
from qkov_dist.distributed.topology import Team
from qkov_dist.job import Job
from qkov_dist.scoring.schedule import Round, gpu_budget, layers_of, make_rounds, make_windows

from .capture_cost import CaptureCost
from .cost import Cost
from .hardware import GPU_OVERHEAD
from .model_sizes import anatomy_of
from .rank_shares import layer_shares
from .scoring_cost import ScoringCost
from .simulated_ranks import pretended_teams
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
    """

    work: Workload
    parallelism: Parallelism
    costs: tuple[Cost, ...]
    rounds: tuple[tuple[Round, ...], ...]
    gpu_room: int = 0

    @property
    def windows(self) -> tuple[tuple[int, ...], ...]:
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


def plan_pretended(work: Workload, parallelism: Parallelism) -> RunPlan:
    """The plan of ranks that are not there.

    Raises:
        QkovError: for a cut that the model cannot have, or factors of which no layer's fit.
    """
    styles = {work.anatomy.styles.get(p.module) for layer in work.layout.layers for p in layer.projections}
    check_tensor_parallel(styles, work.layout, parallelism.tp)
    teams = pretended_teams(work.anatomy, work.layout, work.layers, parallelism)
    scene = _Scene.of(work, parallelism, teams[0])
    sizes = [scene.scoring.factors(team) for team in teams]
    room = min(scene.gpu_room(team) for team in teams)
    windows = _windows(work, scene.rounds(), sizes, room)
    costs = tuple(scene.cost(team, windows, kept, room) for team, kept in zip(teams, sizes, strict=True))
    return RunPlan(work, parallelism, costs, tuple(map(tuple, windows)), room)


def least_peak(work: Workload, parallelism: Parallelism) -> int:
    """Bytes that the first rank holds at least, on its GPU or else in the host's memory, while it runs its samples."""
    capture = CaptureCost(work, parallelism)
    batches = Dealt(work, parallelism.replicas, lockstep=False).passes[0]
    return capture.weights(0) + capture.gathered + capture.passes(batches, work.layers[0]).activations


def plan_of_job(job: Job, rounds: Sequence[Round] | None = None) -> RunPlan:
    """The plan of a job on its ranks; all of them call this alike, and all have the plan of all.

    Args:
        job: What is loaded.
        rounds: What is left to score, of a run that goes on; all layers by default.

    Raises:
        QkovError: for factors of which no layer's fit.
    """
    world, work = job.team.world, workload_of(job)
    scene = _Scene.of(work, parallelism_of(job), job.team)
    mine = scene.scoring.factors(job.team)
    sizes = [{int(layer): size for layer, size in theirs.items()} for theirs in world.gather(mine)]
    weights = sum(map(local_bytes, (*job.loaded.model.parameters(), *job.loaded.model.buffers())))
    room = min(world.gather(scene.gpu_room(job.team, weights)))
    windows = _windows(work, scene.rounds() if rounds is None else rounds, sizes, room)
    cost = scene.cost(job.team, windows, mine, room, weights)
    costs = tuple(Cost(**theirs) for theirs in world.gather(asdict(cost)))
    return RunPlan(work, scene.capture.parallelism, costs, tuple(map(tuple, windows)), room)


def workload_of(job: Job) -> Workload:
    """A loaded job's work."""
    on_gpu = job.device.type == "cuda"
    room = job.team.world.gather(_room(job.config.compute.factor_disk_mb, job.folder))
    return Workload(
        config=job.config,
        anatomy=anatomy_of(job.loaded.model, job.layout),
        layout=job.layout,
        tasks=job.tasks,
        batch_tokens=job.batch_tokens,
        objective=job.objective,
        on_gpu=on_gpu,
        gpu_memory=min(job.team.world.gather(_gpu_memory(job.device))) if on_gpu else None,
        workers=1 if on_gpu else torch.get_num_threads(),
        disk=min(room),
    )


def parallelism_of(job: Job) -> Parallelism:
    """How a loaded model is cut, as what its ranks hold shows."""
    team, replicas = job.team, job.team.peers.size
    data = "ddp" if replicas > 1 else "none"
    if team.ownership is not None and any(
        len({by_rank[rank] for rank in team.peer_ranks}) > 1 for by_rank in team.ownership.held.values()
    ):
        zero3 = any(hasattr(parameter, "ds_id") for parameter in job.loaded.model.parameters())
        data = "zero3" if zero3 else "fsdp"
    if len({parameter.device for parameter in job.loaded.model.parameters()}) > 1:
        data = "device_map"
    return Parallelism(team.world.size // replicas, data, replicas)


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


def _windows(
    work: Workload, rounds: Sequence[Round], sizes: Sequence[Mapping[int, int]], gpu_room: int
) -> list[list[Round]]:
    largest = {layer: max(size[layer] for size in sizes) for layer in sizes[0]}
    disk = NO_LIMIT if work.disk is None else work.disk
    budget = work.config.compute.factor_memory_mb * MIB + disk
    return make_windows(rounds, largest, budget, gpu_budget(gpu_room, largest))


@dataclass(frozen=True, eq=False)
class _Scene:
    """What the costs of all ranks have in common."""

    work: Workload
    capture: CaptureCost
    scoring: ScoringCost
    statistics: StatisticsCost

    @staticmethod
    def of(work: Workload, parallelism: Parallelism, team: Team) -> _Scene:
        """The scene of a team's ranks."""
        owned = [team.owned_by(rank) for rank in range(team.world.size)]
        dealt = Dealt(work, team.peers.size, team.lockstep)
        scoring = ScoringCost(work, dealt, layer_shares(work.layout, work.layers, owned, work.scoring))
        return _Scene(work, CaptureCost(work, parallelism), scoring, StatisticsCost(scoring))

    def rounds(self) -> list[Round]:
        """What every rank scores, and when."""
        return make_rounds([[n for n, share in of.items() if share.heads] for of in self.scoring.shares])

    def gpu_room(self, team: Team, weights: int | None = None) -> int:
        """Bytes of captured factors that may stay on a rank's GPU: most of what is left, or what is asked for.

        Where other ranks need factors, or layers are on several GPUs, they wait in the host's memory.

        Args:
            team: The rank's.
            weights: Bytes of its weights, where they can be counted.
        """
        work, rank = self.work, team.world.rank
        if not work.on_gpu or team.peers.size > 1 or self.capture.parallelism.data == "device_map":
            return 0
        asked = work.config.compute.factor_gpu_mb
        if work.gpu_memory is None:
            return 0
        batches = self.scoring.dealt.passes[team.peers.rank]
        activations = self.capture.passes(batches, work.layers[0]).activations * ACTIVATION_SLACK
        capturing = self.capture.gathered + int(activations)
        used = self.capture.weights(rank) if weights is None else weights
        used += GPU_OVERHEAD + max(capturing, self.scoring.buffers(rank, work.layers))
        room = max(work.gpu_memory - used, 0) * 9 // 10
        return room if asked is None else min(asked * MIB, room)

    def cost(
        self,
        team: Team,
        windows: Sequence[Sequence[Round]],
        kept: Mapping[int, int],
        gpu_room: int,
        weights: int | None = None,
    ) -> Cost:
        """One rank's.

        Args:
            team: The rank's.
            windows: The rounds of each pass over the samples.
            kept: By layer, bytes of its factors.
            gpu_room: Bytes of them that may stay on its GPU.
            weights: Bytes of its weights, where they can be counted.
        """
        rank, batches = team.world.rank, self.scoring.dealt.passes[team.peers.rank]
        passes = [self.capture.passes(batches, layers_of(window)[0]) for window in windows]
        factors = max((sum(kept[layer] for layer in layers_of(window)) for window in windows), default=0)
        on_gpu = min(factors, gpu_room)
        in_memory = min(factors - on_gpu, self.work.config.compute.factor_memory_mb * MIB)
        mine = [turn[rank] for window in windows for turn in window]
        scored = [layer for layer in mine if layer is not None]
        every = [layer for window in windows for layer in layers_of(window)]
        sent = [self.scoring.sent(team, window) for window in windows]
        return Cost(
            weights=self.capture.weights(rank) if weights is None else weights,
            gathered=self.capture.gathered,
            activations=_most(one.activations for one in passes),
            factors_gpu=on_gpu,
            factors_memory=in_memory,
            factors_disk=factors - on_gpu - in_memory,
            exchange=_most(one.largest_round for one in sent),
            buffers=self.scoring.buffers(rank, scored),
            scores=self.scoring.scores(rank, scored),
            statistics=self.statistics.bytes(rank),
            sent_factors=sum(one.to_others for one in sent),
            sent_scores=self.scoring.sent_scores(rank),
            moved_weights=sum(one.moved_weights for one in passes),
            moved_sums=sum(one.moved_sums for one in passes),
            written=self.scoring.partials(rank) + (0 if rank else self.scoring.heatmap()),
            flops_forward=sum(one.forward for one in passes),
            flops_backward=sum(one.backward for one in passes),
            flops_kept=self.scoring.flops_kept(team, every),
            flops_scoring=self.scoring.flops(rank, scored),
            flops_ridge=self.scoring.flops_ridge(team, every),
            flops_statistics=self.statistics.flops(rank),
            elements=self.scoring.elements(rank, scored),
            batches=len(batches) * len(windows),
        )


def _most(numbers: Any) -> int:
    return max(numbers, default=0)
