"""Every way to cut a model, met by one model of each kind: equal to dense float64 autograd, or refused by name.

A way is a `parallel` section of a configuration, or a function of `prepared` that leaves a model as its user would.
Scores are compared on every rank; then once more with one rank's part counted twice, which must not pass. Where ranks
share a sample's tokens, samples of which each rank has its own tokens alone must not pass either.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import prepared
import torch
from collecting import collected
from expected import expected_scores
from jobs import Job, job_for
from torch.utils.cpp_extension import _get_build_directory
from zoo import TINY, Tiny

from qkov_dist import QKOVConfig, QkovError, QKOVInterferenceMetric
from qkov_dist.capture.spans import GatheredFactors
from qkov_dist.config import ModelConfig, ParallelConfig
from qkov_dist.distributed.connect import current
from qkov_dist.distributed.parallelism import load_parallel, resolve_parallelism
from qkov_dist.results.reduce import add_layers, add_over_ranks
from qkov_dist.scoring.settings import ScoreSettings

EQUAL, EQUAL_IN_HALF = 1e-5, 0.3  # of a block's largest score, in float32; where bfloat16 decides which experts run
GATHERED = GatheredFactors._gathered
SEEN = 100 * EQUAL  # what a part that is counted twice deviates by, at least
ALL, PAIRS = (2, 3, 4), (2, 4)
NVME = ("pin_memory", "async_io")
BUILD = "python -c 'from deepspeed.ops.op_builder import AsyncIOBuilder as Builder; Builder().load()'"
LOADING_S = 30.0  # a process that loads what is built has the lock too, but shortly


@dataclass(frozen=True)
class Family:
    """A tiny model of the zoo, changed."""

    model: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[Any], None] = lambda model: None

    @property
    def entry(self) -> Tiny:
        return TINY[self.model]

    def build(self) -> Any:
        model = self.entry.build(**self.overrides)
        self.change(model)
        return model


@torch.no_grad()
def idle_experts(model: Any) -> None:
    """Send every token to the first or the second of four experts: those of other ranks get none."""
    for layer in model.model.layers:
        router = layer.mlp.gate.weight
        router[1], router[2:] = -router[0], 0.0


FAMILIES = {
    "dense (llama)": Family("llama"),
    "MoE (mixtral)": Family("mixtral"),
    "MLA (deepseek_v3)": Family("deepseek_v3", {"moe_intermediate_size": 48}),  # grouped products take even rows
    "fused (phi3)": Family("phi3"),
    "multi-query (falcon)": Family("falcon_mqa"),
}
MORE_FAMILIES = {
    "idle experts": Family("mixtral", {"num_experts_per_tok": 1}, idle_experts),
    "gpt_oss": Family("gpt_oss"),
    "qwen3_moe": Family("qwen3_moe"),
    "multi-query (gpt_bigcode)": Family("gpt_bigcode_mqa"),
}


@dataclass(frozen=True)
class Cut:
    """A way to cut a model, and the numbers of ranks that it is met with.

    Attributes:
        sizes: Numbers of ranks.
        parallel: Of a configuration; `N` stands for the number of ranks.
        prepare: Or a function of `prepared`.
        within: A context of `prepared` around all calls.
        half: Whether passes use weights in bfloat16.
        ops: What DeepSpeed must have compiled before: it takes ten minutes.
    """

    sizes: tuple[int, ...]
    parallel: Mapping[str, Any] | None = None
    prepare: str = "plain"
    within: str = ""
    half: bool = False
    ops: tuple[str, ...] = ()

    def left_out(self) -> str:
        """Why it cannot be met now; empty where it can."""
        return next(filter(None, map(missing_op, self.ops)), "")


def missing_op(op: str) -> str:
    """Why DeepSpeed would compile an extension now, or wait for another process that does; empty where it would not."""
    folder, ninja = Path(_get_build_directory(op, verbose=False)), shutil.which("ninja")
    lock, work = folder / "lock", ""
    if lock.exists() and time.time() - lock.stat().st_mtime > LOADING_S:
        return f"{lock} is there: DeepSpeed's {op} is being built, or its build was killed"
    if ninja and (folder / "build.ninja").exists():
        work = subprocess.run([ninja, "-n"], cwd=folder, capture_output=True, text=True, check=False).stdout
    return "" if "no work to do" in work else f"DeepSpeed's {op} is not built; this builds it: {BUILD}"


def _configured(sizes: tuple[int, ...], **parallel: Any) -> Cut:
    return Cut(sizes, parallel)


CUTS = {
    "`shard: ddp`": _configured(ALL, shard="ddp"),
    "`shard: zero1`, `zero2`": _configured(ALL, shard="zero2"),
    "`shard: fsdp`": _configured(ALL, shard="fsdp"),
    "`shard: fsdp, replicate: 2`": _configured((4,), shard="fsdp", replicate=2),
    "`shard: zero3`": _configured(ALL, shard="zero3"),
    "`tp: N`": _configured(ALL, tp="N"),
    "`tp: 2, shard: ddp`": _configured((4,), tp=2, shard="ddp"),
    "`tp: 2, shard: fsdp`": _configured((4,), tp=2, shard="fsdp"),
    "`tp: 2, shard: fsdp, replicate: 2`": _configured((8,), tp=2, shard="fsdp", replicate=2),
    "`ep: N`": _configured(ALL, ep="N"),
    "`ep: N, tp: N`": _configured(ALL, ep="N", tp="N"),
    "`ep: N, shard: fsdp`": _configured(ALL, ep="N", shard="fsdp"),
    "`ep: 4, tp: 2, shard: fsdp`": _configured((4,), ep=4, tp=2, shard="fsdp"),
    "`ep: 2, shard: fsdp, replicate: 2`": _configured((4,), ep=2, shard="fsdp", replicate=2),
    "`ep: 2, shard: ddp`": _configured((4,), ep=2, shard="ddp"),
    "`cp: N, shard: ddp`": _configured(ALL, cp="N", shard="ddp"),
    "`cp: N, shard: fsdp`": _configured(ALL, cp="N", shard="fsdp"),
    "`cp: 2, shard: ddp`": _configured((4,), cp=2, shard="ddp"),
    "`cp: 2, shard: fsdp`": _configured((4,), cp=2, shard="fsdp"),
    "`cp: 2, shard: fsdp, replicate: 2`": _configured((4,), cp=2, shard="fsdp", replicate=2),
    "`cp: N, shard: zero3`": _configured(ALL, cp="N", shard="zero3"),
    "`shard: device_map`": _configured(ALL, shard="device_map"),
    "`DistributedDataParallel`": Cut(ALL, prepare="distributed_data_parallel"),
    "accelerate, data parallel": Cut(ALL, prepare="accelerated"),
    "accelerate, `dp_shard_size=N`": Cut(ALL, prepare="accelerated_sharded"),
    "accelerate, `dp_replicate_size=2, dp_shard_size=2`": Cut((4,), prepare="accelerated_hybrid"),
    "accelerate, `cp_size=N`, outside of its context": Cut(ALL, prepare="accelerated_context_parallel"),
    "`fully_shard`": Cut(ALL, prepare="fully_sharded"),
    "`fully_shard`, two axes, CPU offload": Cut((4,), prepare="hybrid_offloaded"),
    "`fully_shard`, mixed precision (bfloat16)": Cut(ALL, prepare="fully_sharded_half", half=True),
    "`parallelize_module`": Cut(PAIRS, prepare="torch_parallel_gathered"),
    "`parallelize_module` and `fully_shard`": Cut((4,), prepare="torch_parallel_fully_sharded"),
    "`parallelize_module` and `fully_shard`, three axes": Cut((8,), prepare="torch_parallel_hybrid"),
    "DeepSpeed ZeRO-1, optimizer": Cut(ALL, prepare="zero1"),
    "DeepSpeed ZeRO-2, optimizer": Cut(ALL, prepare="zero2"),
    "DeepSpeed ZeRO-3": Cut(PAIRS, prepare="zero3"),
    "DeepSpeed ZeRO-3, experts as leaf modules": Cut(ALL, prepare="zero3_with_leaves"),
    "DeepSpeed ZeRO-3, optimizer, both on the CPU": Cut(ALL, prepare="zero3_offloaded"),
    "DeepSpeed ZeRO-3, loaded to NVMe": Cut(ALL, prepare="zero3_on_nvme", ops=NVME),
    "DeepSpeed ZeRO-3, loaded to NVMe, optimizer on the CPU": Cut(ALL, prepare="zero3_on_nvme_learning", ops=NVME),
    "DeepSpeed ZeRO-3, moved to NVMe": Cut(ALL, prepare="zero3_moved_to_nvme", ops=NVME),
    "torch's `context_parallel`": Cut(ALL, within="context_parallel"),
    "DeepSpeed-Ulysses": Cut(ALL, within="ulysses"),
    "`DistributedConfig(pp_size=N)`": Cut(PAIRS, prepare="staged"),
    "torch's pipelining": Cut(ALL, prepare="schedule"),
}


@dataclass(frozen=True)
class Met:
    """What came of a cut: how far scores are off, and how far they would be with a part counted twice; or a refusal.

    Where ranks share tokens, ``early`` is how far they would be, were gradients squared before all tokens are there.
    Where torch, transformers, accelerate or DeepSpeed cannot cut a model as its user asks, that is the refusal.
    """

    deviation: float = float("nan")
    twice: float = float("nan")
    refusal: str = ""
    early: float = float("inf")

    def is_right(self, cut: Cut) -> bool:
        if self.refusal:
            return True
        return self.deviation < (EQUAL_IN_HALF if cut.half else EQUAL) and min(self.twice, self.early) > SEEN


def job_of(family: Family) -> Job:
    settings = ScoreSettings("interference", 0.0, 0.0, 0.01, torch.float64)
    return replace(job_for(family.entry), settings=settings)


def oracle_of(family: Family) -> dict[str, np.ndarray]:
    """Block -> scores [layer, head, a, b] by dense float64 autograd."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        of_layers = expected_scores(family.entry, family.build(), job_of(family))
    blocks = next(iter(of_layers.values()))
    return {block: np.stack([of_layers[layer][block].numpy() for layer in sorted(of_layers)]) for block in blocks}


