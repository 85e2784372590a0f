"""One hash of what a model computes: its settings and every weight.

The checksum is additive over the elements of a tensor, so that the parts held by several ranks add up (modulo 2^64) to
the checksum of the whole. With b the bits of element (r, c) read as an integer, and h, k fixed mixing functions of the
row and the column, it is the pair ``sum b`` and ``sum b (h(r) + k(c))``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import QkovError

# Settings that leave the function of the model as it is, and differ between ways of loading it.
NEUTRAL_SETTINGS = {
    "architectures", "dtype", "torch_dtype", "use_cache", "transformers_version", "quantization_config",
    "distributed_config", "tp_plan", "tp_size", "attn_implementation", "experts_implementation",
}  # fmt: skip
CHUNK_ELEMENTS = 2**20


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the configuration and of the name, shape, dtype and checksum of every parameter and persistent buffer.

    Does not depend on the device, on ``requires_grad``, or on where the checkpoint lies. LoRA weights count.
    """
    entries = []
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_meta:
            remedy = "Load the weights without offloading to CPU or disk."
            raise QkovError(name, expected="a weight in memory", got="a tensor on the meta device", remedy=remedy)
        entries.append((name, tuple(tensor.shape), str(tensor.dtype), checksum(tensor)))
    return digest(model, entries)


def digest(model: nn.Module, entries: Iterable[tuple[str, tuple[int, ...], str, tuple[int, int]]]) -> str:
    """The fingerprint from (name, logical shape, dtype, checksum) of every tensor, checksums summed over ranks."""
    config: Any = getattr(model, "config", None)
    plain = config.to_dict() if hasattr(config, "to_dict") else {}
    settings = {key: value for key, value in plain.items() if key not in NEUTRAL_SETTINGS and not key.startswith("_")}
    content = [type(config or model).__name__, settings, sorted(entries)]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def checksum(part: Tensor, row: int = 0, col: int = 0) -> tuple[int, int]:
    """The additive checksum of the rectangle of a tensor that begins at (row, col), each sum in [0, 2^64).

    The tensor is seen as a matrix: its first dimension by all others, a vector as one column.
    """
    if part.numel() == 0:
        return 0, 0
    matrix = part.detach().reshape(len(part), -1) if part.ndim else part.detach().reshape(1, 1)
    bits = matrix.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[part.element_size()])
    num_rows, num_cols = bits.shape
    row_weights = _mix(torch.arange(row, row + num_rows, device=part.device), 1)
    col_weights = _mix(torch.arange(col, col + num_cols, device=part.device), 2)
    sums = torch.zeros(2, dtype=torch.int64, device=part.device)
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
