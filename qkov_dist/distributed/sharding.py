"""Which rectangles of each logical weight a rank holds.

A rank *holds* what is in its memory: the interval of a DTensor placement (tensor parallel, FSDP2, or both on a mesh of
two axes), the flat interval of a ZeRO-3 partition cut into at most three rectangles, or the whole of a replicated
weight. This module alone knows these forms; what it hands out is integers.

    placement on an axis of n ranks, this rank at coordinate c, of the interval left by the axes before it
    Replicate              the interval itself
    Shard(dim)             chunk c of n along ``dim``, each ceil(size / n) long, the last ones shorter or empty
    _StridedShard(dim)     the same, but cut after the plain shards of the other axes (FSDP2 over tensor parallel)

What a rank holds of a tensor of any rank: the values, and where in the whole they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import Layout, Projection
from qkov_dist.layout.rects import Rect, rects_of_flat_interval

HeldRects = tuple[Rect, ...]
Gathered = frozenset[tuple[int, ...]]


@dataclass(frozen=True)
class Placement:
    """How one mesh axis treats a weight: ``dim`` is the storage dim that it cuts, None where it replicates.

    ``late`` marks a shard that is cut after the plain shards of the other axes.
    """

    axis_size: int
    coordinate: int
    dim: int | None
    late: bool = False


def shard_interval(size: int, axis_size: int, coordinate: int) -> tuple[int, int]:
    """The interval of chunk ``coordinate``: torch's rule, ceil(size / n) each, the last ones shorter or empty."""
    chunk = -(-size // axis_size)
    return min(chunk * coordinate, size), min(chunk * (coordinate + 1), size)


def held_by_placements(shape: tuple[int, int], placements: Sequence[Placement]) -> HeldRects:
    """The rectangle of a matrix in storage orientation that is left after every axis has cut its dim."""
    bounds = [(0, shape[0]), (0, shape[1])]
    for placement in sorted(placements, key=lambda p: p.late):
        if placement.dim is not None:
            start, stop = bounds[placement.dim]
            low, high = shard_interval(stop - start, placement.axis_size, placement.coordinate)
            bounds[placement.dim] = (start + low, start + high)
    rect = Rect(*bounds[0], *bounds[1])
    return (rect,) if rect.area else ()


def held_by_flat_partition(shape: tuple[int, int], num_partition: int, index: int) -> HeldRects:
    """The rectangles of ZeRO-3's partition ``index``: ``num_partition`` elements of the row-major flattened weight."""
    size = shape[0] * shape[1]
    start = min(num_partition * index, size)
    return rects_of_flat_interval(start, min(start + num_partition, size), shape[1])


def held(parameter: Tensor) -> HeldRects:
    """What this rank holds of a parameter, in storage orientation; a vector is one column.

    Raises:
        QkovError: for a placement that is no plain shard or replica.
    """
    if hasattr(parameter, "ds_id"):
        return held_zero3(parameter)
    shape = matrix_shape(tuple(parameter.shape))
    placements = getattr(parameter, "placements", None)
    if placements is None:
        return (Rect.of_shape(*shape),)
    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    coordinate = mesh.get_coordinate()
    axes = [_placement(p, mesh.size(n), coordinate[n], parameter.ndim) for n, p in enumerate(placements)]
    return held_by_placements(shape, axes)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The first dim by all others; a vector is one column."""
    rows = shape[0] if shape else 1
    cols = 1
    for size in shape[1:]:
        cols *= size
    return rows, cols


def held_zero3(parameter: Any) -> HeldRects:
    """What this rank holds of a ZeRO-3 parameter."""
    if getattr(parameter, "ds_tensor", None) is None:
        return (Rect.of_shape(*matrix_shape(tuple(parameter.ds_shape))),)
    group = parameter.ds_process_group
    shape, size = matrix_shape(tuple(parameter.ds_shape)), int(parameter.ds_tensor.ds_numel)
    return held_by_flat_partition(shape, size, int(group.rank()))


def _placement(placement: Any, axis_size: int, coordinate: int, ndim: int) -> Placement:
    if placement.is_replicate():
        return Placement(axis_size, coordinate, None)
    dim = getattr(placement, "dim", None)
    if dim is None or dim % ndim > 1:
        raise QkovError(
            "sharded weight",
            expected="DTensor placements Replicate, Shard(0) or Shard(1)",
            got=str(placement),
            remedy="Shard the attention projections along their first two dims, or run them replicated.",
        )
    return Placement(axis_size, coordinate, dim % ndim, late=type(placement).__name__ == "_StridedShard")


def gathered_over(model: nn.Module) -> Gathered:
    """The groups over which FSDP2 gathers weights for a pass, or keeps replicas of its shards."""
    found = set()
    for module in model.modules():
        if not _is_fsdp(module):
            continue
        state = module._get_fsdp_state()  # type: ignore[operator]
        for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
            if group is not None:
                info = group.mesh_info
                axes = (getattr(info, "shard_mesh_dim", None), getattr(info, "replicate_mesh_dim", None))
                found |= {_ranks_along(info.mesh, axis) for axis in axes if axis is not None}
    return frozenset(found)


def tensor_parallel_ranks(model: nn.Module, rank: int, gathered: Gathered) -> tuple[int, ...]:
    """The ranks, this one among them, whose shards together make one pass: the group of the tensor-parallel axis.

    Args:
        model: The model.
        rank: This rank.
        gathered: :func:`gathered_over` of the model.

    Raises:
        QkovError: for parameters that are cut over different groups.
    """
    found: dict[tuple[int, ...], str] = {}
    for name, parameter in model.named_parameters():
        axis = _tensor_parallel_axis(parameter, gathered)
        if axis is not None:
            found.setdefault(_ranks_along(parameter.device_mesh, axis), name)  # type: ignore[attr-defined]
    if len(found) > 1:
        raise QkovError(
            "tensor parallelism",
            expected="one group of ranks that shares every layer",
            got="; ".join(f"ranks {', '.join(map(str, ranks))} for {name}" for ranks, name in found.items()),
            remedy="Cut all parameters over the same mesh axis, without pipeline, context or expert parallelism.",
        )
    return next(iter(found), (rank,))


def tensor_parallel_rect(parameter: Any, projection: Projection, gathered: Gathered) -> Rect | None:
    """The shard that a tensor-parallel rank works with in a pass, [out, in]; None where there is no such axis."""
    axis = _tensor_parallel_axis(parameter, gathered)
    if axis is None:
        return None
    mesh = parameter.device_mesh
    placement = _placement(parameter.placements[axis], mesh.size(axis), mesh.get_coordinate()[axis], parameter.ndim)
    (rect,) = held_by_placements(matrix_shape(tuple(parameter.shape)), [placement]) or (Rect(0, 0, 0, 0),)
    return rect.transposed if projection.transposed else rect


def is_cut_between_samples(model: nn.Module) -> bool:
    """Whether weights are gathered for each pass (FSDP2, ZeRO-3), so that all ranks have to pass together."""
    return any(hasattr(p, "ds_id") for p in model.parameters()) or _is_fully_sharded(model)


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


def _is_fully_sharded(model: nn.Module) -> bool:
    return any(map(_is_fsdp, model.modules()))


def _is_fsdp(module: nn.Module) -> bool:
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def _ranks_along(mesh: Any, axis: int) -> tuple[int, ...]:
    """The ranks that differ from this one along one axis alone, this one among them."""
    place = [slice(None) if n == axis else c for n, c in enumerate(mesh.get_coordinate())]
    return tuple(mesh.mesh[tuple(place)].tolist())


def _tensor_parallel_axis(parameter: Any, gathered: Gathered) -> int | None:
    """The mesh axis along which passes work with shards: one that cuts the parameter and is not gathered over.

    Raises:
        QkovError: for pipeline or expert-parallel axes, and for two such axes.
    """
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return None
    names = tuple(mesh.mesh_dim_names or ())
    if other := [name for n, name in enumerate(names) if name in ("pp", "ep", "cp") and mesh.size(n) > 1]:
        raise QkovError(
            "device mesh",
            expected="tensor-parallel and data-parallel axes",
            got=", ".join(other),
            remedy="Load the model without pipeline, context or expert parallelism.",
        )
    cut = [
        n
        for n, placement in enumerate(parameter.placements)
        if mesh.size(n) > 1 and not placement.is_replicate() and _ranks_along(mesh, n) not in gathered
    ]
    if len(cut) > 1:
        raise QkovError(
            "device mesh",
            expected="one axis of tensor parallelism",
            got=f"{len(cut)} ({parameter.placements})",
            remedy="Cut each weight along one axis, and use the others for data parallelism.",
        )
    return cut[0] if cut else None


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
        whole = (Rect.of_shape(projection.shape[0], 1 if bias else projection.shape[1]),)
        if is_sharded(parameter):
            rects = held(parameter)
            rects = tuple(rect.transposed for rect in rects) if projection.transposed and not bias else rects
        else:
            rects = whole  # a quantized weight is packed: it has no shape to read
        found[parameter_name(projection, bias)] = [list(rect.bounds) for rect in rects]
    return found


def is_sharded(parameter: object) -> bool:
    """Whether this process may hold only a part of a parameter."""
    return hasattr(parameter, "placements") or hasattr(parameter, "ds_id")


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
    starts = _starts(tensor, shape)
    stops = [start + size for start, size in zip(starts, tuple(local.shape) or (1,), strict=True)]
    ranges = [torch.arange(start, stop) for start, stop in zip(starts, stops, strict=True)]
    cols = torch.zeros(1, dtype=torch.int64)
    for size, indices in zip(shape[1:], ranges[1:], strict=True):
        cols = (cols[:, None] * size + indices).reshape(-1)
    yield LocalShard(local.detach().reshape(len(ranges[0]), len(cols)), ranges[0], cols, [*starts, *stops])


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
