"""What a rank has in its memory of a model's tensors, and where in the whole it lies.

A rank *holds* the interval of a DTensor placement (tensor parallel, FSDP2, or both on a mesh of two axes), the flat
interval of a ZeRO-3 partition cut into at most three rectangles, or the whole of a replicated tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import Layout, Projection
from qkov_dist.layout.rects import Rect
from qkov_dist.layout.weights import is_sharded

from .placements import (
    HeldRects,
    held_by_flat_partition,
    held_by_placements,
    matrix_shape,
    pieces_by_placements,
    placements_of,
    placements_of_matrix,
)


def held(parameter: Tensor) -> HeldRects:
    """What this rank holds of a parameter, in storage orientation; a vector is one column.

    Raises:
        QkovError: for a placement that is no plain shard or replica.
    """
    if hasattr(parameter, "ds_id"):
        return held_zero3(parameter)
    return held_by_placements(matrix_shape(tuple(parameter.shape)), placements_of_matrix(parameter))


def held_zero3(parameter: Any) -> HeldRects:
    """What this rank holds of a ZeRO-3 parameter."""
    if getattr(parameter, "ds_tensor", None) is None:
        return (Rect.of_shape(*matrix_shape(tuple(parameter.ds_shape))),)
    group = parameter.ds_process_group
    shape, size = matrix_shape(tuple(parameter.ds_shape)), int(parameter.ds_tensor.ds_numel)
    return held_by_flat_partition(shape, size, int(group.rank()))


def local_part(tensor: Any, num_tokens: int, module: str) -> Tensor:
    """What a rank has in its memory of an input or an output's gradient that may be a DTensor, or still on its way.

    Args:
        tensor: [..., features]; sums that are spread over ranks are added up first, by all of them.
        num_tokens: How many tokens there are in the batch.
        module: The projection, for messages.

    Raises:
        QkovError: where a rank has only some of the tokens.
    """
    if hasattr(tensor, "placements"):
        tensor = tensor.detach()
        partial = any(placement.is_partial() for placement in tensor.placements)
        tensor = tensor.full_tensor() if partial else tensor.to_local()
    if type(tensor).__name__ == "AsyncCollectiveTensor":
        tensor = tensor.wait()
    if tensor.numel() != num_tokens * tensor.shape[-1]:
        raise QkovError(
            module,
            expected=f"all {num_tokens} tokens of the batch on every rank",
            got=f"{tensor.numel() // max(tensor.shape[-1], 1)}",
            remedy="Load the model without sequence or context parallelism: a sample's gradient needs all its tokens.",
        )
    local: Tensor = tensor
    return local


def parameter_name(projection: Projection, bias: bool) -> str:
    """Name of a projection's parameter."""
    return f"{projection.module}.{'bias' if bias else 'weight'}"


def parameters_of(layout: Layout, layers: Sequence[int]) -> Iterator[tuple[Projection, bool]]:
    """The projections' weights and biases of the given layers, in order."""
    for index in layers:
        for projection in layout.layer(index).projections:
            yield projection, False
            if projection.has_bias:
                yield projection, True


def held_parameters(model: nn.Module, layout: Layout, layers: Sequence[int]) -> dict[str, list[list[int]]]:
    """What this rank holds of the given layers' projections, as JSON: name -> rectangles [out, in]."""
    found = {}
    for projection, bias in parameters_of(layout, layers):
        parameter = getattr(model.get_submodule(projection.module), "bias" if bias else "weight")
        if is_sharded(parameter):
            rects = held(parameter)
            rects = rects if bias else tuple(map(projection.stored, rects))
        else:
            rects = (projection.whole(bias),)  # a quantized weight is packed: it has no shape to read
        found[parameter_name(projection, bias)] = [list(rect.bounds) for rect in rects]
    return found


def local_bytes(tensor: Any) -> int:
    """Bytes that this rank holds of a parameter or buffer: of a DTensor its shard, under ZeRO-3 its partition."""
    if hasattr(tensor, "ds_id"):
        return int(tensor.ds_tensor.nbytes) if tensor.ds_tensor is not None else int(tensor.nbytes)
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return int(local.nbytes)


@dataclass(frozen=True)
class LocalShard:
    """A part of a tensor that this rank holds, as a matrix, and which rows and columns of the whole it is.

    ``place`` says the same in a few integers: equal places are replicas.
    """

    values: Tensor
    rows: Tensor
    cols: Tensor
    place: list[int]


def local_shards(name: str, tensor: Any) -> Iterator[LocalShard]:
    """What this rank holds of a tensor of any rank, seen as its first dim by all others.

    Raises:
        QkovError: for a tensor that is not in memory.
    """
    if hasattr(tensor, "ds_id"):
        yield from _zero3_shards(tensor)
        return
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if local.is_meta:
        remedy = "Load the weights without offloading to CPU or disk."
        raise QkovError(name, expected="a weight in memory", got="a tensor on the meta device", remedy=remedy)
    shape = tuple(tensor.shape) or (1,)
    pieces = pieces_by_placements(shape, placements_of(tensor))
    ranges = [torch.cat([torch.arange(start, stop) for start, stop in of_dim]) for of_dim in pieces]
    cols = torch.zeros(1, dtype=torch.int64)
    for size, indices in zip(shape[1:], ranges[1:], strict=True):
        cols = (cols[:, None] * size + indices).reshape(-1)
    yield LocalShard(
        local.detach().reshape(len(ranges[0]), len(cols)),
        ranges[0],
        cols,
        [bound for of_dim in pieces for piece in of_dim for bound in piece],
    )


def _zero3_shards(parameter: Any) -> Iterator[LocalShard]:
    flat, shape = parameter.ds_tensor.detach().reshape(-1), matrix_shape(tuple(parameter.ds_shape))
    first = int(parameter.ds_process_group.rank()) * int(parameter.ds_tensor.ds_numel)
    for rect in held_zero3(parameter):
        start = rect.row * shape[1] + rect.col - first
        values = flat[start : start + rect.area].reshape(rect.shape)
        rows, cols = torch.arange(rect.row, rect.row_end), torch.arange(rect.col, rect.col_end)
        yield LocalShard(values, rows, cols, list(rect.bounds))


def logical_shape(tensor: Any) -> tuple[int, ...]:
    """The shape of the whole tensor, however it is sharded."""
    return tuple(tensor.ds_shape if hasattr(tensor, "ds_id") else tensor.shape)
