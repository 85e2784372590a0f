"""The one loop: capture every sample once, score layer by layer, add up over ranks, test, write.

What is known before the first batch, and refused there, is in :mod:`qkov_dist.job`. A layer is recorded when its scores
are on disk; the same command goes on from there. Every rank takes the same steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from math import prod
from pathlib import Path

import numpy as np
import torch

from .capture.collect import Collection
from .capture.finite import refuse_not_finite
from .capture.store import FactorStore
from .config import RunConfig
from .console import SILENT, Console
from .distributed.connect import current
from .distributed.preemption import stoppable
from .distributed.shared_errors import together
from .finish import EarlyTests, finish, statistics_of
from .job import Job, prepare
from .memory import kept_heap
from .planning.hardware import this_hardware
from .planning.measured import Measured, comparison_lines
from .planning.run_plan import RunPlan, plan_of_job, ranks_per_node
from .planning.table import plan_lines, size_notes
from .planning.time_model import Phase, assumptions, expected
from .results.disk import file_errors
from .results.hdf5_write import refuse_other_run
from .results.heatmap import Heatmap
from .results.heatmap_file import HEATMAP_FILE, load_heatmap
from .results.matrix_file import load_matrix
from .results.metadata import HeatmapMetadata, from_json, make_metadata, norms_in, run_attributes, to_json, with_norms
from .results.partial_schema import PartialHeader
from .results.partials import PartialWriter, locked, partial_path
from .results.reduce import layer_partial
from .results.resume import carry_over, forget, remove_run, take_over
from .results.task_matrix import TaskMatrix
from .scoring.engine import BlockScores, rounds_of, score_rounds
from .scoring.exchange import Exchange
from .scoring.influence_sums import parts_of
from .scoring.sample_norms import norms_of, summed_squares, unit_scales
from .scoring.schedule import Round, layers_of
from .scoring.settings import ScoreSettings
from .scoring.tiles import TilePlan
from .stats.head_tests import testing_device

Planned = tuple[RunPlan, list[Phase]]


def run(
    config: RunConfig,
    console: Console = SILENT,
    on_measured: Callable[[Sequence[Measured]], object] = lambda measured: None,
) -> Heatmap | TaskMatrix | None:
    """Run a configuration to the end and write ``heatmap.h5`` into its output folder.

    Every rank of a distributed run calls this; rank 0 writes the heatmap.

    Args:
        config: The resolved configuration.
        console: Takes a line about each stage, and shows progress; of a process alone, rank 0 alone uses it.
        on_measured: Called on each rank with what all of them measured, once something was computed and written.

    Returns:
        On rank 0 the heatmap as written (of more than two tasks the matrix of them), or what is on disk where this very
        run was finished before; None elsewhere.

    Raises:
        QkovError: for anything wrong with the input, the model, or the output folder.
    """
    world = current()
    console = console.on_rank(world.rank, world.size)
    is_first = world.rank == 0
    job = prepare(config, world, console)
    path = job.folder / HEATMAP_FILE
    refuse_other_run(path, job.run_id)
    if world.all_gather(path.exists() and config.output.resume)[0]:
        console.say(f"{path} is finished already (run {job.run_id}); set output.resume=false to compute it again")
        if is_first and not config.output.partials:
            remove_run(job.folder, job.run_id)  # a run killed after it had written the heatmap could not
        return _stored(job, path) if is_first else None
    with ExitStack() as folder:
        together(world, lambda: folder.enter_context(locked(job.folder)) if is_first else None)
        return _run(job, path, console, on_measured)


def _stored(job: Job, path: Path) -> Heatmap | TaskMatrix:
    return load_matrix(path) if job.config.has_many_tasks else load_heatmap(path)


def _run(
    job: Job, path: Path, console: Console, on_measured: Callable[[Sequence[Measured]], object]
) -> Heatmap | TaskMatrix | None:
    """Score what is missing, then add up, test and write."""
    config, world = job.config, job.topology.world
    header, measured = _header(job), Measured()
    measured.see_model(job.loaded.model)
    carried = _carried(job, header, console)
    with ExitStack() as threads:
        of_a_head = prod(job.roles().shape) * job.scoring.itemsize
        early = EarlyTests(config, job.device, job.tile_plan, of_a_head, world, threads)
        with PartialWriter(partial_path(job.folder, world.rank), header, resume=config.output.resume) as writer:
            _take_over(job, carried, writer)
            planned = _score_missing_layers(job, writer, early, console, measured)
            _record_what_others_score(job, writer)
        metadata = from_json(world.all_gather(writer.header.extra if world.rank == 0 else None)[0], str(writer.path))
        with measured.phase("combining"):
            read, tests = (lambda layer: writer.layer(layer.layer)), statistics_of(config)
            device, begun = testing_device(job.device), early.begun(metadata)
            heatmap = finish(metadata, read, config, path, world, console, tests, device, begun)
    measured.see_files([writer.path, *([path] if heatmap is not None else [])])
    measured.see_peaks()
    everyone = [Measured(**found) for found in world.all_gather(dataclasses.asdict(measured))]
    on_measured(everyone)
    if planned is not None:
        for line in comparison_lines(*planned, everyone):
            console.say(line)
    if not config.output.partials:
        world.all_gather(None)  # not before rank 0 has written the heatmap
        with file_errors(writer.path, OSError):
            writer.path.unlink()
    return heatmap


def _carried(job: Job, header: PartialHeader, console: Console) -> list[int]:
    """Layers that this run finished on another number of ranks, known to every rank; none where all starts again."""
    world = job.topology.world
    if not job.config.output.resume:
        together(world, lambda: remove_run(job.folder, job.run_id) if world.rank == 0 else None)
        return []
    found = together(world, lambda: carry_over(job.folder, header, console) if world.rank == 0 else [])
    layers: list[int] = world.all_gather(found)[0]
    return layers


def _take_over(job: Job, carried: list[int], writer: PartialWriter) -> None:
    """Record carried layers: first as nobody's on all other ranks, then whole on rank 0."""
    world = job.topology.world
    if carried:
        together(world, lambda: take_over(job.folder, carried, writer, whole=False) if world.rank else None)
        together(world, lambda: take_over(job.folder, carried, writer, whole=True) if not world.rank else None)
    together(world, lambda: forget(job.folder) if not world.rank else None)


