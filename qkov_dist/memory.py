"""What a rank keeps in memory, counted from its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from .engine import Roles
from .factors import FactorStore
from .plan import Plan


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        weights: Its parameters and buffers.
        factors: Captured factors, in memory.
        spilled: Captured factors, on disk.
        fisher: I over the largest tile, with the gradients it is taken from.
        scores: Scores of one layer's heads.
        sent: Factors sent to other ranks.
    """

    weights: int
    factors: int = 0
    spilled: int = 0
    fisher: int = 0
    scores: int = 0
    sent: int = 0

    def larger(self, other: Memory) -> Memory:
        """The larger of both, number by number."""
        return Memory(**{name: max(size, getattr(other, name)) for name, size in asdict(self).items()})


def memory_of(
    model: nn.Module,
    store: FactorStore | None = None,
    plan: Plan | None = None,
    roles: Roles | None = None,
    dtype: torch.dtype = torch.float32,
) -> Memory:
    """Count what this rank holds after capture."""
    weights = sum(local_bytes(tensor) for tensor in (*model.parameters(), *model.buffers()))
    if store is None or plan is None or roles is None:
        return Memory(weights)
    largest = max((tile.rect.area for layer in plan.layers for tile in layer.tiles), default=0)
    left, right = roles.shape
    heads = max((len({(t.block, t.head) for t in layer.tiles}) for layer in plan.layers), default=0)
    return Memory(
        weights,
        store.bytes_in_memory,
        store.bytes_on_disk,
        largest * (len(roles.members) + 1) * dtype.itemsize,
        heads * left * right * dtype.itemsize,
    )


def memory_table(ranks: Sequence[Mapping[str, int]]) -> str:
    """One row a rank, in MiB."""
    rows = [
        {"rank": rank, **{name: f"{size / 2**20:.2f}" for name, size in sizes.items()}}
        for rank, sizes in enumerate(ranks)
    ]
    return "MiB of each rank\n" + tabulate(rows, headers="keys", disable_numparse=True)


def local_bytes(tensor: Any) -> int:
    """Bytes that this rank holds of a parameter or buffer."""
    if hasattr(tensor, "ds_id"):
        return int(tensor.ds_tensor.nbytes) if tensor.ds_tensor is not None else int(tensor.nbytes)
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return int(local.nbytes)
