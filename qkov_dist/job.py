"""Everything that is known before the first batch: the model on its ranks, the layout, the samples, the plan."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn

from .capture.forms import gradients_above
from .capture.passes import DealtTask
from .capture.soundness import Soundness
from .config import RunConfig, canonical_json, to_dict
from .console import SILENT, Console
from .data.batches import Objective, content_of
from .data.copies import in_one_task, look_for_copies
from .data.samples import Task, task_fingerprint
from .data.tasks import load_task
from .distributed.fingerprint import fingerprint
from .distributed.parallelism import Parallelism, load_parallel, resolve_parallelism
from .distributed.sharded_proof import proved_layout
from .distributed.shared_errors import same_on_all
from .distributed.topology import Topology, make_topology
from .distributed.world import World
from .errors import QkovError
from .layout.heads import Layout, Site
from .layout.modules import num_parameters
from .loading.models import LoadedModel
from .scoring.extent import Scoring, sides
from .scoring.fisher import Estimator, Scope, by_task, fisher_steps, fisher_weights
from .scoring.influence_records import mean_weights
from .scoring.own_share_records import formed_with
from .scoring.pair_kernel import can_use
from .scoring.pair_trial import PairTrials
from .scoring.score import MEANING, compiled, worth_compiling
from .scoring.settings import Roles, ScoreSettings
from .scoring.tiles import TilePlan


@dataclass(frozen=True)
class Job:
    """Everything that is known before the first batch.

    Attributes:
        config: The resolved configuration.
        loaded: The model, its tokenizer and limits.
        layout: Where each head is, proved.
        tasks: All of them; of two the first is A.
        topology: Who runs which samples, and owns what.
        scoring: What is scored, and in which numbers.
        tile_plan: This rank's tiles of every layer.
        batch_tokens: Padded tokens in one compute batch.
        run_id: Hash of the configuration's identity, the model and the samples.
        fingerprint: Hash of the model alone.
        parallelism: How the model is cut, as the configuration and the launcher say.
        warnings: What a reader of the results must know, as far as it is known now, one sentence each.
        notes: What a reader of the results may want to know, besides what the layout says.
    """

    config: RunConfig
    loaded: LoadedModel
    layout: Layout
    tasks: tuple[Task, ...]
    topology: Topology
    scoring: Scoring
    tile_plan: TilePlan
    batch_tokens: int
    run_id: str
    fingerprint: str
    parallelism: Parallelism
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.config.output.dir)

    @property
    def num_samples(self) -> int:
        """Samples of all tasks."""
        return sum(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each task."""
        return tuple(len(task.samples) for task in self.tasks)

    @property
    def device(self) -> torch.device:
        """Where the model is, and where scores are formed."""
        return torch.device(next(self.loaded.model.parameters()).device)

    @property
    def objective(self) -> Objective:
        """How labels align with outputs."""
        return cast(Objective, self.loaded.objective)

    @cached_property
    def lengths_here(self) -> tuple[int, ...]:
        """Tokens of each sample that this rank runs."""
        group = self.topology.dp_group
        dealt = [DealtTask(task.samples, self.objective, group.size) for task in self.tasks]
        return tuple(length for of_task in dealt for length in of_task.lengths_on(group.rank))

    @cached_property
    def soundness(self) -> Soundness:
        """What is known of the model's passes, from sweep to sweep."""
        return Soundness()

    def gradients_above(self) -> dict[Site, int]:
        """By site, the tokens above which a sample's gradient is smaller than its factors."""
        layers = (self.layout.layer(layer.layer) for layer in self.tile_plan.layers)
        return gradients_above(layers, self.scoring.factor_itemsize)

    def settings(self, scratch: Path | None = None, console: Console = SILENT) -> ScoreSettings:
        """The metric's numbers.

        Args:
            scratch: The folder for scores too large for memory.
            console: Is told where memory ran out, and where nothing can be compiled.

        Raises:
            QkovError: where ``compute.compile`` is true and nothing can be compiled.
        """
        settings = replace(ScoreSettings.of(self.config), device=self.device, scratch=scratch, warn=console.warn)
        settings = replace(settings, compile=self._compiles(settings, console))
        if not settings.compile or not can_use(settings.dtype, self.device):
            return settings
        return replace(settings, trials=PairTrials(settings.matmul_precision, console.warn))

    def _compiles(self, settings: ScoreSettings, console: Console) -> bool:
        """Whether scores are formed by what is compiled, and it is.

        Raises:
            QkovError: where it has to be, and cannot.
        """
        setting, on_gpu = self.config.compute.compile, self.device.type == "cuda"
        elements = self.num_samples * self.tile_plan.num_elements
        if setting is False or (setting == "auto" and not worth_compiling(elements, on_gpu=on_gpu)):
            return False
        try:
            compiled(self.device.type) if on_gpu else replace(settings, compile=True).kernel
        except QkovError as error:
            if setting != "auto":
                raise
            console.warn(f"scores are formed by torch's products: {error}")
            return False
        return True

    def roles(self) -> Roles:
        """All samples are members, task after task."""
        fisher, sizes, num = self.config.fisher, self.sizes, self.num_samples
        scope, estimator = cast(Scope, fisher.scope), cast(Estimator, fisher.estimator)
        steps = fisher_steps(sizes, batch_size=fisher.batch_size, scope=scope)
        weights = fisher_weights(steps, num, estimator=estimator, decay=fisher.decay)
        weights = by_task(weights, np.repeat(np.arange(len(sizes)), sizes), len(sizes))
        left, right = sides(sizes, pooled=self.config.pooled)
        means = mean_weights(in_one_task(self._contents), sizes)
        with_shares = formed_with(self.config.metric.score, pooled=self.config.pooled)
        return Roles(tuple(range(num)), weights, left, right, means, sizes, own_shares=with_shares)

    @cached_property
    def _contents(self) -> tuple[list[str], ...]:
        """By task, what its samples are known again by."""
        return tuple([content_of(sample, self.objective) for sample in task.samples] for task in self.tasks)