def _score_missing_layers(
    job: Job, writer: PartialWriter, early: EarlyTests, console: Console, measured: Measured
) -> Planned | None:
    """Capture and score what is not on disk yet, sweep by sweep, and record each layer as it is done.

    Returns:
        The plan of what was missing and the time expected; None where nothing was.
    """
    topology = job.topology
    rounds = rounds_of(job.tile_plan, topology, done=writer.completed.__contains__)
    if not rounds:
        return None
    norms = _known_norms(job, writer)
    if done := len(job.tile_plan.layers) - len(layers_of(rounds)):
        console.say(f"resuming: {done} of {len(job.tile_plan.layers)} layers are on disk")
    planned = plan, _ = _planned(job, rounds, console, norms_known=norms is not None)
    with stoppable(topology.world) as may_stop:
        settings = job.settings(writer.folder, console)  # what cannot be compiled says so before samples are run
        settings = dataclasses.replace(settings, kept_layers=early.layers)
        mine = plan.costs[topology.world.rank]
        sweeps = _Sweeps(job, settings, early, plan.gpu_room, mine.at_once, writer.folder, console, may_stop, measured)
        if plan.captures > 1:  # nothing is scored before the norms are known, which all layers decide
            norms = _norms_first(sweeps, plan.rounds)
        for number, sweep in enumerate(plan.rounds, start=1):
            if len(plan.rounds) > 1:
                console.say(f"sweep {number} of {len(plan.rounds)}: layers {', '.join(map(str, layers_of(sweep)))}")
            _score_sweep(sweeps, sweep, writer, norms)
    return planned


