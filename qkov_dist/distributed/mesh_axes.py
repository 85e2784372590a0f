"""What each axis of a device mesh is for: passes work with shards along one, weights are gathered over others.

The axis of tensor parallelism cuts weights, and each of its ranks sees its own features in a pass. Over the axes of
FSDP2 (and over ZeRO-3's ranks) weights are gathered for a pass, or replicas of them kept. Over an axis of expert
parallelism tokens travel to the experts that they are sent to. Axes are known by what is done over them, not by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import Projection
from qkov_dist.layout.modules import EXPERTS
from qkov_dist.layout.rects import Rect

from .placements import held_by_placements, matrix_shape, placements_of_matrix

Gathered = frozenset[tuple[int, ...]]


def gathered_over(model: nn.Module) -> Gathered:
    """The groups over which FSDP2 gathers weights for a pass, or keeps replicas of its shards, and ZeRO-3 its parts."""
    parts = {id(g): g for p in model.parameters() if (g := getattr(p, "ds_process_group", None)) is not None}
    found = {tuple(torch.distributed.get_process_group_ranks(group)) for group in parts.values()}
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
    """The ranks, this one among them, that run the same samples, each its part of a pass.

    These are the group of the tensor-parallel axis. Experts may lie apart over more ranks, of which tokens are sent to
    whoever has their expert, as long as all of these pass together; they alone say who runs the same samples where
    nothing else is cut.

    Args:
        model: The model.
        rank: This rank.
        gathered: :func:`gathered_over` of the model.

    Raises:
        QkovError: for parameters that are cut over different groups.
    """
    found, of_experts = dict[tuple[int, ...], str](), dict[tuple[int, ...], str]()
    for name, parameter in model.named_parameters():
        expert = is_of_experts(name)
        for axis in _axes_of_passes(parameter, gathered, several=expert):
            (of_experts if expert else found).setdefault(_ranks_along(parameter.device_mesh, axis), name)  # type: ignore[attr-defined]
    if stated := _ranks_stated(model):
        found.setdefault(stated, "its device mesh")
    if not is_cut_between_samples(model):
        together = next(iter(found), ())
        found |= {ranks: name for ranks, name in of_experts.items() if not set(ranks) <= set(together)}
    if len(found) > 1:
        raise QkovError(
            "tensor parallelism",
            expected="one group of ranks that shares every layer",
            got="; ".join(f"ranks {', '.join(map(str, ranks))} for {name}" for ranks, name in found.items()),
            remedy="Cut all parameters over the same mesh axis, and experts over it or, with fully_shard, over more.",
        )
    return next(iter(found), (rank,))


def is_of_experts(name: str) -> bool:
    """Whether a parameter is one of experts that tokens are sent to."""
    return any(map(EXPERTS.search, name.split(".")))


def _ranks_stated(model: nn.Module) -> tuple[int, ...]:
    """The tensor-parallel group that transformers made for a model; none where it made none."""
    manager = getattr(model, "_mesh_manager", None)
    ranks = manager.get_mesh("tp").mesh.flatten().tolist() if manager is not None else []
    return tuple(ranks) if len(ranks) > 1 else ()


def tensor_parallel_rect(parameter: Any, projection: Projection, gathered: Gathered) -> Rect | None:
    """The shard that a tensor-parallel rank works with in a pass, [out, in]; None where there is no such axis."""
    axes = _axes_of_passes(parameter, gathered)
    if not axes:
        return None
    held = held_by_placements(matrix_shape(tuple(parameter.shape)), [placements_of_matrix(parameter)[axes[0]]])
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


def _axes_of_passes(parameter: Any, gathered: Gathered, *, several: bool = False) -> list[int]:
    """The mesh axes along which passes work with shards: those that cut the parameter and are not gathered over.

    Raises:
        QkovError: for pipeline or context-parallel axes, and for two such axes, unless ``several`` may be.
    """
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return []
    names = tuple(mesh.mesh_dim_names or ())
    if other := [name for n, name in enumerate(names) if name in ("pp", "cp", "sp") and mesh.size(n) > 1]:
        raise QkovError(
            "device mesh",
            expected="tensor-parallel, expert-parallel and data-parallel axes",
            got=", ".join(other),
            remedy="Load the model with fsdp in their place (DistributedConfig(fsdp_size=N), or fully_shard).",
        )
    cut = [
        n
        for n, placement in enumerate(parameter.placements)
        if mesh.size(n) > 1 and not placement.is_replicate() and _ranks_along(mesh, n) not in gathered
    ]
    if len(cut) > 1 and not several:
        raise QkovError(
            "device mesh",
            expected="one axis of tensor parallelism",
            got=f"{len(cut)} ({parameter.placements})",
            remedy="Cut each weight along one axis, and use the others for data parallelism.",
        )
    return cut