def prepare(config: RunConfig, world: World, console: Console = SILENT) -> Job:
    """Load and check everything, on every rank alike; nothing is written.

    Raises:
        QkovError: for anything wrong with the configuration, the model or the tasks, and for ranks that differ.
    """
    same_on_all(world, "configuration", _flat(to_dict(config)))
    _refuse_a_file(Path(config.output.dir))
    parallelism = resolve_parallelism(config.parallel, world.size, os.environ)
    cut = f" on {world.size} ranks ({parallelism.words})" if world.size > 1 else ""
    console.say(f"loading {config.model.path}{cut}")
    loaded = load_parallel(config.model, parallelism, world)
    layout = proved_layout(loaded.model, world)
    tasks = _tasks(config, loaded)
    copies = _copies(config, tasks, cast(Objective, loaded.objective))
    scoring = _scoring(config, tasks, loaded.model)
    layers = [layer.index for layer in scoring.selection.layers_of(layout)]
    topology = make_topology(world, loaded.model, layout, layers, context=parallelism.context)
    tile_plan = scoring.tile_plan(layout, topology.owned())
    model = fingerprint(loaded.model, world)
    run_id = _run_id(config, model, tasks)
    same_on_all(world, "model and samples", {"run_id": run_id})
    console.say(_summary(layout, tile_plan, tasks))
    batch_tokens = parallelism.batch_tokens(
        config.compute, on_gpu=scoring.on_gpu, num_parameters=num_parameters(loaded.model)
    )
    warnings = (*loaded.warnings, *(warning for task in tasks for warning in task.warnings), *copies)
    notes = (*loaded.notes, *(note for task in tasks for note in task.notes))
    for note in notes:
        console.say(f"note: {note}")
    return Job(
        config,
        loaded,
        layout,
        tasks,
        topology,
        scoring,
        tile_plan,
        batch_tokens,
        run_id,
        model,
        parallelism,
        warnings,
        notes,
    )


def _refuse_a_file(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        remedy = "Name a folder; it is made where it does not exist."
        raise QkovError("output.dir", expected="a folder", got=f"the file {folder}", remedy=remedy)


def _copies(config: RunConfig, tasks: tuple[Task, ...], objective: Objective) -> list[str]:
    """Warnings of samples that several tasks have."""
    return look_for_copies(
        [task.name for task in tasks],
        [[content_of(sample, objective) for sample in task.samples] for task in tasks],
        [[sample.id for sample in task.samples] for task in tasks],
        allowed=config.statistics.allow_shared_samples,
    )


def _scoring(config: RunConfig, tasks: tuple[Task, ...], model: nn.Module) -> Scoring:
    """What is scored, on the device of the model."""
    first, num_samples = next(model.parameters()), sum(len(task.samples) for task in tasks)
    return Scoring.of(config, num_samples, model_itemsize=first.dtype.itemsize, on_gpu=first.device.type != "cpu")


def _run_id(config: RunConfig, model: str, tasks: tuple[Task, ...]) -> str:
    """A hash of what a run's scores follow from; ``model`` is the model's fingerprint."""
    content = [f"results of meaning {MEANING}", canonical_json(config), model, *map(task_fingerprint, tasks)]
    return hashlib.sha256("\n".join(content).encode()).hexdigest()[:16]


def _tasks(config: RunConfig, loaded: LoadedModel) -> tuple[Task, ...]:
    tasks = tuple(
        load_task(
            task,
            loaded.tokenizer,
            vocab_size=loaded.vocab_size,
            max_positions=loaded.max_positions,
            objective=loaded.objective,
        )
        for task in config.tasks
    )
    for task in tasks:
        if config.statistics.enabled and len(task.samples) < 2:
            raise QkovError(
                f"task {task.name!r}",
                expected="at least two samples to test with",
                got=str(len(task.samples)),
                remedy="Give more samples, or set statistics.enabled=false.",
            )
    return tasks


def _flat(tree: object, prefix: str = "") -> dict[str, object]:
    """Nested settings as ``section.key`` -> value."""
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list) and any(isinstance(value, dict) for value in tree):
        items = {str(n): value for n, value in enumerate(tree)}.items()
    else:
        return {prefix.removesuffix("."): tree}
    return {name: value for key, part in items for name, value in _flat(part, f"{prefix}{key}.").items()}


def _summary(layout: Layout, tile_plan: TilePlan, tasks: tuple[Task, ...]) -> str:
    names = " x ".join(f"{task.name} ({len(task.samples)} samples)" for task in tasks)
    skipped = f", {len(layout.others)} without softmax attention" if layout.others else ""
    return f"{layout.model_type}: {len(tile_plan.layers)} of {layout.num_layers} layers{skipped}; {names}"