def _planned(job: Job, rounds: Sequence[Round], console: Console, *, norms_known: bool) -> Planned:
    """The plan of some rounds and the time expected of it on this hardware, and both said."""
    plan = plan_of_job(job, rounds, norms_known=norms_known)
    here = this_hardware() if job.topology.world.rank == 0 else None  # it is rank 0 that says so
    phases = expected(plan, here, ranks_per_node(job.topology.world.size)) if here else []
    notes = [*size_notes(plan), *(assumptions(here) if here else [])]
    for line in plan_lines(plan, phases, here.name if here else "", notes):
        console.say(line)
    return plan, phases


def _known_norms(job: Job, writer: PartialWriter) -> np.ndarray | None:
    """Norms of samples' gradients that an earlier start of this run has stored with its layers, on every rank."""
    mine = writer.header.extra if job.config.metric.sample_scale == "unit" else {}
    found = [theirs for theirs in job.topology.world.all_gather(dict(mine)) if theirs]
    return norms_in(from_json(found[0], str(writer.path))) if found else None


@dataclasses.dataclass(frozen=True)
class _Sweeps:
    """What all passes over the samples have in common."""

    job: Job
    settings: ScoreSettings
    early: EarlyTests
    gpu_room: int
    at_once: int
    folder: Path
    console: Console
    may_stop: Callable[[], None]
    measured: Measured

    @contextmanager
    def captured(self, sweep: Sequence[Round]) -> Iterator[tuple[TilePlan, Exchange, HeatmapMetadata]]:
        """Run all samples for the layers of a sweep; their factors are there for as long as the block lasts."""
        job, tile_plan = self.job, self.job.tile_plan.only(layers_of(sweep))
        with closing(_store(job, self.folder, self.gpu_room)) as store:
            with self.measured.phase("capture"):
                metadata = _capture(job, tile_plan, store, self.console, self.may_stop, self.at_once)
            self.measured.see_factors(store)
            yield tile_plan, Exchange(job.topology, store, job.layout, tile_plan, job.device), metadata

    def squares(self, tile_plan: TilePlan, exchange: Exchange) -> np.ndarray:
        """What these layers add to the squared norm of each sample's gradient, over all ranks."""
        with self.measured.phase("scoring"), kept_heap(self.job.device):
            return summed_squares(tile_plan, exchange, self.job.roles(), self.settings)

    def norms(self, squares: np.ndarray) -> np.ndarray:
        """The norms that all layers' squares make."""
        return norms_of(squares, [sample.id for task in self.job.tasks for sample in task.samples])


def _norms_first(sweeps: _Sweeps, rounds: Sequence[Sequence[Round]]) -> np.ndarray:
    """Run all samples sweep by sweep for the norms of their gradients alone."""
    squares = np.zeros(sweeps.job.num_samples)
    for number, sweep in enumerate(rounds, start=1):
        sweeps.console.say(
            f"norms of samples' gradients, sweep {number} of {len(rounds)}: layers "
            f"{', '.join(map(str, layers_of(sweep)))}; every layer is captured again to be scored"
        )
        sweeps.may_stop()
        with sweeps.captured(sweep) as (tile_plan, exchange, _):
            squares += sweeps.squares(tile_plan, exchange)
    return sweeps.norms(squares)


