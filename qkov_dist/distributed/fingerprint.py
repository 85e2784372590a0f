"""One hash of what a model computes: its settings and every weight.

The checksum is additive over the elements of a tensor, so that the parts held by several ranks add up (modulo 2^64) to
the checksum of the whole. With b the bits of element (r, c) read as an integer, and h, k fixed mixing functions of the
row and the column, it is the pair ``sum b`` and ``sum b (h(r) + k(c))``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .sharding import local_shards, logical_shape
from .world import Alone, World

# Settings that leave the function of the model as it is, and differ between ways of loading it.
NEUTRAL_SETTINGS = {
    "architectures", "dtype", "torch_dtype", "use_cache", "transformers_version", "quantization_config",
    "distributed_config", "tp_plan", "tp_size", "attn_implementation", "experts_implementation",
}  # fmt: skip
NEUTRAL_ADAPTER_SETTINGS = {
    "base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping", "peft_version",
    "runtime_config", "target_modules",
}  # fmt: skip
CHUNK_ELEMENTS = 2**20


def fingerprint(model: nn.Module, world: World | None = None) -> str:
    """SHA-256 of the configuration and of the name, shape, dtype and checksum of every parameter and persistent buffer.

    Does not depend on the device, on ``requires_grad``, on where the checkpoint lies, or on how the weights are
    sharded: what replicas hold in common counts once. LoRA weights count.

    Args:
        model: The model, or this rank's part of it.
        world: The ranks that hold the other parts; every one of them calls this.

    Raises:
        QkovError: for weights that are not in memory.
    """
    world = world or Alone()
    tensors = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    shards = {name: list(local_shards(name, tensor)) for name, tensor in tensors.items()}
    where = world.all_gather({name: [shard.place for shard in of_name] for name, of_name in shards.items()})
    mine = {
        name: [checksum(shard.values, shard.rows, shard.cols) for shard in of_name]
        for name, of_name in shards.items()
        if all(rank[name] != where[world.rank][name] for rank in where[: world.rank])
    }
    parts = world.all_gather(mine)
    entries = []
    for name, tensor in tensors.items():
        found = [pair for rank in parts for pair in rank.get(name, ())]
        total = sum(plain for plain, _ in found) % 2**64, sum(weighted for _, weighted in found) % 2**64
        entries.append((name, logical_shape(tensor), str(tensor.dtype), total))
    return digest(model, entries)


def digest(model: nn.Module, entries: Iterable[tuple[str, tuple[int, ...], str, tuple[int, int]]]) -> str:
    """The fingerprint from (name, logical shape, dtype, checksum) of every tensor, checksums summed over ranks."""
    config: Any = getattr(model, "config", None)
    plain = config.to_dict() if hasattr(config, "to_dict") else {}
    settings = {key: value for key, value in plain.items() if key not in NEUTRAL_SETTINGS and not key.startswith("_")}
    content = [type(config or model).__name__, settings, sorted(entries), *_adapters(model)]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _adapters(model: nn.Module) -> list[Any]:
    """What adapters add to a model beside their weights: their settings, and which of them are in use."""
    settings: Any = getattr(model, "peft_config", None)
    if not isinstance(settings, Mapping):
        return []
    plain = {
        name: {
            key: sorted(value) if isinstance(value, set | frozenset) else value
            for key, value in entry.to_dict().items()
            if key not in NEUTRAL_ADAPTER_SETTINGS
        }
        for name, entry in settings.items()
    }
    layers = {
        path: (module.disable_adapters, list(module.active_adapters), getattr(module, "scaling", None))
        for path, module in model.named_modules()
        if isinstance(getattr(module, "active_adapters", None), list) and hasattr(module, "base_layer")
    }
    return [plain, layers]


def checksum(matrix: Tensor, rows: Tensor | None = None, cols: Tensor | None = None) -> tuple[int, int]:
    """The additive checksum of some rows and columns of a matrix, each sum in [0, 2^64).

    Args:
        matrix: The elements [R, C]; a tensor of other rank is seen as its first dim by all others.
        rows: Number of each row in the whole matrix, int64 [R]; from 0 by default.
        cols: Number of each column in the whole matrix, int64 [C].
    """
    if matrix.numel() == 0:
        return 0, 0
    matrix = matrix.detach().reshape(len(matrix), -1) if matrix.ndim else matrix.detach().reshape(1, 1)
    bits = matrix.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[matrix.element_size()])
    num_rows, num_cols = bits.shape
    row_weights = _mix((torch.arange(num_rows) if rows is None else rows).to(matrix.device), 1)
    col_weights = _mix((torch.arange(num_cols) if cols is None else cols).to(matrix.device), 2)
    sums = torch.zeros(2, dtype=torch.int64, device=matrix.device)
    step = max(1, CHUNK_ELEMENTS // num_cols)
    for start in range(0, num_rows, step):
        words = bits[start : start + step].to(torch.int64)
        row_sums = words.sum(dim=1)
        sums[0] += row_sums.sum()
        sums[1] += (row_sums * row_weights[start : start + step]).sum() + (words.sum(dim=0) * col_weights).sum()
    plain, weighted = sums.tolist()
    return plain % 2**64, weighted % 2**64


def _mix(index: Tensor, salt: int) -> Tensor:
    """A fixed pseudo-random int64 for each index (multiply, shift, multiply; wraps around)."""
    mixed = (index * 2 + salt) * -0x61C8864680B583EB
    return (mixed ^ (mixed >> 29)) * -0x4B47D0C5AF2E7B13
