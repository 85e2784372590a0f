"""Scores from Python: pairs, and whole heatmaps, of samples that a :class:`FisherCollector` has collected.

metric  = QKOVInterferenceMetric(config, collector)
heatmap = metric.compute_heatmap("math", "code", layers=[3, 4, 5])
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, cast, get_args

import numpy as np
import torch

from .collector import FisherCollector, QKOVConfig
from .config import FEWEST_TASKS, MOST_TASKS
from .console import Console
from .distributed.connect import step
from .distributed.shared_errors import together
from .distributed.world import Alone
from .errors import QkovError, ascending, choose, is_whole, wrong_argument
from .finish import combine_tasks, with_tested_effects
from .layout.heads import BLOCKS
from .results.assemble import assemble
from .results.effects import Effects
from .results.head_slices import slices_of
from .results.heatmap import Heatmap
from .results.heatmap_data import Pairs
from .results.metadata import HeatmapMetadata, layer_axes, make_metadata, with_norms
from .results.partial_schema import LayerPartial
from .results.reduce import add_over_ranks, layer_partial
from .results.task_matrix import TaskMatrix
from .scoring.collected import CollectedTasks
from .scoring.engine import rounds_of, score_rounds
from .scoring.exchange import Exchange
from .scoring.fisher import Scope
from .scoring.native_kernel import has_native_kernel
from .scoring.own_share_records import formed_with
from .scoring.sample_norms import norms_of, summed_squares, unit_scales
from .scoring.score import worth_compiling
from .scoring.score_kinds import Score
from .scoring.settings import DTYPES, Roles, ScoreSettings
from .scoring.tiles import Selection, TilePlan, make_tile_plan, tile_bytes


@dataclass
class QKOVInterferenceMetric:
    """Scores pairs of collected samples, head by head.

    Args:
        config: Where the heads are.
        collector: Both tasks' samples.
        epsilon: Floor of I.
        ridge_lambda: Absolute ridge, added to the floored I.
        ridge_relative: Relative ridge, a multiple of the mean of I over the layer's block. Where it is the only one of
            the three, scores scale exactly with the loss.
        score: ``interference``, ``signed``, ``symmetric`` or ``curvature``.
        scope: Samples of the Fisher: ``pooled`` (both tasks), ``a`` or ``b`` (as in ``compute_heatmap(a, b)``).
        include_bias: Add the biases of Q, K and V to their heads.
        sample_scale: ``none``, or ``unit``: divide each sample's gradient by its norm over all scored weights, so that
            no loud sample decides; scores, the Fisher and effects are then of scaled gradients. Of a single pair the
            norm is over all collected layers and heads.
        dtype: ``float32`` or ``float64``, of gradients and scores.
        show_progress: Show a progress bar.
        device: Where scores are formed: ``cpu``, ``cuda`` or ``cuda:N``; by default the GPU of the model that was
            collected, which then holds two projections' factors of all samples at a time, else the CPU.
    """

    config: QKOVConfig
    collector: FisherCollector
    epsilon: float = 0.0
    ridge_lambda: float = 0.0
    ridge_relative: float = 1e-3
    score: Score = "interference"
    scope: Scope = "pooled"
    include_bias: bool = False
    dtype: str = "float32"
    show_progress: bool = field(default=False, kw_only=True)
    device: str | None = field(default=None, kw_only=True)
    sample_scale: str = field(default="none", kw_only=True)

    def __post_init__(self) -> None:
        choose("score", self.score, get_args(Score))
        choose("scope", self.scope, get_args(Scope))
        choose("sample_scale", self.sample_scale, ("none", "unit"))
        choose("dtype", self.dtype, tuple(DTYPES))
        if self.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", str(self.device)):
            raise wrong_argument("device", "cpu, cuda or cuda:N", repr(self.device))
        if self.device not in (None, "cpu") and not torch.cuda.is_available():
            raise wrong_argument("device", "cpu, where torch finds no CUDA device", repr(self.device))
        values = {"epsilon": self.epsilon, "ridge_lambda": self.ridge_lambda, "ridge_relative": self.ridge_relative}
        for name, value in values.items():
            if not (value >= 0 and np.isfinite(value)):
                raise wrong_argument(name, "a finite number of at least 0", value)
        if not any(values.values()):
            raise wrong_argument("epsilon", "one of epsilon, ridge_lambda and ridge_relative above 0", 0)

    def compute_sample_pair(
        self, task_a: str, sample_i: int, task_b: str, sample_j: int, layer: int, head: int
    ) -> dict[str, float]:
        """One pair's scores at one query head; K and V are those of its kv head.

        Args:
            task_a: Task of sample i.
            sample_i: Its place among the task's samples, from 0.
            task_b: Task of sample j.
            sample_j: Its place.
            layer: Layer number.
            head: Query head.

        Returns:
            Block -> score, for the blocks that the layer has.
        """

        def prepared() -> tuple[TilePlan, Roles]:
            of_a, of_b = self.collector.samples_of(task_a), self.collector.samples_of(task_b)
            i, j = _place(of_a, sample_i, task_a, "sample_i"), _place(of_b, sample_j, task_b, "sample_j")
            roles = self._chosen((task_a, task_b), ((i,), (j,))).roles(self.scope, pooled=False)
            return self._tile_plan([layer], [head], len(roles.members)), roles

        with step(self.collector.group) as world:
            tile_plan, roles = together(world, prepared)
            everything = together(world, lambda: self._tile_plan(None, None, len(roles.members)))
            blocks = self._scored(tile_plan, self._scaled(everything, roles)[0])[layer].blocks
        return {block: float(blocks[block].scores[0, 0, 0]) for block in BLOCKS if block in blocks}

    def compute_heatmap(
        self,
        task_a: str,
        task_b: str,
        layers: Iterable[int] | None = None,
        heads: Iterable[int] | None = None,
        max_samples_per_task: int | None = None,
        pairs: str = "all",
        *,
        allow_shared_samples: bool = False,
    ) -> Heatmap:
        """Scores of all pairs, all selected layers and heads.

        Every rank of a distributed job calls this, and gets the whole heatmap.

        Args:
            task_a: Task of the samples i.
            task_b: Task of the samples j; not ``task_a``.
            layers: Layer numbers, ascending; all captured ones by default.
            heads: Query heads, ascending; all by default. Kv heads follow.
            max_samples_per_task: Score pairs of the first so many samples of each task. The Fisher takes all.
            pairs: ``cross`` (A x B), or ``all`` pooled samples in both roles, which tests need.
            allow_shared_samples: Go on where more than a tenth of a task's samples occur in the other task too.

        Raises:
            QkovError: for tasks that were not collected, layers, heads or pairs that do not exist, and tasks that
                share samples.
        """

        def check() -> None:
            choose("pairs", pairs, ("cross", "all"))
            if task_a == task_b:
                raise wrong_argument("task_b", "another task than task_a", repr(task_b))

        wanted = (task_a, task_b), layers, heads, max_samples_per_task
        metadata, scored = self._compute(*wanted, pooled=pairs == "all", allowed=allow_shared_samples, check=check)
        return with_tested_effects(assemble(metadata, scored.items()))

    def compute_matrix(
        self,
        tasks: Sequence[str],
        layers: Iterable[int] | None = None,
        heads: Iterable[int] | None = None,
        max_samples_per_task: int | None = None,
        pairs: str = "all",
        *,
        allow_shared_samples: bool = False,
    ) -> TaskMatrix:
        """More than two tasks: scored once among all samples, under the Fisher of all.

        Every rank of a distributed job calls this, and gets the whole matrix. ``QKOVStatistics.test_matrix`` tests it.

        Args:
            tasks: Their names, three or more.
            layers: Layer numbers, ascending; all captured ones by default.
            heads: Query heads, ascending; all by default. Kv heads follow.
            max_samples_per_task: Score pairs of the first so many samples of each task. The Fisher takes all.
            pairs: Which scores of sample pairs each pair's heatmap keeps: ``none``, ``cross``, or ``all`` of its two
                tasks' samples, which tests need.
            allow_shared_samples: Go on where more than a tenth of a task's samples occur in another task too.

        Raises:
            QkovError: as :meth:`compute_heatmap` does, and for fewer than three tasks.
        """

        def check() -> None:
            choose("pairs", pairs, get_args(Pairs))
            if not FEWEST_TASKS < len({*tasks}) == len(tasks) <= MOST_TASKS:
                expected = f"3 to {MOST_TASKS} different names (compute_heatmap takes two)"
                raise wrong_argument("tasks", expected, list(tasks))

        wanted = tuple(tasks), layers, heads, max_samples_per_task
        metadata, scored = self._compute(*wanted, pooled=True, allowed=allow_shared_samples, check=check)
        kept = cast(Pairs, pairs)
        matrix = combine_tasks(metadata, lambda layer: scored[layer.layer], Alone(), pairs=kept)
        assert matrix is not None  # one process is the first
        return matrix

    def compute_effects(
        self,
        task_a: str,
        task_b: str,
        layers: Iterable[int] | None = None,
        heads: Iterable[int] | None = None,
        max_samples_per_task: int | None = None,
        *,
        allow_shared_samples: bool = False,
    ) -> Effects:
        """What a step on one task does to the other's loss, in each head alone; tested.

        The heatmap of :meth:`compute_heatmap` holds the same (``effects``), and has totals, harm and selections of it.
        Every rank of a distributed job calls this. Arguments and errors are those of :meth:`compute_heatmap`.

        Returns:
            Block -> ``sgd`` or ``adam`` -> name (``results.effects.EFFECT_KEYS``) -> float64 [layer, native head].
        """
        heatmap = self.compute_heatmap(
            task_a, task_b, layers, heads, max_samples_per_task, "cross", allow_shared_samples=allow_shared_samples
        )
        return heatmap.effects or {}

    def _compute(
        self,
        tasks: tuple[str, ...],
        layers: Iterable[int] | None,
        heads: Iterable[int] | None,
        max_samples: int | None,
        *,
        pooled: bool,
        allowed: bool,
        check: Callable[[], object],
    ) -> tuple[HeatmapMetadata, dict[int, LayerPartial]]:
        """The scores of some tasks' samples, layer by layer, added up over the ranks; and what they are scores of."""

        def prepared() -> tuple[TilePlan, Roles, HeatmapMetadata]:
            check()
            if max_samples is not None and not is_whole(max_samples, 1):
                raise wrong_argument("max_samples_per_task", "a whole number of at least 1", max_samples)
            chosen = self._chosen(tasks, tuple(self.collector.samples_of(task)[:max_samples] for task in tasks))
            attributes = self._attributes(chosen, chosen.copies(allowed=allowed))
            roles = chosen.roles(self.scope, pooled=pooled)
            roles = replace(roles, own_shares=formed_with(self.score, pooled=pooled))
            tile_plan, layout = self._tile_plan(layers, heads, len(roles.members)), self.config.layout
            metadata = make_metadata(tile_plan, layout, tasks, chosen.by_task, pooled=pooled, attributes=attributes)
            return tile_plan, roles, metadata

        with step(self.collector.group) as world:
            tile_plan, roles, metadata = together(world, prepared)
            roles, norms = self._scaled(tile_plan, roles)
            if norms is not None:
                metadata = with_norms(metadata, norms[: roles.num_scored])
            return metadata, self._scored(tile_plan, roles)

    def _chosen(self, tasks: tuple[str, ...], numbers: tuple[Sequence[int], ...]) -> CollectedTasks:
        collector = self.collector
        return CollectedTasks(tasks, numbers, collector.steps, collector.records, collector.decay)

    def _scaled(self, tile_plan: TilePlan, roles: Roles) -> tuple[Roles, np.ndarray | None]:
        """The roles of gradients as they are scored, and the norms by which they are divided."""
        if self.sample_scale == "none":
            return roles, None
        collection = self.collector.collection
        exchange = Exchange(collection.topology, collection.store, self.config.layout, tile_plan, self._device)
        squares = summed_squares(tile_plan, exchange, roles, self._compiled(tile_plan, roles))
        norms = norms_of(squares, [self.collector.records[n].id for n in roles.members])
        return replace(roles, scales=unit_scales(norms)), norms

    def _scored(self, tile_plan: TilePlan, roles: Roles) -> dict[int, LayerPartial]:
        """Every layer's scores, added up over the ranks."""
        collection, layout = self.collector.collection, self.config.layout
        topology, mine = collection.topology, {}
        exchange = Exchange(topology, collection.store, layout, tile_plan, self._device)
        rounds = rounds_of(tile_plan, topology)
        bar = Console(show_progress=self.show_progress).bar("scoring", len(rounds), "layer")
        settings = self._compiled(tile_plan, roles)
        with (
            bar as advance,
            closing(score_rounds(tile_plan, rounds, exchange, roles, settings, topology)) as scored,
        ):
            for layer, blocks in scored:
                mine[layer.layer] = layer_partial(blocks)
                advance(1)
        return {
            layer.layer: add_over_ranks(
                mine.pop(layer.layer, LayerPartial({}, {})), layer_axes(layer, layout), roles.shape, topology.world
            )
            for layer in tile_plan.layers
        }

    def _attributes(self, chosen: CollectedTasks, warnings: Sequence[str]) -> dict[str, Any]:
        settings = self._settings()
        return {
            "model_type": self.config.layout.model_type,
            "slices": slices_of(self.config.layout, include_bias=self.include_bias),
            "score": self.score,
            "sample_scale": self.sample_scale,
            "scope": self.scope,
            "estimator": chosen.estimator,
            "decay": self.collector.decay,
            "loss_reduction": self.collector.loss_reduction,
            "epsilon": self.epsilon,
            "ridge_absolute": self.ridge_lambda,
            "ridge_relative": self.ridge_relative,
            "include_bias": self.include_bias,
            "dtype": self.dtype,
            "matmul_precision": settings.matmul_precision,
            "warnings": [*warnings, *chosen.warnings()],
        }

    def _settings(self) -> ScoreSettings:
        return ScoreSettings(
            self.score,
            self.epsilon,
            self.ridge_lambda,
            self.ridge_relative,
            DTYPES[self.dtype],
            device=self._device,
        )

    def _compiled(self, tile_plan: TilePlan, roles: Roles) -> ScoreSettings:
        """Settings by which heads are scored by what is compiled, where that is worth it and can be had."""
        settings, on_gpu = self._settings(), self._device.type == "cuda"
        worth = not on_gpu and worth_compiling(len(roles.members) * tile_plan.num_elements, on_gpu=False)
        return replace(settings, compile=worth and has_native_kernel(settings.dtype))

    @property
    def _device(self) -> torch.device:
        return self.collector.device if self.device is None else torch.device(self.device)

    def _tile_plan(self, layers: Iterable[int] | None, heads: Iterable[int] | None, num_samples: int) -> TilePlan:
        if self.collector.config.layout != self.config.layout:
            raise wrong_argument("config", "the configuration of the model that was collected", "another layout")
        captured = self.collector.layers
        chosen = ascending("layers", layers) or tuple(sorted(captured))
        selection = Selection(chosen, ascending("heads", heads))
        for layer in selection.layers_of(self.config.layout):
            if layer.index not in captured:
                raise QkovError(
                    f"layer {layer.index} ({layer.module})",
                    expected="captured factors",
                    got="none",
                    remedy="Create the FisherCollector with this layer among its layers, and collect again.",
                )
        return make_tile_plan(
            self.config.layout,
            selection,
            include_bias=self.include_bias,
            num_samples=num_samples,
            itemsize=DTYPES[self.dtype].itemsize,
            owned=self.collector.collection.topology.owned(),
            tile_bytes=tile_bytes(self._device.type),
        )


def _place(numbers: list[int], place: int, task: str, argument: str) -> int:
    if not 0 <= place < len(numbers):
        raise wrong_argument(argument, f"a sample of task {task!r}, 0 to {len(numbers) - 1}", place)
    return numbers[place]