def meet(cut_name: str, family_name: str, folder: str, expected: dict[str, np.ndarray]) -> Met:
    """Meet a cut on this rank, in a folder with the family's model."""
    cut, family = CUTS[cut_name], (FAMILIES | MORE_FAMILIES)[family_name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _met(cut, family, folder, expected)
        except QkovError as error:
            return Met(refusal=str(error).replace(folder, "MODEL"))


def _met(cut: Cut, family: Family, folder: str, expected: dict[str, np.ndarray]) -> Met:
    with contextlib.ExitStack() as stack:
        try:
            kept, model, context = _cut(cut, family, folder)
            if cut.within:
                stack.enter_context(getattr(prepared, cut.within)(model))
        except (AttributeError, TypeError, ValueError, NotImplementedError) as error:
            if cut.parallel is not None:
                raise
            return Met(refusal=f"The library that cuts cannot cut this model: {type(error).__name__}: {error}.")
        collector = collected(model, job_of(family), cp=context)
        metric = QKOVInterferenceMetric(QKOVConfig.from_model(model), collector, ridge_relative=0.01)
        right = metric.compute_heatmap("math", "code", pairs="cross").cross
        with mock.patch("qkov_dist.metric.add_over_ranks", counted_twice):
            wrong = metric.compute_heatmap("math", "code", pairs="cross").cross
        met = Met(_deviation(right, expected), _deviation(wrong, expected))
        if context > 1:
            with mock.patch.object(GatheredFactors, "_gathered", own_tokens_alone):
                collector = collected(model, job_of(family), cp=context)
            metric = QKOVInterferenceMetric(QKOVConfig.from_model(model), collector, ridge_relative=0.01)
            early = metric.compute_heatmap("math", "code", pairs="cross").cross
            met = replace(met, early=_deviation(early, expected))
    del kept
    return met


def _cut(cut: Cut, family: Family, folder: str) -> tuple[Any, Any, int]:
    """What keeps a model's parts together, the model, and how many ranks share a sample's tokens."""
    if cut.parallel is None:
        model = getattr(prepared, cut.prepare)(family.build(), folder)
        return model, model, 1
    world = current()
    parallel = ParallelConfig(**{key: world.size if value == "N" else value for key, value in cut.parallel.items()})
    parallelism = resolve_parallelism(parallel, world.size, os.environ)
    loaded = load_parallel(ModelConfig(folder), parallelism, world)
    return loaded, loaded.model, parallelism.context


def counted_twice(mine, axes, shape, world):
    """The sums over ranks, with the last rank's part counted twice."""
    return add_over_ranks(add_layers([mine, mine]) if world.rank == world.size - 1 else mine, axes, shape, world)


def own_tokens_alone(self, parts):
    """Factors as they would be, were they used before those of other ranks' tokens have come."""
    whole = GATHERED(self, parts)
    for rank, rows in enumerate(self._rows):
        for values in whole if rank != self._owner else ():
            values[rows] = 0
    return whole


def _deviation(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    assert found.keys() == expected.keys()
    return max(float(np.abs(found[b] - expected[b]).max() / np.abs(expected[b]).max()) for b in expected)


def save(family: Family, folder: Path) -> str:
    """Write a family's model down where it is not yet; returns where."""
    if not folder.exists():
        family.build().save_pretrained(folder)
    return str(folder)
