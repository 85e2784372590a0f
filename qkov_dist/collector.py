"""Collecting gradients from Python: the model's heads, and the samples of each task, step by step.

    config    = QKOVConfig.from_model(model)
    collector = FisherCollector(gradient_memory_mb=100)
    collector.collect_fisher(model, batch_a, task="math", mode="ema")     # one call = one step of the moving average
    collector.collect_fisher(model, batch_b, task="code", mode="ema")

Scores come from :mod:`qkov_dist.metric`. Both stand on the engine of `qkov run`.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from torch import nn

from .capture.collect import Collection, SampleRecord
from .capture.forms import gradients_above
from .capture.store import FactorStore
from .data.batches import Objective, default_batch_tokens
from .data.given import samples_given
from .data.samples import Sample, Task, task_fingerprint
from .distributed.connect import step
from .distributed.sharded_proof import proved_layout
from .distributed.shared_errors import same_on_all, together
from .distributed.topology import make_topology
from .distributed.world import World
from .errors import QkovError, choose, wrong_argument
from .layout.heads import Layout
from .layout.modules import inner_model, is_masked_lm, num_parameters, text_config
from .loading.positions import has_rope, max_positions
from .scoring.collected import Step
from .scoring.fisher import Estimator
from .scoring.tiles import Selection, make_tile_plan


@dataclass(frozen=True)
class QKOVConfig:
    """Where each head of a model is.

    Attributes:
        layout: Every attention layer with its projections and head slices.
        objective: ``causal``, or ``masked`` where labels are not shifted.
    """

    layout: Layout
    objective: Objective = "causal"

    @classmethod
    def from_model(cls, model: nn.Module, group: Any = None) -> QKOVConfig:
        """Find the heads of a model and prove them by perturbation, one layer of each kind.

        Every rank of a sharded model calls this.

        Args:
            model: A transformers language model, as :class:`FisherCollector` takes it.
            group: The process group of torch.distributed whose ranks have the model; None is all ranks.

        Raises:
            QkovError: for an architecture that is refused, or not known and not provable (see ``register_layout``).
        """
        with step(group) as world:
            model = together(world, lambda: inner_model(model))
            return cls(proved_layout(model, world), "masked" if is_masked_lm(model) else "causal")

    @property
    def num_layers(self) -> int:
        """Decoder layers, with or without attention."""
        return self.layout.num_layers

    @property
    def num_heads(self) -> int:
        """Query heads of the layer that has most."""
        return self.layout.num_heads

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads of the layer that has most."""
        return self.layout.num_kv_heads


