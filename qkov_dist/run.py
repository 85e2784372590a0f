"""The one loop: capture every sample once, score layer by layer, add up over ranks, test, write.

What is known before the first batch, and refused there, is in :mod:`qkov_dist.job`. A layer is recorded when its scores
are on disk; the same command goes on from there. Every rank takes the same steps.
"""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path
from typing import cast

from .batches import Objective
from .collection import Collection
from .comm import current
from .config import RunConfig
from .engine import score_layer
from .exchange import Exchange
from .factors import SPILLED, FactorStore
from .frame import Frame, from_json, make_frame, to_json
from .hdf5_write import refuse_other_run
from .job import Job, Say, prepare
from .memory import Memory, memory_of, memory_table
from .merge import add_over_ranks, assemble, layer_partial
from .partial_schema import LayerPartial, PartialHeader
from .partials import PartialWriter, partial_path, read_partial
from .plan import Plan
from .progress import progress_bar
from .provenance import run_attributes
from .results import Heatmap, Pairs
from .statistics import QKOVStatistics
from .store import load_heatmap

HEATMAP_FILE = "heatmap.h5"


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
    is_first = world.rank == 0
    say, show_progress = (say, show_progress) if is_first else (lambda line: None, False)
    job = prepare(config, world, say)
    path = job.folder / HEATMAP_FILE
    refuse_other_run(path, job.run_id)
    if world.gather(path.exists() and config.output.resume)[0]:
        say(f"{path} is finished already (run {job.run_id}); set output.resume=false to compute it again")
        return load_heatmap(path) if is_first else None
    with PartialWriter(partial_path(job.folder, world.rank), _header(job), resume=config.output.resume) as writer:
        memory = _score_missing_layers(job, writer, say, show_progress)
    partial = read_partial(writer.path)
    frame = from_json(partial.header.extra, str(writer.path))
    layers = _over_ranks(job, frame, {layer.layer: partial.read_layer(layer.layer) for layer in frame.layers})
    if world.size > 1:
        say(memory_table(world.gather(dataclasses.asdict(memory))))
    heatmap = finish(assemble(frame, layers), config, path, say) if is_first else None
    if not config.output.partials:
        world.gather(None)  # not before rank 0 has written the heatmap
        partial.path.unlink()
    return heatmap


def tested(heatmap: Heatmap, config: RunConfig) -> Heatmap:
    """The heatmap with the tests that the configuration asks for."""
    settings = config.statistics
    tests = QKOVStatistics(
        fdr_alpha=settings.fdr_alpha,
        n_permutations=settings.permutations,
        n_bootstrap=settings.bootstrap,
        seed=settings.seed,
        alternative="less" if config.metric.score == "signed" else "greater",  # conflict is negative where it is signed
    )
    return heatmap.with_statistics(tests.test_heatmap(heatmap))


def finish(heatmap: Heatmap, config: RunConfig, path: Path, say: Say) -> Heatmap:
    """Test and write a heatmap as its configuration says, and pass on its warnings and notes."""
    if config.statistics.enabled:
        say("testing heads")
        heatmap = tested(heatmap, config)
    heatmap.save(path, cast(Pairs, config.output.pairs))
    for warning in heatmap.attributes["warnings"]:
        say(f"warning: {warning}")
    for note in (heatmap.statistics or {}).get("notes", ()):
        say(f"note: {note}")
    return heatmap


def _score_missing_layers(job: Job, writer: PartialWriter, say: Say, show_progress: bool) -> Memory:
    """Capture once, then score and record each layer that is not on every rank's disk yet."""
    world = job.team.world
    done = set.intersection(*map(set, world.gather(sorted(writer.completed))))
    todo = Plan(tuple(layer for layer in job.plan.layers if layer.layer not in done))
    if not todo.layers:
        return memory_of(job.loaded.model)
    if done:
        say(f"resuming: {len(done)} of {len(job.plan.layers)} layers are on disk")
    budget = job.config.compute.factor_memory_mb * 2**20
    writer.remove_leftovers(SPILLED)
    with closing(FactorStore(budget, writer.folder, job.team.local)) as store:
        writer.header = dataclasses.replace(writer.header, extra=to_json(_capture(job, todo, store, show_progress)))
        exchange = Exchange(job.team, store)
        roles, settings = job.roles(), job.settings()
        memory = memory_of(job.loaded.model, store, todo, roles, settings.dtype)
        with progress_bar("scoring", len(todo.layers), "layer", show=show_progress) as advance:
            for layer in todo.layers:
                with exchange.layer(job.layout.layer(layer.layer), layer.sites) as source:
                    blocks = score_layer(layer, source, roles, settings, job.team.totals)
                if layer.layer not in writer.completed:
                    part = layer_partial(blocks)
                    writer.write_layer(layer.layer, part.blocks, part.shared)
                advance(1)
        return dataclasses.replace(memory, sent=exchange.bytes_sent)


def _over_ranks(job: Job, frame: Frame, mine: dict[int, LayerPartial]) -> dict[int, LayerPartial]:
    """Every layer's sum over all ranks; kept on rank 0."""
    world, shape = job.team.world, job.roles().shape
    summed = {}
    for layer in frame.layers:
        part = add_over_ranks(mine.pop(layer.layer), layer, shape, world)
        if world.rank == 0:
            summed[layer.layer] = part
    return summed


def _capture(job: Job, plan: Plan, store: FactorStore, show_progress: bool) -> Frame:
    """Run every sample once; returns the frame of the whole job."""
    collection = Collection(
        store,
        plan.sites,
        cast(Objective, job.loaded.objective),
        job.config.metric.loss_reduction,
        batch_tokens=job.config.compute.batch_tokens,
        team=job.team,
    )
    share = -(-job.num_samples // job.team.peers.size)
    with progress_bar("capturing", share, "sample", show=show_progress) as advance:
        for task in job.tasks:
            collection.run(job.loaded.model, task.name, task.samples, advance)
    num_a = len(job.tasks[0].samples)
    return make_frame(
        job.plan,
        job.layout,
        (job.tasks[0].name, job.tasks[1].name),
        (collection.records[:num_a], collection.records[num_a:]),
        pooled=job.pooled,
        attributes=run_attributes(job.config, job.layout, job.run_id),
    )


def _header(job: Job) -> PartialHeader:
    (num_left, num_right), world = job.roles().shape, job.team.world
    layers = tuple(layer.layer for layer in job.plan.layers)
    return PartialHeader(job.run_id, world.rank, world.size, num_left, num_right, layers, job.pooled)
