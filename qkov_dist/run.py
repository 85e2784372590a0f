"""The one loop: load, find the heads, read the tasks, plan, capture, score layer by layer, test, write.

Everything that can be refused is refused before the first batch: the configuration, the model, the layout, the tasks,
and an output folder that belongs to another run. A layer is recorded when its scores are on disk; the same command goes
on from there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from .batches import Objective
from .collection import Collection
from .config import RunConfig, canonical_json
from .engine import Roles, ScoreSettings, score_layer
from .errors import QkovError
from .factors import FactorStore
from .fingerprint import fingerprint
from .fisher import Estimator, Scope, fisher_steps, fisher_weights
from .frame import Frame, from_json, make_frame, to_json
from .hdf5_write import refuse_other_run
from .merge import assemble, layer_partial
from .models import LoadedModel, load_model
from .partial_schema import PartialHeader
from .partials import PartialWriter, partial_path, read_partial
from .plan import Plan, Selection, make_plan
from .progress import progress_bar
from .proof import resolve_proved
from .provenance import run_attributes
from .results import Heatmap, Pairs
from .samples import Task, task_fingerprint
from .score import Score
from .slices import Layout
from .statistics import QKOVStatistics
from .store import load_heatmap
from .tasks import load_task

HEATMAP_FILE = "heatmap.h5"
DTYPES = {"float32": torch.float32, "float64": torch.float64}
Say = Callable[[str], object]


@dataclass(frozen=True)
class Job:
    """Everything that is known before the first batch.

    Attributes:
        config: The resolved configuration.
        loaded: The model, its tokenizer and limits.
        layout: Where each head is, proved.
        tasks: A and B.
        plan: The tiles of every layer.
        run_id: Hash of the configuration's identity, the model and the samples.
    """

    config: RunConfig
    loaded: LoadedModel
    layout: Layout
    tasks: tuple[Task, Task]
    plan: Plan
    run_id: str

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.config.output.dir)

    @property
    def pooled(self) -> bool:
        """Whether scores among all pooled samples are needed."""
        return self.config.statistics.enabled or self.config.output.pairs == "all"

    @property
    def num_samples(self) -> int:
        """Samples of both tasks."""
        return sum(len(task.samples) for task in self.tasks)

    @property
    def device(self) -> torch.device:
        """Where the model is, and where scores are formed."""
        return torch.device(next(self.loaded.model.parameters()).device)

    def settings(self) -> ScoreSettings:
        """The metric's numbers."""
        metric, ridge = self.config.metric, self.config.ridge
        dtype = DTYPES[self.config.compute.score_dtype]
        return ScoreSettings(
            cast(Score, metric.score), ridge.epsilon, ridge.absolute, ridge.relative, dtype, self.device
        )

    def roles(self) -> Roles:
        """All samples are members, A's first."""
        fisher, num_a, num = self.config.fisher, len(self.tasks[0].samples), self.num_samples
        scope, estimator = cast(Scope, fisher.scope), cast(Estimator, fisher.estimator)
        steps = fisher_steps(num_a, num - num_a, batch_size=fisher.batch_size, scope=scope)
        weights = fisher_weights(steps, num, estimator=estimator, decay=fisher.decay)
        if self.pooled:
            return Roles(tuple(range(num)), weights, slice(0, num), slice(0, num))
        return Roles(tuple(range(num)), weights, slice(0, num_a), slice(num_a, num))


def run(config: RunConfig, *, say: Say = print, show_progress: bool = True) -> Heatmap:
    """Run a configuration to the end and write ``heatmap.h5`` into its output folder.

    Args:
        config: The resolved configuration.
        say: Takes one line about each stage.
        show_progress: Show progress bars on stderr.

    Returns:
        The heatmap as written; the one on disk where this very run was finished before.

    Raises:
        QkovError: for anything wrong with the input, the model, or the output folder.
    """
    job = prepare(config, say)
    path = job.folder / HEATMAP_FILE
    refuse_other_run(path, job.run_id)
    if path.exists() and config.output.resume:
        say(f"{path} is finished already (run {job.run_id}); set output.resume=false to compute it again")
        return load_heatmap(path)
    with PartialWriter(partial_path(job.folder, rank=0), _header(job), resume=config.output.resume) as writer:
        _score_missing_layers(job, writer, say, show_progress)
    partial = read_partial(writer.path)
    frame = from_json(partial.header.extra, str(writer.path))
    heatmap = assemble(frame, {layer.layer: partial.read_layer(layer.layer) for layer in frame.layers})
    if config.statistics.enabled:
        say("testing heads")
        heatmap = tested(heatmap, config)
    heatmap.save(path, cast(Pairs, config.output.pairs))
    if not config.output.partials:
        partial.path.unlink()
    for warning in heatmap.attributes["warnings"]:
        say(f"warning: {warning}")
    return heatmap


