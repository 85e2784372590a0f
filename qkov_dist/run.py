"""The one loop: capture every sample once, score layer by layer, add up over ranks, test, write.

What is known before the first batch, and refused there, is in :mod:`qkov_dist.job`. A layer is recorded when its scores
are on disk; the same command goes on from there. Every rank takes the same steps.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from .capture.collect import Collection
from .capture.finite import refuse_not_finite
from .capture.store import FactorStore
from .config import RunConfig
from .console import Voice, progress_bar
from .distributed.connect import current
from .distributed.preemption import stoppable
from .distributed.shared_errors import together
from .finish import HEATMAP_FILE, finish, statistics_of
from .job import Job, Say, prepare
from .memory import kept_heap
from .planning.hardware import this_hardware
from .planning.measured import Measured, comparison_lines
from .planning.run_plan import RunPlan, plan_of_job
from .planning.table import plan_lines, size_notes
from .planning.time_model import Phase, assumptions, expected
from .results.disk import file_errors
from .results.hdf5_write import refuse_other_run
from .results.heatmap import Heatmap
from .results.heatmap_file import load_heatmap
from .results.metadata import Frame, from_json, make_frame, run_attributes, to_json
from .results.partial_schema import PartialHeader
from .results.partials import PartialWriter, locked, partial_path, read_partial
from .results.reduce import layer_partial
from .results.resume import carry_over, forget, remove_run, take_over
from .scoring.engine import BlockScores, rounds_of, score_rounds
from .scoring.exchange import Exchange
from .scoring.schedule import Round, layers_of
from .scoring.tiles import Plan

Planned = tuple[RunPlan, list[Phase]]


def run(config: RunConfig, *, say: Say = print, show_progress: bool = True) -> Heatmap | None:
    """Run a configuration to the end and write ``heatmap.h5`` into its output folder.

    Every rank of a distributed run calls this; rank 0 writes the heatmap.

    Args:
        config: The resolved configuration.
        say: Takes one line about each stage, on rank 0.
        show_progress: Show progress bars on stderr, on rank 0.

    Returns:
        On rank 0 the heatmap as written, or the one on disk where this very run was finished before; None elsewhere.

    Raises:
        QkovError: for anything wrong with the input, the model, or the output folder.
    """
    world = current()
    voice = Voice.of_rank(world.rank, world.size, say, show_progress=show_progress)
    is_first = world.rank == 0
    job = prepare(config, world, voice.say)
    path = job.folder / HEATMAP_FILE
    refuse_other_run(path, job.run_id)
    if world.gather(path.exists() and config.output.resume)[0]:
        voice.say(f"{path} is finished already (run {job.run_id}); set output.resume=false to compute it again")
        if is_first and not config.output.partials:
            remove_run(job.folder, job.run_id)  # a run killed after it had written the heatmap could not
        return load_heatmap(path) if is_first else None
    with ExitStack() as folder:
        together(world, lambda: folder.enter_context(locked(job.folder)) if is_first else None)
        return _run(job, path, voice)


def _run(job: Job, path: Path, voice: Voice) -> Heatmap | None:
    """Score what is missing, then add up, test and write."""
    config, world = job.config, job.team.world
    header, measured = _header(job), Measured()
    measured.see_model(job.loaded.model)
    carried = _carried(job, header, voice.say)
    with PartialWriter(partial_path(job.folder, world.rank), header, resume=config.output.resume) as writer:
        _take_over(job, carried, writer)
        planned = _score_missing_layers(job, writer, voice, measured)
        _record_what_others_score(job, writer)
    partial = read_partial(writer.path)
    frame = from_json(world.gather(partial.header.extra if world.rank == 0 else None)[0], str(writer.path))
    with measured.phase("combining"):
        read, tests = (lambda layer: partial.read_layer(layer.layer)), statistics_of(config)
        heatmap = finish(frame, read, config, path, world, voice, tests)
    measured.see_files([writer.path, *([path] if heatmap is not None else [])])
    measured.see_peaks()
    everyone = [Measured(**found) for found in world.gather(dataclasses.asdict(measured))]
    if planned is not None:
        for line in comparison_lines(*planned, everyone):
            voice.say(line)
    if not config.output.partials:
        world.gather(None)  # not before rank 0 has written the heatmap
        with file_errors(partial.path, OSError):
            partial.path.unlink()
    return heatmap


def _carried(job: Job, header: PartialHeader, say: Say) -> list[int]:
    """Layers that this run finished on another number of ranks, known to every rank; none where all starts again."""
    world = job.team.world
    if not job.config.output.resume:
        together(world, lambda: remove_run(job.folder, job.run_id) if world.rank == 0 else None)
        return []
    found = together(world, lambda: carry_over(job.folder, header, say) if world.rank == 0 else [])
    layers: list[int] = world.gather(found)[0]
    return layers


def _take_over(job: Job, carried: list[int], writer: PartialWriter) -> None:
    """Record carried layers: first as nobody's on all other ranks, then whole on rank 0."""
    world = job.team.world
    if carried:
        together(world, lambda: take_over(job.folder, carried, writer, whole=False) if world.rank else None)
        together(world, lambda: take_over(job.folder, carried, writer, whole=True) if not world.rank else None)
    together(world, lambda: forget(job.folder) if not world.rank else None)


