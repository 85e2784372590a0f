"""What a rank holds of a tensor of any rank: the values, and where in the whole they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import QkovError
from .shards import held_zero3, matrix_shape, shard_interval


@dataclass(frozen=True)
class Piece:
    """A part of a tensor that this rank holds, as a matrix, and which rows and columns of the whole it is.

    ``place`` says the same in a few integers: equal places are replicas.
    """

    values: Tensor
    rows: Tensor
    cols: Tensor
    place: list[int]


def pieces_of(name: str, tensor: Any) -> Iterator[Piece]:
    """What this rank holds of a tensor of any rank, seen as its first dim by all others.

    Raises:
        QkovError: for a tensor that is not in memory.
    """
    if hasattr(tensor, "ds_id"):
        yield from _pieces_zero3(tensor)
        return
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if local.is_meta:
        remedy = "Load the weights without offloading to CPU or disk."
        raise QkovError(name, expected="a weight in memory", got="a tensor on the meta device", remedy=remedy)
    shape = tuple(tensor.shape) or (1,)
    starts = _starts(tensor, shape)
    stops = [start + size for start, size in zip(starts, tuple(local.shape) or (1,), strict=True)]
    ranges = [torch.arange(start, stop) for start, stop in zip(starts, stops, strict=True)]
    cols = torch.zeros(1, dtype=torch.int64)
    for size, indices in zip(shape[1:], ranges[1:], strict=True):
        cols = (cols[:, None] * size + indices).reshape(-1)
    yield Piece(local.detach().reshape(len(ranges[0]), len(cols)), ranges[0], cols, [*starts, *stops])


def _starts(tensor: Any, shape: tuple[int, ...]) -> list[int]:
    """The first index of the local shard along each dim."""
    bounds = [(0, size) for size in shape]
    placements = getattr(tensor, "placements", ())
    if placements:
        mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
        late = [type(p).__name__ == "_StridedShard" for p in placements]
        for n in sorted(range(len(placements)), key=lambda n: late[n]):
            dim = getattr(placements[n], "dim", None)
            if dim is not None:
                start, stop = bounds[dim]
                low, high = shard_interval(stop - start, mesh.size(n), coordinate[n])
                bounds[dim] = (start + low, start + high)
    return [start for start, _ in bounds]


def _pieces_zero3(parameter: Any) -> Iterator[Piece]:
    flat, shape = parameter.ds_tensor.detach().reshape(-1), matrix_shape(tuple(parameter.ds_shape))
    first = int(parameter.ds_process_group.rank()) * int(parameter.ds_tensor.ds_numel)
    for rect in held_zero3(parameter):
        start = rect.row * shape[1] + rect.col - first
        values = flat[start : start + rect.area].reshape(rect.shape)
        rows, cols = torch.arange(rect.row, rect.row_end), torch.arange(rect.col, rect.col_end)
        yield Piece(values, rows, cols, list(rect.bounds))


def logical_shape(tensor: Any) -> tuple[int, ...]:
    """The shape of the whole tensor, however it is sharded."""
    return tuple(tensor.ds_shape if hasattr(tensor, "ds_id") else tensor.shape)
