"""Other libraries on the same model and samples. Each is optional: without it the table says so.

They are installed by launch/bench.sh into a folder of their own, which comes last on the path, so that none of them can
replace a package of the product's environment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from device import on_gpu
from gradients import BATCH_TOKENS, Gradients, batches, losses, projections, trainable
from material import Subject
from torch import Tensor, nn
from torch.utils.data import Dataset

from qkov_dist.data.batches import sequence

FOLDER = Path(os.environ.get("QKOV_BENCH_PEERS", Path(sys.prefix) / "peers"))
DAMPING = 1e-8


def find_peers() -> None:
    """Let the peers be imported."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))


def opacus_gradients(subject: Subject) -> Gradients:
    """Opacus' ``grad_sample`` of the attention projections."""
    find_peers()
    from opacus import GradSampleModule

    model, names = subject.loaded.model, projections(subject)
    with trainable(model, names) as weights:
        wrapped = GradSampleModule(model, loss_reduction="sum", strict=False)
        wrapped.train()  # its hooks sleep otherwise; there is no dropout
        for batch in batches(subject):
            logits = wrapped(input_ids=batch.input_ids, use_cache=False).logits
            losses(logits, batch.targets).sum().backward()
            yield batch.samples, {name: weight.grad_sample for name, weight in zip(names, weights, strict=True)}
            for weight in weights:
                weight.grad = weight.grad_sample = None
        wrapped.to_standard_module()
        model.eval()


def bergson_gradients(subject: Subject) -> Gradients:
    """Bergson's collector of whole gradients (no projection), without its index on disk."""
    found: list[tuple[tuple[int, ...], Mapping[str, Tensor]]] = []
    _bergson(subject, lambda numbers, gradients: found.append((tuple(numbers), gradients)))
    inner = _inner_names(subject)
    shapes = {name: subject.loaded.model.get_submodule(name).weight.shape for name in inner}
    for numbers, gradients in found:
        yield numbers, {name: gradients[inner[name]].view(-1, *shape) for name, shape in shapes.items()}


def bergson_collection(subject: Subject, *, store: bool = False) -> None:
    """The same, keeping nothing, or its index on disk."""
    _bergson(subject, lambda numbers, gradients: None, store=store)


def dattri_scores(subject: Subject) -> Tensor:
    """dattri-LLM's inner products of gradients, over all projections together, [A, B]."""
    find_peers()
    from dattri_llm import AttributionArguments, AttributionTask, HookManagerConfig, TracInAttributor

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return losses(model(input_ids=batch["input_ids"], use_cache=False).logits, batch["targets"]).sum()

    model, names = subject.loaded.model, projections(subject)
    size = max(BATCH_TOKENS // subject.tokens, 1)
    with TemporaryDirectory() as folder, trainable(model, names):
        settings = AttributionArguments(folder, per_device_train_batch_size=size, per_device_eval_batch_size=size)
        attributor = TracInAttributor(settings, task=AttributionTask(loss, model))
        hooks = HookManagerConfig(hook_types=dict.fromkeys(names, "linear_io"))
        found = attributor.attribute(_Tokens(subject, [0]), _Tokens(subject, [1]), hook_config=hooks)
        _, scores = found.agnostic_matrix()
    return scores


def kronfluence_analysis(subject: Subject) -> Callable[[], dict[str, Tensor]]:
    """Wrap the model for good; what comes back fits diagonal factors and scores all pairs anew at each call.

    The scores are {projection: [A, B]}, sum g_i g_j / (mean g^2 + damping).
    """
    find_peers()
    from kronfluence.analyzer import Analyzer
    from kronfluence.arguments import FactorArguments, ScoreArguments

    size = max(BATCH_TOKENS // subject.tokens, 1)
    left, right, pooled = (_Tokens(subject, tasks) for tasks in ([0], [1], [0, 1]))
    model, task = _tracked(subject)

    def analyse() -> dict[str, Tensor]:
        with TemporaryDirectory() as folder:
            analyzer = Analyzer("bench", model, task, cpu=not on_gpu(), disable_tqdm=True, output_dir=folder)
            analyzer.fit_all_factors(
                "factors",
                pooled,
                per_device_batch_size=size,
                factor_args=FactorArguments(strategy="diagonal", use_empirical_fisher=True),
            )
            analyzer.compute_pairwise_scores(
                "scores",
                "factors",
                left,
                right,
                per_device_query_batch_size=len(left),
                per_device_train_batch_size=size,
                score_args=ScoreArguments(damping_factor=DAMPING, compute_per_module_scores=True),
            )
            return dict(analyzer.load_pairwise_scores("scores"))

    return analyse


class _Tokens(Dataset[dict[str, Tensor]]):
    """The samples of some tasks, as a data set of tensors."""

    def __init__(self, subject: Subject, tasks: list[int]) -> None:
        self._samples = [sequence(sample, "causal") for task in tasks for sample in subject.tasks[task]]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        sample = self._samples[number]
        return {"input_ids": torch.from_numpy(sample.input_ids), "targets": torch.from_numpy(sample.targets)}


def _tracked(subject: Subject) -> tuple[nn.Module, Any]:
    """The model with Kronfluence's wrappers, which stay, and the task that they know."""
    from kronfluence.analyzer import prepare_model
    from kronfluence.module.tracked_module import TrackedModule
    from kronfluence.task import Task

    class LanguageModelling(Task):
        def compute_train_loss(self, batch: dict[str, Tensor], model: nn.Module, sample: bool = False) -> Tensor:
            return losses(model(input_ids=batch["input_ids"], use_cache=False).logits, batch["targets"]).sum()

        def compute_measurement(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return list(names)

    model = subject.loaded.model
    names = projections(subject)
    task = LanguageModelling()
    wrapped = any(isinstance(module, TrackedModule) for module in model.modules())
    return model if wrapped else prepare_model(model, task), task


def _bergson(
    subject: Subject, take: Callable[[list[int], Mapping[str, Tensor]], object], *, store: bool = False
) -> None:
    """Collect the gradients of all samples, batch by batch, as Bergson's own worker does."""
    find_peers()
    from bergson import CollectorComputer, GradientCollector, GradientProcessor, IndexConfig
    from datasets import Dataset as Rows

    class Collector(GradientCollector):
        def process_batch(self, indices: list[int], **kwargs: Any) -> None:
            take(indices, dict(self.mod_grads))
            super().process_batch(indices, **kwargs)

    samples = [sample for task in subject.tasks for sample in task]
    rows = {"input_ids": [s.input_ids.tolist() for s in samples], "labels": [s.labels.tolist() for s in samples]}
    model = subject.loaded.model
    with TemporaryDirectory() as folder, trainable(model, ()):
        model.get_input_embeddings().requires_grad_(True)
        config = IndexConfig(run_path=f"{folder}/index", loss_reduction="mean")
        config.partial_run_path.mkdir()
        data = Rows.from_dict(rows)
        collector = Collector(
            model=model.base_model,
            data=data,
            cfg=config,
            processor=GradientProcessor(),
            target_modules=set(_inner_names(subject).values()),
            skip_index=not store,
        )
        groups = [list(batch.samples) for batch in batches(subject)]
        CollectorComputer(model, data, collector=collector, batches=groups, cfg=config).run_with_collector_hooks()


def _inner_names(subject: Subject) -> dict[str, str]:
    """Projection -> its path inside the base model, by which Bergson calls it."""
    prefix = subject.loaded.model.base_model_prefix + "."
    return {name: name.removeprefix(prefix) for name in projections(subject)}