def prepare(config: RunConfig, say: Say = print) -> Job:
    """Load and check everything; nothing is written.

    Raises:
        QkovError: as :func:`run` does.
    """
    _check_parallel(config)
    say(f"loading {config.model.path}")
    device = {"": "cuda:0"} if torch.cuda.is_available() else None
    loaded = load_model(config.model, device_map=device)
    layout = resolve_proved(loaded.model)
    a, b = (
        load_task(
            task,
            loaded.tokenizer,
            vocab_size=loaded.vocab_size,
            max_positions=loaded.max_positions,
            objective=loaded.objective,
        )
        for task in config.tasks
    )
    _check_samples(config, (a, b))
    plan = make_plan(
        layout,
        Selection(config.metric.layers, config.metric.heads),
        include_bias=config.metric.include_bias,
        num_samples=len(a.samples) + len(b.samples),
        itemsize=DTYPES[config.compute.score_dtype].itemsize,
    )
    content = [canonical_json(config), fingerprint(loaded.model), task_fingerprint(a), task_fingerprint(b)]
    run_id = hashlib.sha256("\n".join(content).encode()).hexdigest()[:16]
    say(_summary(layout, plan, (a, b)))
    return Job(config, loaded, layout, (a, b), plan, run_id)


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


def _score_missing_layers(job: Job, writer: PartialWriter, say: Say, show_progress: bool) -> None:
    """Capture once, then score and record each layer that is not on disk yet."""
    todo = Plan(tuple(layer for layer in job.plan.layers if layer.layer not in writer.completed))
    if not todo.layers:
        return
    if writer.completed:
        say(f"resuming: {len(writer.completed)} of {len(job.plan.layers)} layers are on disk")
    budget = job.config.compute.factor_memory_mb * 2**20
    with closing(FactorStore(budget, job.folder)) as store:
        writer.header = dataclasses.replace(writer.header, extra=to_json(_capture(job, todo, store, show_progress)))
        roles, settings = job.roles(), job.settings()
        with progress_bar("scoring", len(todo.layers), "layer", show=show_progress) as advance:
            for layer in todo.layers:
                part = layer_partial(score_layer(layer, store, roles, settings))
                writer.write_layer(layer.layer, part.blocks, part.shared)
                advance(1)


def _capture(job: Job, plan: Plan, store: FactorStore, show_progress: bool) -> Frame:
    """Run every sample once; returns the frame of the whole job."""
    collection = Collection(
        store,
        plan.sites,
        cast(Objective, job.loaded.objective),
        job.config.metric.loss_reduction,
        batch_tokens=job.config.compute.batch_tokens,
    )
    with progress_bar("capturing", job.num_samples, "sample", show=show_progress) as advance:
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
    num_left, num_right = job.roles().shape
    layers = tuple(layer.layer for layer in job.plan.layers)
    return PartialHeader(job.run_id, 0, 1, num_left, num_right, layers, job.pooled)


def _check_parallel(config: RunConfig) -> None:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1 and config.parallel.tp == 1 and config.parallel.shard in ("auto", "none"):
        return
    raise QkovError(
        "parallel",
        expected="one process with tp: 1 and shard: auto or none",
        got=f"{world_size} process(es), tp: {config.parallel.tp}, shard: {config.parallel.shard}",
        remedy="Run in a single process.",
    )


def _check_samples(config: RunConfig, tasks: tuple[Task, Task]) -> None:
    for task in tasks:
        if config.statistics.enabled and len(task.samples) < 2:
            raise QkovError(
                f"task {task.name!r}",
                expected="at least two samples to test with",
                got=str(len(task.samples)),
                remedy="Give more samples, or set statistics.enabled=false.",
            )


def _summary(layout: Layout, plan: Plan, tasks: tuple[Task, Task]) -> str:
    names = " x ".join(f"{task.name} ({len(task.samples)} samples)" for task in tasks)
    skipped = f", {len(layout.others)} without softmax attention" if layout.others else ""
    return f"{layout.model_type}: {len(plan.layers)} of {layout.num_layers} layers{skipped}; {names}"
