"""Loading a model the way it is cut: replicated, tensor or expert parallel, FSDP2, ZeRO, or over one process's devices.

    tp          transformers' own plan, on the axis ``tp`` of its device mesh
    fsdp        FSDP2 by transformers' plan, on the axis ``fsdp``; with ``replicate`` copies of the shards, on the axes
                ``dp_replicate`` and ``fsdp`` (hybrid sharding); with tp > 1, all three
    ep          transformers' own plan for experts, on the axis ``ep`` of a mesh of the same ranks; attention is cut by
                tp or fsdp, or runs whole on each of the ``ep`` ranks, which then share their samples
    ddp         a replica for each group of ``tp`` ranks: no gradient is communicated, so nothing wraps the model
    zero1, 2    as ddp: what these stages shard, optimizer states and gradients of weights, does not exist here
    zero3       DeepSpeed partitions the weights while they are read
    device_map  one process, layers over its devices
    cp          neighbouring ranks share the tokens of each sample (``context_parallel``); beside ddp, fsdp or ZeRO,
                which load the model as they do without it

What cannot work is refused before weights are read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from qkov_dist.config import ComputeConfig, ModelConfig, ParallelConfig
from qkov_dist.data.batches import default_batch_tokens
from qkov_dist.errors import QkovError
from qkov_dist.loading.architecture import fill_computed_buffers, meta_model
from qkov_dist.loading.models import LoadedModel, load_model
from qkov_dist.loading.whereabouts import base_config

from .plans import check_model, whole_plan
from .world import World
from .zero3 import load_zero3

SHARDED = ("fsdp", "zero3")  # ways to give each replica a share of every weight


@dataclass(frozen=True)
class Parallelism:
    """How a model is cut.

    Attributes:
        tp: Ranks that run the same samples, each its part of a pass.
        data: How weights are spread over ``replicas``.
        replicas: Groups of ``tp`` ranks, which run different samples.
        copies: Of weights that are sharded: each is spread over ``replicas / copies`` groups.
        experts: Ranks that own distinct experts.
        whole: Whether nothing but experts is cut between the ``tp`` ranks of a pass.
        context: Of the replicas, neighbours that share the tokens of each sample.
    """

    tp: int
    data: str
    replicas: int
    copies: int = 1
    experts: int = 1
    whole: bool = False
    context: int = 1

    @property
    def shards(self) -> int:
        """Groups of ``tp`` ranks over which each weight is spread."""
        return self.replicas // self.copies if self.data in SHARDED else 1

    @property
    def expert_shards(self) -> int:
        """Over how many ranks FSDP2 spreads what one of them owns of the experts."""
        within = self.tp if self.experts > 1 else 1
        return self.shards * within // self.experts if self.data == "fsdp" else 1

    @property
    def uses_mesh(self) -> bool:
        """Whether transformers cuts the model over a device mesh."""
        return self.tp > 1 or self.data == "fsdp"

    @property
    def words(self) -> str:
        """In a few words, for the terminal."""
        copies = f", {self.copies} copies" if self.copies > 1 else ""
        experts = f", experts over {self.experts}" if self.experts > 1 else ""
        tokens = f", a sample's tokens over {self.context}" if self.context > 1 else ""
        return f"tp {self.tp}, {self.data}{copies}{experts}{tokens}"

    def batch_tokens(self, compute: ComputeConfig, *, on_gpu: bool, num_parameters: int) -> int:
        """Padded tokens in one batch, as asked for, or as suits a model that is cut so."""
        moves = self.tp * self.context > 1 or self.data in ("fsdp", "zero3", "device_map")
        return compute.batch_tokens or default_batch_tokens(
            on_cpu=not on_gpu, moves=moves, num_parameters=num_parameters
        )


def resolve_parallelism(config: ParallelConfig, world_size: int, environment: Mapping[str, str]) -> Parallelism:
    """What the configuration asks for, or what the launcher says where it asks for ``auto``.

    Raises:
        QkovError: where the ranks cannot be arranged so.
    """
    config = _as_launched(config, environment) if config.shard == "auto" else config
    if config.cp > 1:
        _check_context(config, world_size)
    _check_divides("parallel.tp", config.tp, world_size)
    replicas = world_size // config.tp
    data = config.shard if config.shard != "auto" else "ddp" if replicas > 1 else "none"
    if data in ("none", "device_map") and replicas > 1 and config.ep == 1:
        raise QkovError(
            "parallel.shard",
            expected=f"a way to use {world_size} ranks (auto, ddp, fsdp, zero1, zero2 or zero3)",
            got=data,
            remedy=f"Start {config.tp if data == 'none' else 1} process(es), or change parallel.shard.",
        )
    if config.tp * config.ep > 1 and data in ("zero1", "zero2", "zero3", "device_map"):
        raise QkovError(
            "parallel",
            expected="tensor and expert parallelism alone or with ddp or fsdp",
            got=f"tp: {config.tp}, ep: {config.ep} with shard: {data}",
            remedy="Use parallel.shard=fsdp with them.",
        )
    plain = Parallelism(config.tp, data if replicas > 1 or data == "device_map" else "none", replicas)
    return replace(_with_experts(_with_copies(plain, config.replicate), config.ep), context=config.cp)


def _check_context(config: ParallelConfig, world_size: int) -> None:
    """Refuse context parallelism beside what it is not made for, or of ranks that are not there."""
    if config.tp * config.ep > 1 or config.shard in ("none", "device_map"):
        raise QkovError(
            "parallel.cp",
            expected="1, or ranks that share a sample's tokens with shard: ddp, fsdp or zero3, tp: 1 and ep: 1",
            got=f"cp: {config.cp} with shard: {config.shard}, tp: {config.tp}, ep: {config.ep}",
            remedy="Use parallel.shard=fsdp, which spreads any model, with parallel.tp=1 and parallel.ep=1.",
        )
    _check_divides("parallel.cp", config.cp, world_size)


def _check_divides(key: str, number: int, world_size: int) -> None:
    """Refuse groups of so many ranks where the last would lack some."""
    if world_size % number:
        raise QkovError(
            key,
            expected=f"a divisor of the {world_size} ranks",
            got=str(number),
            remedy=f"Start a multiple of {key} ranks, or change {key}.",
        )


def _with_copies(plain: Parallelism, copies: int) -> Parallelism:
    """Hybrid sharding: so many copies of the sharded weights."""
    if copies == 1:
        return plain
    if plain.data != "fsdp" or plain.replicas % copies:
        raise QkovError(
            "parallel.replicate",
            expected="1, or with shard: fsdp a divisor of the ranks that do not share a pass",
            got=f"{copies} copies with shard: {plain.data} of {plain.replicas} such ranks",
            remedy="Use parallel.shard=fsdp, or zero3 with parallel.replicate=1, and a divisor.",
        )
    if copies == plain.replicas:
        return replace(plain, data="ddp")  # whole copies, and nothing to gather
    return replace(plain, copies=copies)


def _with_experts(plain: Parallelism, experts: int) -> Parallelism:
    """Expert parallelism, beside attention that is sharded (fsdp), tensor parallel, or whole on each of its ranks."""
    if experts == 1:
        return plain
    num_ranks = plain.tp * plain.replicas
    if plain.data == "fsdp" and experts % plain.tp == 0 and (plain.tp * plain.shards) % experts == 0:
        return replace(plain, experts=experts)
    replicas = num_ranks // experts
    data = "ddp" if replicas > 1 else "none"
    if plain.data in ("ddp", data) and plain.tp in (1, experts) and num_ranks % experts == 0:
        return Parallelism(experts, data, replicas, experts=experts, whole=plain.tp == 1)
    raise QkovError(
        "parallel.ep",
        expected="a multiple of parallel.tp that divides the ranks of one copy of the weights; without shard: fsdp "
        "parallel.tp itself, or parallel.tp=1",
        got=f"ep: {experts} with tp: {plain.tp}, shard: {plain.data} on {num_ranks} ranks, {plain.copies} copies",
        remedy="Choose such a parallel.ep, or parallel.shard=fsdp.",
    )


def _as_launched(config: ParallelConfig, environment: Mapping[str, str]) -> ParallelConfig:
    """What `accelerate launch` was configured for; unchanged under any other launcher.

    Either of its sizes for ranks that share tokens (``cp_size``, ``sp_size``) is ``cp``: results are the same.
    """
    sizes = _parallelism_config(environment)
    config = replace(config, cp=sizes["CP"] * sizes["SP"]) if config.cp == 1 else config
    if environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0")
        return replace(config, shard=f"zero{stage}" if stage in "123" else "ddp")
    if environment.get("ACCELERATE_USE_FSDP", "").lower() == "true" or sizes["DP_SHARD"] > 1:
        config = replace(config, shard="fsdp")
        config = replace(config, replicate=sizes["DP_REPLICATE"]) if config.replicate == 1 else config
    elif config.replicate > 1:
        config = replace(config, shard="fsdp")
    return replace(config, tp=sizes["TP"]) if config.tp == 1 else config


def _parallelism_config(environment: Mapping[str, str]) -> dict[str, int]:
    """The sizes of accelerate's ParallelismConfig, 1 each where there is none."""
    names = ("DP_REPLICATE", "DP_SHARD", "TP", "CP", "SP")
    if environment.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() != "true":
        return dict.fromkeys(names, 1)
    texts = {name: environment.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1") for name in names}
    return {name: int(text) if text.isdecimal() else 1 for name, text in texts.items()}


def load_parallel(config: ModelConfig, parallelism: Parallelism, world: World) -> LoadedModel:
    """Load a model on the ranks of a world; each gets its own part.

    Raises:
        QkovError: for what cannot work (before weights are read), and as ``loading.models.load_model`` does.
    """
    if (parallelism.uses_mesh or parallelism.data == "zero3") and base_config(config):
        raise QkovError(
            config.path,
            expected="a model whose weights are cut as they are read",
            got="an adapter beside its base model",
            remedy="Merge it (peft's merge_and_unload; gradients of the merged weights are the same), or use "
            "parallel.shard=ddp or device_map.",
        )
    tp = 1 if parallelism.whole else parallelism.tp
    check_model(config, tp=tp, ep=parallelism.experts, shards=parallelism.expert_shards)
    if parallelism.data == "device_map":
        return load_model(config, device_map="auto")
    if parallelism.uses_mesh:
        loaded = load_model(config, distributed=_mesh_settings(config, parallelism))
        fill_computed_buffers(loaded.model, config)
        return loaded
    if parallelism.data == "zero3":
        return load_zero3(config)
    return load_model(config, device_map={"": _device()} if torch.cuda.is_available() else None)


def _device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def _mesh_settings(config: ModelConfig, parallelism: Parallelism) -> Any:
    from transformers.distributed.configuration_utils import DistributedConfig

    copies = parallelism.replicas // parallelism.shards
    sizes: dict[str, Any] = {"fsdp_size": parallelism.shards, "dp_replicate_size": copies}
    if parallelism.experts > 1:
        sizes["ep_size"] = parallelism.experts
    if parallelism.tp == 1:
        return DistributedConfig(**sizes)
    plan: Any = whole_plan(meta_model(config)) if parallelism.whole else "auto"
    return DistributedConfig(tp_size=parallelism.tp, tp_plan=plan, **sizes)
