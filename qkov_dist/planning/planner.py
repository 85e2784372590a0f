"""Plans of one model under one setting after another, from descriptions alone: no weights are read."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from qkov_dist.config import RunConfig
from qkov_dist.distributed.parallelism import Parallelism, resolve_parallelism
from qkov_dist.distributed.plans import check_shards
from qkov_dist.layout.modules import is_masked_lm
from qkov_dist.layout.resolve import resolve

from .described import described_model, described_tasks
from .model_sizes import ModelSizes, model_sizes_of
from .run_plan import MIB, RunPlan, least_peak, plan_simulated
from .workload import Workload


@dataclass(frozen=True)
class Setting:
    """What may be changed to make a run fit: the configuration and the number of ranks."""

    config: RunConfig
    num_ranks: int

    def changes(self, other: Setting) -> str:
        """How to turn this setting into another, as arguments of ``qkov plan``."""
        mine, theirs = self.config, other.config
        words = [f"--world-size {other.num_ranks}"] if self.num_ranks != other.num_ranks else []
        for key in ("model.dtype", "parallel.shard", "parallel.cp", "compute.batch_tokens", "compute.factor_memory_mb"):
            section, name = key.split(".")
            value = getattr(getattr(theirs, section), name)
            if value != getattr(getattr(mine, section), name):
                words.append(f"{key}={value}")
        return " ".join(words)


class Planner:
    """Makes plans of one model and its tasks, as far as their descriptions go.

    Args:
        config: Names the model and the tasks.
        samples: Samples of each task, instead of reading them.
        tokens: Tokens of each sample.
        gpu_memory: Bytes of the GPU that each rank has; None where ranks have none.

    Attributes:
        note: How the samples were found.

    Raises:
        QkovError: for a model or tasks that cannot be described.
    """

    def __init__(self, config: RunConfig, samples: int | None, tokens: int | None, *, gpu_memory: int | None) -> None:
        self._on_gpu, self._gpu_memory, self._sizes = gpu_memory is not None, gpu_memory, dict[str, ModelSizes]()
        self._model = described_model(config.model)
        self._recomputes = config.model.attn_implementation != "eager"
        self._layout = resolve(self._model)
        self._tasks, self.note = described_tasks(config, self._model, samples, tokens)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(sample.num_tokens for task in self._tasks for sample in task.samples)

    def batch_tokens(self, setting: Setting) -> int:
        """Padded tokens in one batch."""
        num_parameters = self._model_sizes(setting.config.model.dtype).num_parameters
        return _parallelism(setting).batch_tokens(
            setting.config.compute, on_gpu=self._on_gpu, num_parameters=num_parameters
        )

    def plan(self, setting: Setting) -> RunPlan:
        """The whole plan."""
        parallelism = _parallelism(setting)
        check_shards(self._model, parallelism.experts, parallelism.expert_shards)
        return plan_simulated(self._work(setting), parallelism)

    def least(self, setting: Setting) -> int:
        """Bytes that a rank holds at least, on its GPU or else in the host's memory: quick, and never too much."""
        return least_peak(self._work(setting), _parallelism(setting))

    def _model_sizes(self, dtype: str) -> ModelSizes:
        if dtype not in self._sizes:
            found = model_sizes_of(self._model, self._layout, dtype)
            self._sizes[dtype] = replace(found, recomputes=self._recomputes)
        return self._sizes[dtype]

    def _work(self, setting: Setting) -> Workload:
        config, disk = setting.config, setting.config.compute.factor_disk_mb
        return Workload(
            config=config,
            model_sizes=self._model_sizes(config.model.dtype),
            layout=self._layout,
            tasks=self._tasks,
            batch_tokens=self.batch_tokens(setting),
            objective="masked" if is_masked_lm(self._model) else "causal",
            on_gpu=self._on_gpu,
            gpu_memory=self._gpu_memory,
            workers=1 if self._on_gpu else torch.get_num_threads(),
            disk=None if disk is None else disk * MIB,
        )


def _parallelism(setting: Setting) -> Parallelism:
    return resolve_parallelism(setting.config.parallel, setting.num_ranks, {})
