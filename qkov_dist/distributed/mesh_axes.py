"""What each axis of a device mesh is for: passes work with shards along one, weights are gathered over others.

The axis of tensor parallelism cuts weights, and each of its ranks sees its own features in a pass. Over the axes of
FSDP2 (and over ZeRO-3's ranks) weights are gathered for a pass, or replicas of them kept.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import Projection
from qkov_dist.layout.rects import Rect

from .placements import held_by_placements, matrix_shape, placements_of_matrix

Gathered = frozenset[tuple[int, ...]]


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
    held = held_by_placements(matrix_shape(tuple(parameter.shape)), [placements_of_matrix(parameter)[axis]])
    (rect,) = held or (Rect(0, 0, 0, 0),)
    return projection.stored(rect)


def is_cut_between_samples(model: nn.Module) -> bool:
    """Whether weights are gathered for each pass (FSDP2, ZeRO-3), so that all ranks have to pass together."""
    return any(hasattr(p, "ds_id") for p in model.parameters()) or any(map(_is_fsdp, model.modules()))


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