def _score_sweep(sweeps: _Sweeps, sweep: Sequence[Round], writer: PartialWriter, norms: np.ndarray | None) -> None:
    """Run all samples for the layers of one sweep, then score and record these."""
    job, measured, roles = sweeps.job, sweeps.measured, sweeps.job.roles()
    with sweeps.captured(sweep) as (tile_plan, exchange, metadata):
        if norms is None and job.config.metric.sample_scale == "unit":  # the sweep is all there is
            norms = sweeps.norms(sweeps.squares(tile_plan, exchange))
        if norms is not None:
            roles = dataclasses.replace(roles, scales=unit_scales(norms))
        extra = to_json(metadata if norms is None else with_norms(metadata, norms))
        writer.header = dataclasses.replace(writer.header, extra=extra)
        _record_what_others_score(job, writer)  # or no other number of ranks could take over what these finish
        sweeps.early.begun(metadata)  # before workers share the threads
        bar = sweeps.console.bar("scoring", len(sweep), "layer")
        scores = score_rounds(tile_plan, sweep, exchange, roles, sweeps.settings, job.topology, sweeps.may_stop)
        with measured.phase("scoring"), bar as advance, kept_heap(job.device), closing(scores) as scored:
            for layer, blocks in scored:
                _check_scores(job, layer.layer, blocks)
                measured.see_scores(blocks)
                part = layer_partial(blocks)
                writer.write_layer(layer.layer, part.blocks, part.shared)
                sweeps.early.take(metadata, layer.layer, part, blocks)
                advance(1)
        measured.see_sent(exchange.bytes_sent)


def _check_scores(job: Job, layer: int, blocks: Mapping[str, BlockScores]) -> None:
    """Refuse to record scores that are not finite; the message names task, sample, layer and head."""
    roles = job.roles()
    names = [f"{task.name}: {sample.id}" for task in job.tasks for sample in task.samples]
    members = [names[number] for number in roles.members]
    for block, found in blocks.items():
        where = f"layer {layer}, block {block}"
        refuse_not_finite(found.scores, where, found.heads, members[roles.left], members[roles.right])


def _store(job: Job, folder: Path, gpu_room: int) -> FactorStore:
    compute = job.config.compute
    dtype = None if compute.factor_dtype == "auto" else getattr(torch, compute.factor_dtype)
    return FactorStore(
        compute.factor_memory_mb * 2**20,
        folder,
        job.topology.tp_rects,
        gpu_budget_bytes=gpu_room,
        lengths=job.lengths_here,
        dtype=dtype,
        gradients_above=job.gradients_above(),
        matmul_precision=compute.matmul_precision,
    )


def _record_what_others_score(job: Job, writer: PartialWriter) -> None:
    """A layer of which this rank owns nothing is complete without scores."""
    for layer in job.tile_plan.layers:
        if not layer.tiles and layer.layer not in writer.completed:
            writer.write_layer(layer.layer, {})


def _capture(
    job: Job, tile_plan: TilePlan, store: FactorStore, console: Console, may_stop: Callable[[], None], at_once: int
) -> HeatmapMetadata:
    """Run every sample once; returns the metadata of the whole job."""
    collection = Collection(
        store,
        tile_plan.sites,
        job.objective,
        job.config.metric.loss_reduction,
        batch_tokens=job.batch_tokens,
        topology=job.topology,
        console=console,
        soundness=job.soundness,
        at_once=at_once,
        same_model=True,  # by its fingerprint
    )
    with console.bar("capturing", len(job.lengths_here), "sample") as advance:

        def after_batch(count: int) -> None:
            advance(count)
            if job.topology.world.size == 1:  # a process may stop at any batch; ranks ask each other before each round
                may_stop()

        with kept_heap(job.device):
            collection.run_tasks(job.loaded.model, [(task.name, task.samples) for task in job.tasks], after_batch)
    return make_metadata(
        job.tile_plan,
        job.layout,
        tuple(task.name for task in job.tasks),
        [collection.records[part] for part in parts_of(job.sizes)],
        pooled=job.config.pooled,
        attributes={
            **run_attributes(job.config, job.layout, job.run_id, job.warnings, job.notes),
            "model_fingerprint": job.fingerprint,
        },
    )


def _header(job: Job) -> PartialHeader:
    (num_left, num_right), world, ownership = job.roles().shape, job.topology.world, job.topology.ownership
    layers = tuple(layer.layer for layer in job.tile_plan.layers)
    cut, num_tasks = ownership.digest if ownership and world.size > 1 else "", len(job.tasks)
    pooled = job.config.pooled
    return PartialHeader(
        job.run_id, world.rank, world.size, num_left, num_right, layers, pooled, cut=cut, num_tasks=num_tasks
    )
