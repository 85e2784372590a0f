"""Loading a model under DeepSpeed's ZeRO-3: each weight is partitioned as it is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from qkov_dist.config import ModelConfig
from qkov_dist.errors import QkovError
from qkov_dist.layout.modules import routed
from qkov_dist.loading.architecture import meta_model
from qkov_dist.loading.models import LoadedModel, load_model

from .builds import locks_end
from .world import timeout_seconds


def load_zero3(config: ModelConfig) -> LoadedModel:
    """Load a model whose weights all ranks share, partitioned.

    Raises:
        QkovError: without DeepSpeed, and as ``loading.models.load_model`` does.
    """
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
