"""Who runs which samples, who sees which features, and who scores which rectangles: one model's ranks as integers.

Ranks of one tensor-parallel group run the same samples and see different features. *Peers* are the ranks at the same
place of different groups: they see the same features and run different samples, so that each sample is run once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import Layout, Projection, Site
from qkov_dist.layout.modules import routed
from qkov_dist.layout.rects import Rect

from .ownership import Owned, Ownership, assign
from .sharding import (
    gathered_over,
    held_parameters,
    is_cut_between_samples,
    tensor_parallel_ranks,
    tensor_parallel_rect,
)
from .shared_errors import together
from .world import Alone, TorchWorld, World


@dataclass(frozen=True)
class Team:
    """The ranks around one model.

    Attributes:
        world: All ranks.
        peers: This rank and those that see the same features, by data-parallel index.
        peer_ranks: Their ranks in the world.
        ownership: What every rank owns; None where one process owns everything.
        local: The tensor-parallel shard of each projection that this rank sees, [out, in].
        lockstep: Whether every pass of one rank needs a pass of all others (weights are gathered for it).
        in_a_pass: This rank and those that take part in each pass of it.
    """

    world: World = field(default_factory=Alone)
    peers: World = field(default_factory=Alone)
    peer_ranks: tuple[int, ...] = (0,)
    ownership: Ownership | None = None
    local: Mapping[Site, Rect] = field(default_factory=dict)
    lockstep: bool = False
    in_a_pass: World = field(default_factory=Alone)

    @property
    def passes_alone(self) -> bool:
        """Whether no other rank takes part in a pass of this one: weights are whole here, and nothing is summed."""
        return not self.lockstep and self.peers.size == self.world.size

    def owned(self) -> Owned | None:
        """What this rank owns, as the plan asks for it."""
        return None if self.ownership is None else self.owned_by(self.world.rank)

    def owned_by(self, rank: int) -> Owned:
        """What a rank owns."""
        ownership = self.ownership

        def owned(projection: Projection, bias: bool) -> tuple[Rect, ...]:
            if ownership is None:
                return (Rect.of_shape(projection.shape[0], 1 if bias else projection.shape[1]),)
            return ownership.of_rank(projection, bias, rank)

        return owned

    def shares(self, lengths: Sequence[int]) -> list[list[int]]:
        """Sample numbers for each peer, in file order: about as many tokens each, dealt longest first."""
        shares: list[list[int]] = [[] for _ in range(self.peers.size)]
        loads = [0] * len(shares)
        for n in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
            lightest = loads.index(min(loads))
            shares[lightest].append(n)
            loads[lightest] += lengths[n]
        return [sorted(share) for share in shares]


def make_team(world: World, model: nn.Module, layout: Layout, layers: Sequence[int]) -> Team:
    """Find out how the ranks hold a model, and prove that they own every element of it exactly once.

    Args:
        world: All ranks; each calls this with its own part of the model.
        model: The model, before its first pass.
        layout: Its projections.
        layers: The layers that will be scored.

    Raises:
        QkovError: for tensor-parallel groups that do not fit together, or an element with no owner or two.
    """
    together(world, lambda: _refuse_routed(model))
    gathered = together(world, lambda: gathered_over(model))
    groups = world.gather(together(world, lambda: list(tensor_parallel_ranks(model, world.rank, gathered))))
    held = world.gather(together(world, lambda: held_parameters(model, layout, layers)))
    lockstep = any(world.gather(is_cut_between_samples(model)))
    distinct = sorted({tuple(group) for group in groups})
    if (
        sorted(rank for group in distinct for rank in group) != list(range(world.size))
        or len({len(group) for group in distinct}) != 1
    ):
        raise QkovError(
            "ranks",
            expected="tensor-parallel groups of one size, with every rank in exactly one of them",
            got=str(distinct),
            remedy="Give all ranks the same model and mesh.",
        )
    columns = [tuple(group[place] for group in distinct) for place in range(len(distinct[0]))]
    mine = next(column for column in columns if world.rank in column)
    in_a_pass: World = Alone()
    if isinstance(world, TorchWorld) and (lockstep or len(distinct[0]) > 1):
        in_a_pass = world if lockstep else world.subgroup(distinct)
    return Team(
        world=world,
        peers=world.subgroup(columns) if isinstance(world, TorchWorld) else world,
        peer_ranks=mine,
        ownership=assign(layout, layers, held),
        local={
            Site(index, projection.module): rect
            for index in layers
            for projection in layout.layer(index).projections
            if (rect := tensor_parallel_rect(_weight(model, projection), projection, gathered)) is not None
        },
        lockstep=lockstep,
        in_a_pass=in_a_pass,
    )


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
            got="experts that are modules of their own: ranks would wait for each other",
            remedy=f"Call deepspeed.utils.set_z3_leaf_modules(model, [{classes}]) before deepspeed.initialize.",
        )


def _weight(model: nn.Module, projection: Projection) -> Any:
    return model.get_submodule(projection.module).weight
