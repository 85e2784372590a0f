"""Loading a model the way it is cut: replicated, tensor parallel, FSDP2, ZeRO, or over the devices of one process.

    tp          transformers' own plan, on the axis ``tp`` of its device mesh
    fsdp        FSDP2 by transformers' plan, on the axis ``fsdp``; with tp > 1, both
    ddp         a replica for each group of ``tp`` ranks: no gradient is communicated, so nothing wraps the model
    zero1, 2    as ddp: what these stages shard, optimizer states and gradients of weights, does not exist here
    zero3       DeepSpeed partitions the weights while they are read
    device_map  one process, layers over its devices

What cannot work is refused before weights are read.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qkov_dist.config import ComputeConfig, ModelConfig, ParallelConfig
from qkov_dist.data.batches import default_batch_tokens
from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import Layout
from qkov_dist.layout.modules import routed
from qkov_dist.layout.resolve import resolve
from qkov_dist.loading.architecture import fill_computed_buffers, meta_model
from qkov_dist.loading.models import LoadedModel, load_model
from qkov_dist.loading.whereabouts import base_config

from .builds import locks_end
from .world import World, timeout_seconds

SHARDED_BY_HOOKS = ("colwise", "rowwise")


@dataclass(frozen=True)
class Parallelism:
    """How a model is cut: ``tp`` ranks for one pass, ``data`` for how weights are spread over ``replicas`` groups."""

    tp: int
    data: str
    replicas: int

    def batch_tokens(self, compute: ComputeConfig, *, on_gpu: bool, num_parameters: int) -> int:
        """Padded tokens in one batch, as asked for, or as suits a model that is cut so."""
        moves = self.tp > 1 or self.data in ("fsdp", "zero3", "device_map")
        return compute.batch_tokens or default_batch_tokens(
            on_cpu=not on_gpu, moves=moves, num_parameters=num_parameters
        )


def resolve_parallelism(config: ParallelConfig, world_size: int, environment: Mapping[str, str]) -> Parallelism:
    """What the configuration asks for, or what the launcher says where it asks for ``auto``.

    Raises:
        QkovError: where the ranks cannot be arranged so.
    """
    if world_size % config.tp:
        raise QkovError(
            "parallel.tp",
            expected=f"a divisor of the {world_size} ranks",
            got=str(config.tp),
            remedy="Start a multiple of parallel.tp ranks, or change parallel.tp.",
        )
    replicas = world_size // config.tp
    data = _data_of_launcher(environment, replicas) if config.shard == "auto" else config.shard
    if data in ("none", "device_map") and replicas > 1:
        raise QkovError(
            "parallel.shard",
            expected=f"a way to use {world_size} ranks (auto, ddp, fsdp, zero1, zero2 or zero3)",
            got=data,
            remedy=f"Start {config.tp if data == 'none' else 1} process(es), or change parallel.shard.",
        )
    if config.tp > 1 and data in ("zero1", "zero2", "zero3", "device_map"):
        raise QkovError(
            "parallel",
            expected="tensor parallelism alone or with ddp or fsdp",
            got=f"tp: {config.tp} with shard: {data}",
            remedy="Use parallel.shard=fsdp with tensor parallelism.",
        )
    return Parallelism(config.tp, data if replicas > 1 or data == "device_map" else "none", replicas)


def _data_of_launcher(environment: Mapping[str, str], replicas: int) -> str:
    """What `accelerate launch` was configured for; ``ddp`` under any other launcher of several ranks."""
    if environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0")
        return f"zero{stage}" if stage in "123" else "ddp"
    if environment.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return "fsdp"
    return "ddp" if replicas > 1 else "none"


def load_parallel(config: ModelConfig, parallelism: Parallelism, world: World) -> LoadedModel:
    """Load a model on the ranks of a world; each gets its own part.

    Raises:
        QkovError: for what cannot work (before weights are read), and as ``loading.models.load_model`` does.
    """
    cuts = parallelism.tp > 1 or parallelism.data in ("fsdp", "zero3")
    if cuts and base_config(config):
        raise QkovError(
            config.path,
            expected="a model whose weights are cut as they are read",
            got="an adapter beside its base model",
            remedy="Merge it (peft's merge_and_unload; gradients of the merged weights are the same), or use "
            "parallel.shard=ddp or device_map.",
        )
    if parallelism.tp > 1:
        _check_model(config, parallelism.tp)
    if parallelism.data == "device_map":
        return load_model(config, device_map="auto")
    if parallelism.tp > 1 or parallelism.data == "fsdp":
        loaded = load_model(config, distributed=_mesh_settings(parallelism))
        fill_computed_buffers(loaded.model, config)
        return loaded
    if parallelism.data == "zero3":
        return _load_zero3(config)
    return load_model(config, device_map={"": _device()} if torch.cuda.is_available() else None)


def _device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def _mesh_settings(parallelism: Parallelism) -> Any:
    from transformers.distributed.configuration_utils import DistributedConfig

    sizes: dict[str, Any] = {"fsdp_size": parallelism.replicas} if parallelism.data == "fsdp" else {}
    if parallelism.data == "ddp":
        sizes = {"fsdp_size": 1, "dp_replicate_size": parallelism.replicas}
    if parallelism.tp > 1:
        return DistributedConfig(tp_size=parallelism.tp, tp_plan="auto", **sizes)
    return DistributedConfig(**sizes)


def check_tensor_parallel(styles: Collection[str | None], layout: Layout, tp: int) -> None:
    """Refuse tensor parallelism of a model without a plan, or with heads that the ranks cannot share.

    Args:
        styles: The plan's for the attention projections; None is of a projection that has none.
        layout: The layers.
        tp: Into how many parts each is to be cut.

    Raises:
        QkovError: naming what would do.
    """
    known = set(styles) - {None}
    if tp > 1 and not known:
        raise QkovError(
            "parallel.tp",
            expected="a model whose transformers class has a tensor-parallel plan for its attention",
            got=f"model type {layout.model_type!r}, which has none",
            remedy="Use parallel.shard=fsdp or zero3, which cut any model, with parallel.tp=1.",
        )
    if not known & set(SHARDED_BY_HOOKS):
        return  # attention runs whole on every rank: any number of heads will do
    for layer in layout.layers:
        if layer.num_kv_heads % tp or layer.num_heads % tp:
            raise QkovError(
                "parallel.tp",
                expected=f"a divisor of the {layer.num_heads} query and {layer.num_kv_heads} kv heads of each layer",
                got=str(tp),
                remedy="Choose such a parallel.tp, or parallel.shard=fsdp or zero3, which cut between any two rows.",
            )


def _check_model(config: ModelConfig, tp: int) -> None:
    """Refuse a model that tensor parallelism cannot cut so, before its weights are read."""
    model = meta_model(config)
    layout, plan = resolve(model), getattr(model, "tp_plan", None) or {}
    styles = {style_of(f"{p.module}.weight", plan) for layer in layout.layers for p in layer.projections}
    try:
        check_tensor_parallel(styles, layout, tp)
    except QkovError as error:
        raise error.within(str(config.path)) from None


def _load_zero3(config: ModelConfig) -> LoadedModel:
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise QkovError(
            "parallel.shard",
            expected="DeepSpeed, for zero3",
            got=str(error),
            remedy="Run `pip install 'qkov-dist[deepspeed]'`, or use parallel.shard=fsdp.",
        ) from error
    with locks_end(timeout_seconds()):
        return _partitioned(config)


def _partitioned(config: ModelConfig) -> LoadedModel:
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    half = config.dtype == "bfloat16" or (config.dtype == "auto" and meta_model(config).dtype == torch.bfloat16)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": half},
        "steps_per_print": 10**9,
    }
    warnings = _unused(config)
    partition = HfDeepSpeedConfig(settings)  # type: ignore[no-untyped-call]
    loaded = load_model(config)  # while ``partition`` lives, each weight is partitioned as it is read
    del partition
    loaded.model.requires_grad_(False)
    if leaves := sorted({type(module) for module in routed(loaded.model)}, key=lambda kind: kind.__name__):
        deepspeed.utils.set_z3_leaf_modules(loaded.model, leaves)
    engine, *_ = deepspeed.initialize(model=loaded.model, config=settings)
    return replace(loaded, model=engine.module.eval(), engine=engine, warnings=(*warnings, *loaded.warnings))


def _unused(config: ModelConfig) -> tuple[str, ...]:
    """Warnings of tensors that the model does not use; while weights are partitioned transformers does not look.

    Nothing but names and shapes is read, from the heads of the files.
    """
    return () if Path(config.path).is_file() else load_model(config, device_map="meta").warnings


def starred(name: str) -> str:
    """A dotted name with every number replaced by ``*``, as plans of transformers write it."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def style_of(name: str, styles: Mapping[str, str]) -> str | None:
    """A plan's style for a parameter or module: its own, or that of the module it is in."""
    own = starred(name)
    return styles.get(own, styles.get(own.rpartition(".")[0]))


SHARDED = ("fsdp", "zero3")  # ways to give each replica a share of every weight