def _score_missing_layers(job: Job, writer: PartialWriter, voice: Voice, measured: Measured) -> Planned | None:
    """Capture and score what is not on disk yet, window by window, and record each layer as it is done.

    Returns:
        The plan of what was missing and the time expected; None where nothing was.
    """
    team = job.team
    rounds = rounds_of(job.plan, team, done=writer.completed.__contains__)
    if not rounds:
        return None
    if done := len(job.plan.layers) - len(layers_of(rounds)):
        voice.say(f"resuming: {done} of {len(job.plan.layers)} layers are on disk")
    planned = plan, _ = _planned(job, rounds, voice)
    with stoppable(team.world) as may_stop:
        for number, window in enumerate(plan.rounds, start=1):
            if len(plan.rounds) > 1:
                voice.say(f"window {number} of {len(plan.rounds)}: layers {', '.join(map(str, layers_of(window)))}")
            _score_window(job, window, plan.gpu_room, writer, voice, may_stop, measured)
    return planned


def _planned(job: Job, rounds: Sequence[Round], voice: Voice) -> Planned:
    """The plan of some rounds and the time expected of it on this hardware, and both said."""
    plan = plan_of_job(job, rounds)
    here = this_hardware() if job.team.world.rank == 0 else None  # it is rank 0 that says so
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", job.team.world.size))
    phases = expected(plan, here, ranks_per_node) if here else []
    notes = [*size_notes(plan), *(assumptions(here) if here else [])]
    for line in plan_lines(plan, phases, here.name if here else "", notes):
        voice.say(line)
    return plan, phases


def _score_window(
    job: Job,
    window: Sequence[Round],
    gpu_room: int,
    writer: PartialWriter,
    voice: Voice,
    may_stop: Callable[[], None],
    measured: Measured,
) -> None:
    """Run all samples for the layers of one window, then score and record these."""
    team, roles, settings = job.team, job.roles(), job.settings(writer.folder, voice.warn)
    plan = job.plan.only(layers_of(window))
    with closing(_store(job, writer.folder, gpu_room)) as store:
        with measured.phase("capture"):
            frame = _capture(job, plan, store, voice, may_stop)
        measured.see_factors(store)
        writer.header = dataclasses.replace(writer.header, extra=to_json(frame))
        exchange = Exchange(team, store, job.layout, plan.sites)
        bar = progress_bar("scoring", len(window), "layer", show=voice.show_progress)
        scores = score_rounds(plan, window, exchange, roles, settings, team, may_stop)
        with measured.phase("scoring"), bar as advance, kept_heap(job.device), closing(scores) as scored:
            for layer, blocks in scored:
                _check_scores(job, layer.layer, blocks)
                measured.see_scores(blocks)
                part = layer_partial(blocks)
                writer.write_layer(layer.layer, part.blocks, part.shared)
                advance(1)
        measured.see_sent(factors=exchange.bytes_sent)


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
        job.team.local,
        gpu_budget_bytes=gpu_room,
        lengths=job.lengths_here,
        dtype=dtype,
        gradients_above=job.gradients_above(),
        matmul_precision=compute.matmul_precision,
    )


def _record_what_others_score(job: Job, writer: PartialWriter) -> None:
    """A layer of which this rank owns nothing is complete without scores."""
    for layer in job.plan.layers:
        if layer.layer not in writer.completed:
            writer.write_layer(layer.layer, {})


def _capture(job: Job, plan: Plan, store: FactorStore, voice: Voice, may_stop: Callable[[], None]) -> Frame:
    """Run every sample once; returns the frame of the whole job."""
    collection = Collection(
        store,
        plan.sites,
        job.objective,
        job.config.metric.loss_reduction,
        batch_tokens=job.batch_tokens,
        team=job.team,
        say=voice.warn,
        soundness=job.soundness,
    )
    share = -(-job.num_samples // job.team.peers.size)
    with progress_bar("capturing", share, "sample", show=voice.show_progress) as advance:

        def after_batch(count: int) -> None:
            advance(count)
            if job.team.world.size == 1:  # a process may stop at any batch; ranks ask each other before each round
                may_stop()

        with kept_heap(job.device):
            for task in job.tasks:
                collection.run(job.loaded.model, task.name, task.samples, after_batch)
    num_a = len(job.tasks[0].samples)
    return make_frame(
        job.plan,
        job.layout,
        (job.tasks[0].name, job.tasks[1].name),
        (collection.records[:num_a], collection.records[num_a:]),
        pooled=job.pooled,
        attributes=run_attributes(job.config, job.layout, job.run_id, job.warnings, job.notes),
    )


def _header(job: Job) -> PartialHeader:
    (num_left, num_right), world, ownership = job.roles().shape, job.team.world, job.team.ownership
    layers = tuple(layer.layer for layer in job.plan.layers)
    cut = ownership.digest if ownership and world.size > 1 else ""
    return PartialHeader(job.run_id, world.rank, world.size, num_left, num_right, layers, job.pooled, cut=cut)
