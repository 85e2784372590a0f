"""Who runs which samples, who sees which features, and who scores which rectangles: one model's ranks as integers.

Ranks of one tensor-parallel group run the same samples and see different features. A data-parallel group is the ranks
at the same place of different tensor-parallel groups: they see the same features and run different samples, so that
each sample is run once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapreplace
from typing import Any

from torch import nn

from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import Layout, Projection, Site
from qkov_dist.layout.modules import routed
from qkov_dist.layout.rects import Rect

from .mesh_axes import Gathered, gathered_over, is_cut_between_samples, tensor_parallel_ranks, tensor_parallel_rect
from .ownership import Owned, Ownership, assign
from .sharding import held_parameters
from .shared_errors import together
from .world import Alone, TorchWorld, World


@dataclass(frozen=True)
class Topology:
    """The ranks around one model.

    Attributes:
        world: All ranks.
        dp_group: This rank and those that see the same features, by data-parallel index.
        dp_ranks: Their ranks in the world.
        ownership: What every rank owns; None where one process owns everything.
        tp_rects: The tensor-parallel shard of each projection that this rank sees, [out, in].
        gathers_weights: Whether weights are gathered for each pass, so that a pass of one rank needs one of all others.
        tp_group: This rank and those whose tensor-parallel shards make a pass together with its own.
        cp_group: This rank and those that share the tokens of each other's samples: neighbours in ``dp_group``.
    """

    world: World = field(default_factory=Alone)
    dp_group: World = field(default_factory=Alone)
    dp_ranks: tuple[int, ...] = (0,)
    ownership: Ownership | None = None
    tp_rects: Mapping[Site, Rect] = field(default_factory=dict)
    gathers_weights: bool = False
    tp_group: World = field(default_factory=Alone)
    cp_group: World = field(default_factory=Alone)

    @property
    def pass_group(self) -> World:
        """This rank and those that take part in each pass of it."""
        if self.gathers_weights:
            return self.world
        return self.cp_group if self.cp_group.size > 1 else self.tp_group

    @property
    def passes_wait(self) -> bool:
        """Whether a pass of one rank needs one of others that run other samples: no rank can halve one by itself."""
        return self.gathers_weights or self.cp_group.size > 1

    @property
    def passes_alone(self) -> bool:
        """Whether no other rank takes part in a pass of this one: weights are whole here, and nothing is summed."""
        return not self.passes_wait and self.dp_group.size == self.world.size

    def owned(self) -> Owned | None:
        """What this rank owns, as the plan asks for it."""
        return None if self.ownership is None else self.owned_by(self.world.rank)

    def owned_by(self, rank: int) -> Owned:
        """What a rank owns."""
        ownership = self.ownership

        def owned(projection: Projection, bias: bool) -> tuple[Rect, ...]:
            if ownership is None:
                return (projection.whole(bias),)
            return ownership.of_rank(projection, bias, rank)

        return owned


def deal_samples(lengths: Sequence[int], dp_size: int) -> list[list[int]]:
    """Sample numbers for each rank of a data-parallel group, in file order: about as many tokens each.

    The longest are dealt first.
    """
    dealt: list[list[int]] = [[] for _ in range(dp_size)]
    loads = [(0, rank) for rank in range(dp_size)]  # a heap: the lightest first, of several the first rank
    for n in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        load, lightest = loads[0]
        dealt[lightest].append(n)
        heapreplace(loads, (load + lengths[n], lightest))
    return [sorted(numbers) for numbers in dealt]


def make_topology(
    world: World, model: nn.Module, layout: Layout, layers: Sequence[int], *, context: int = 1
) -> Topology:
    """Find out how the ranks hold a model, and prove that they own every element of it exactly once.

    Args:
        world: All ranks; each calls this with its own part of the model.
        model: The model, before its first pass.
        layout: Its projections.
        layers: The layers that will be scored.
        context: Neighbouring ranks that share the tokens of each sample.

    Raises:
        QkovError: for tensor-parallel groups that do not fit together, an element with no owner or two, or ranks that
            cannot share tokens.
    """
    together(world, lambda: _refuse_routed(model))
    together(world, lambda: _refuse_rounded(model))
    gathered = together(world, lambda: _within(world, gathered_over(model)))
    groups = world.all_gather(together(world, lambda: _ranks_of_passes(world, model, gathered)))
    held = world.all_gather(together(world, lambda: held_parameters(model, layout, layers)))
    gathers_weights = any(world.all_gather(is_cut_between_samples(model)))
    distinct = _distinct_groups(groups, world.size)
    columns = [tuple(group[place] for group in distinct) for place in range(len(distinct[0]))]
    tp_group: World = Alone()
    if isinstance(world, TorchWorld) and len(distinct[0]) > 1:
        tp_group = world.subgroup(distinct)
    cp_group = _sharing_tokens(world, context, len(distinct[0]))
    return Topology(
        world=world,
        dp_group=world.subgroup(columns) if isinstance(world, TorchWorld) else world,
        dp_ranks=next(column for column in columns if world.rank in column),
        ownership=assign(layout, layers, held),
        tp_rects={
            Site(index, projection.module): rect
            for index in layers
            for projection in layout.layer(index).projections
            if (rect := tensor_parallel_rect(_weight(model, projection), projection, gathered)) is not None
        },
        gathers_weights=gathers_weights,
        tp_group=tp_group,
        cp_group=cp_group,
    )


def _sharing_tokens(world: World, context: int, tp: int) -> World:
    """This rank's group of ``context`` neighbours, which share the tokens of each sample.

    Raises:
        QkovError: where ranks cannot be grouped so.
    """
    if context == 1:
        return Alone()
    if not isinstance(world, TorchWorld) or world.size % context or tp > 1:
        raise QkovError(
            "context parallelism",
            expected=f"a multiple of {context} ranks, each of which runs passes by itself",
            got=f"{world.size}" + (f", of which {tp} make a pass together (tensor or expert parallel)" * (tp > 1)),
            remedy="Start such a number of ranks, and shard the model with fsdp.",
        )
    return world.subgroup([range(first, first + context) for first in range(0, world.size, context)])


def _ranks_of_passes(world: World, model: nn.Module, gathered: Gathered) -> list[int]:
    """Places in a world of the ranks that run the same samples as this one, each its part of a pass."""
    ranks = tensor_parallel_ranks(model, world.names[world.rank], gathered)
    _within(world, {ranks})
    places = {name: place for place, name in enumerate(world.names)}
    return [places[rank] for rank in ranks]


def _within(world: World, groups: Collection[tuple[int, ...]]) -> Gathered:
    """The groups themselves.

    Raises:
        QkovError: for one with ranks beyond the world, which would be waited for.
    """
    if beyond := {rank for group in groups for rank in group} - set(world.names):
        raise QkovError(
            "group",
            expected="all ranks that share the model",
            got=f"none of rank {', '.join(map(str, sorted(beyond)))}, which holds a part of it",
            remedy="Name the group of all of them, or none, and make the call on each.",
        )
    return frozenset(groups)


def _distinct_groups(groups: Sequence[Sequence[int]], size: int) -> list[tuple[int, ...]]:
    """The tensor-parallel groups, from that of each rank.

    Raises:
        QkovError: where they do not fit together.
    """
    distinct = sorted({tuple(group) for group in groups})
    each_once = sorted(rank for group in distinct for rank in group) == list(range(size))
    if not each_once or len({len(group) for group in distinct}) != 1:
        raise QkovError(
            "ranks",
            expected="tensor-parallel groups of one size, with every rank in exactly one of them",
            got=str(distinct),
            remedy="Give all ranks the same model and mesh.",
        )
    return distinct


def _refuse_routed(model: nn.Module) -> None:
    """Refuse ZeRO-3 where ranks would gather different experts' weights, as each rank's tokens are sent, and wait."""
    waiting = {
        type(module).__name__
        for module in routed(model)
        if any(hasattr(p, "ds_id") and not hasattr(p, "ds_z3_leaf_module") for p in module.parameters())
    }
    if waiting:
        classes = ", ".join(f'"{name}"' for name in sorted(waiting))
        raise QkovError(
            f"ZeRO-3: {', '.join(sorted(waiting))}",
            expected="a module whose weights all ranks gather at once, whichever experts their tokens are sent to",
            got="experts that run as often as tokens are sent to them: ranks would wait for each other",
            remedy=f"Call deepspeed.utils.set_z3_leaf_modules(model, [{classes}]) before deepspeed.initialize.",
        )


def _refuse_rounded(model: nn.Module) -> None:
    """Refuse ZeRO-3 where DeepSpeed has written weights to disk in another dtype, as it may on CPUs."""
    for parameter in model.parameters():
        swapper: Any = getattr(parameter, "nvme_swapper", None)
        if swapper is None or swapper.dtype == parameter.dtype or not swapper.swappable_tensor(parameter):
            continue
        raise QkovError(
            "ZeRO-3 with weights on NVMe",
            expected=f"files of {parameter.dtype}, as the weights are",
            got=f"files of {swapper.dtype}: deepspeed.initialize has rounded them",
            remedy="Load the model under deepspeed.zero.Init(config_dict_or_path=...), as from_pretrained does while a "
            "transformers.integrations.HfDeepSpeedConfig of the same settings lives, or keep weights on the CPU "
            '(offload_param: {"device": "cpu"}).',
        )


def _weight(model: nn.Module, projection: Projection) -> Any:
    return model.get_submodule(projection.module).weight