class FisherCollector:
    """Runs samples once and keeps the factors of their gradients.

    Args:
        reduction: ``param``: the Fisher is kept for every element (the only reduction there is).
        enable_cross_task_analysis: Keep the factors; without them no pair of samples can be scored.
        gradient_memory_mb: MiB of factors kept in memory; beyond it they are spilled to disk.
        loss_reduction: ``mean`` or ``sum`` over each sample's own labelled tokens.
        decay: beta of the moving average.
        layers: Layers to capture; all by default.
        batch_tokens: Padded tokens in one compute batch; None takes 512 on a CPU that holds all weights, 8192 on a GPU
            that holds all of a model of less than a billion parameters, else 2048. Changes no result.
        spill_dir: Folder for factors beyond the memory; the system's temporary folder by default.
        group: The process group of torch.distributed whose ranks have the model and make these calls, and those of the
            metric; None is all ranks.
        cp: Neighbouring ranks that share each sample's tokens, where samples are too long for one of them.
    """

    def __init__(
        self,
        reduction: str = "param",
        enable_cross_task_analysis: bool = True,
        gradient_memory_mb: float = 100,
        *,
        loss_reduction: str = "mean",
        decay: float = 0.99,
        layers: Sequence[int] | None = None,
        batch_tokens: int | None = None,
        spill_dir: str | Path | None = None,
        group: Any = None,
        cp: int = 1,
    ) -> None:
        choose("reduction", reduction, ("param",))
        choose("loss_reduction", loss_reduction, ("mean", "sum"))
        if not 0 < decay < 1:
            raise wrong_argument("decay", "a number above 0 and below 1", decay)
        if gradient_memory_mb < 0:
            raise wrong_argument("gradient_memory_mb", "at least 0", gradient_memory_mb)
        if batch_tokens is not None and batch_tokens < 1:
            raise wrong_argument("batch_tokens", "at least 1", batch_tokens)
        if cp < 1:
            raise wrong_argument("cp", "at least 1", cp)
        self.enabled, self.group, self._context = enable_cross_task_analysis, group, cp
        self.decay = decay
        self.steps: list[Step] = []
        self._selection = Selection(None if layers is None else tuple(layers))
        self._reduction, self._batch_tokens = loss_reduction, batch_tokens
        self._budget, self._folder = int(gradient_memory_mb * 2**20), None if spill_dir is None else Path(spill_dir)
        self._collection: Collection | None = None
        self._config: QKOVConfig | None = None
        self._model: weakref.ref[nn.Module] | None = None
        self._device = torch.device("cpu")

    @property
    def device(self) -> torch.device:
        """The GPU of the model that was collected; the CPU for other devices, and before there is one."""
        return self._device

    def collect_fisher(
        self, model: nn.Module, batch: Mapping[str, Any] | Sequence[Sample], task: str, mode: str = "mean"
    ) -> np.ndarray:
        """Run one batch of a task: one step of the Fisher average.

        Every rank of a distributed job calls this with the same batch; each sample is run on one of them.

        Args:
            model: A transformers language model, as it is: replicated, with DTensor weights, or inside a DeepSpeed
                engine or another wrapper. It is left as it was found.
            batch: ``input_ids`` [N, T], and optionally ``attention_mask`` (padding on either side) and ``labels``
                (-100 ignored; by default every real token), as tensors or nested lists; or a list of ``Sample``.
            task: The task that these samples belong to.
            mode: ``mean`` (plain mean over samples) or ``ema`` (bias-corrected moving average, one step a call: calls
                of unequal size give their samples unequal weight).

        Returns:
            Each sample's own loss, float64 [N].

        Raises:
            QkovError: for a malformed batch, an unknown mode, or a loss or gradient that is not finite.
        """
        with step(self.group) as world:
            together(world, lambda: choose("mode", mode, get_args(Estimator)))
            first, model = len(self.records), together(world, lambda: inner_model(model))
            samples = together(world, lambda: self._samples(model, batch, task))
            found = {"samples": task_fingerprint(Task(task, tuple(samples)))}
            same_on_all(world, _batch_of(task), found)
            if not self.enabled:
                return np.full(len(samples), np.nan)
            numbers = self._start(model, world).run(model, task, samples)
            self.steps.append(Step(task, cast(Estimator, mode), tuple(numbers)))
            return np.array([record.loss for record in self.records[first:]])

    @property
    def records(self) -> list[SampleRecord]:
        """Every sample that has been run, by its pooled number."""
        return self._collection.records if self._collection else []

    @property
    def collection(self) -> Collection:
        """Samples, factors and ranks.

        Raises:
            QkovError: before anything was collected.
        """
        if self._collection is None:
            raise self._nothing("any task")
        return self._collection

    @property
    def config(self) -> QKOVConfig:
        """The heads of the model that was collected.

        Raises:
            QkovError: before anything was collected.
        """
        if self._config is None:
            raise self._nothing("any task")
        return self._config

    @property
    def layers(self) -> frozenset[int]:
        """The layers captured."""
        return frozenset(site.layer for site in self._collection.sites) if self._collection else frozenset()

    @property
    def loss_reduction(self) -> str:
        """``mean`` or ``sum``."""
        return self._reduction

    def samples_of(self, task: str) -> list[int]:
        """Pooled numbers of a task's samples, in the order of collection.

        Raises:
            QkovError: where nothing was collected for this task.
        """
        if not self.enabled:
            raise QkovError(
                "FisherCollector",
                expected="captured gradients of both tasks",
                got="enable_cross_task_analysis=False",
                remedy="Create the collector with enable_cross_task_analysis=True and collect both tasks again.",
            )
        numbers = [number for step in self.steps if step.task == task for number in step.numbers]
        if not numbers:
            raise self._nothing(f"task {task!r}")
        return numbers

    def close(self) -> None:
        """Forget the factors and remove what was spilled."""
        if self._collection is not None:
            self._collection.store.close()
        self._collection, self.steps = None, []

    def _nothing(self, where: str) -> QkovError:
        return QkovError(
            where,
            expected="captured samples",
            got=f"none (collected: {', '.join(sorted({step.task for step in self.steps})) or 'no task'})",
            remedy="Call collect_fisher(model, batch, task=...) for it first.",
        )

    def _samples(self, model: nn.Module, batch: Mapping[str, Any] | Sequence[Sample], task: str) -> list[Sample]:
        text = text_config(model)
        limit = None if has_rope(model) else max_positions(model, text)
        return samples_given(batch, where=_batch_of(task), vocab_size=int(text.vocab_size), max_tokens=limit)

    def _start(self, model: nn.Module, world: World) -> Collection:
        together(world, lambda: self._refuse_another(model))
        if self._collection is None:
            self._model = weakref.ref(model)
            self._config = config = QKOVConfig.from_model(model)
            tile_plan = together(
                world, lambda: make_tile_plan(config.layout, self._selection, include_bias=False, num_samples=1)
            )
            layers = [config.layout.layer(layer.layer) for layer in tile_plan.layers]
            indexes = [layer.index for layer in layers]
            topology = make_topology(world, model, config.layout, indexes, context=self._context)
            first = next(model.parameters())
            self._device = torch.device(first.device if first.device.type == "cuda" else "cpu")
            self._collection = Collection(
                FactorStore(
                    self._budget,
                    self._folder,
                    topology.tp_rects,
                    gradients_above=gradients_above(layers, first.dtype.itemsize),
                ),
                tile_plan.sites,
                config.objective,
                self._reduction,
                batch_tokens=self._batch_tokens
                or default_batch_tokens(
                    on_cpu=first.device.type == "cpu",
                    moves=not topology.passes_alone,
                    num_parameters=num_parameters(model),
                ),
                topology=topology,
            )
        return self._collection

    def _refuse_another(self, model: nn.Module) -> None:
        if self._model is not None and self._model() is not model:
            raise QkovError(
                "collect_fisher",
                expected="the model of the first call, in every call",
                got="another one",
                remedy="Create a FisherCollector for each model: gradients of two models have no common Fisher.",
            )


def _batch_of(task: str) -> str:
    return f"batch of task {task!r}"
