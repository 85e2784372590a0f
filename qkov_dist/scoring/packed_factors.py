"""A projection's factors of all samples as the native kernel reads them, and what it makes of a tile of them.

Samples lie in lanes, as many side by side as a vector of the processor holds (a *block*), in the order of the members:
of a block all have as many tokens as the longest, those that a sample lacks are 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from qkov_dist.layout.rects import Rect

from .influence_sums import InfluenceSums, MeanWeights
from .kernel import Rule, mirror
from .native_kernel import MAPS, NativeKernel, Tile, pointers
from .own_share_records import SUMS
from .own_shares import Chosen, OwnShares, Shares
from .padded_groups import PaddedGroup
from .score import fisher_records
from .score_kinds import KINDS
from .tile_gradients import Buffers

LEAST_FILLED = 0.6  # of all lanes' tokens that are a sample's; with fewer, torch's products take less


@dataclass(frozen=True)
class Blocks:
    """How members lie in lanes.

    Attributes:
        kernel: Who reads them.
        groups: The members, group by group.
        tokens: Of each block, int64 [blocks].
        is_full: Whether every lane's every token is a sample's.
    """

    kernel: NativeKernel
    groups: Sequence[PaddedGroup]
    tokens: Tensor
    is_full: bool

    @staticmethod
    def of(kernel: NativeKernel, groups: Sequence[PaddedGroup]) -> Blocks | None:
        """None where samples are kept as gradients, or lanes would be empty for the most part."""
        if any(group.real is None for group in groups):
            return None
        tokens = tokens_of_blocks(kernel.lanes, [(group.first, group.last, group.length) for group in groups])
        filled = sum((group.last - group.first) * group.length for group in groups) / (kernel.lanes * sum(tokens))
        return None if filled < LEAST_FILLED else Blocks(kernel, groups, torch.tensor(tokens), is_full=filled == 1)

    @property
    def num_lanes(self) -> int:
        """Of all blocks."""
        return len(self.tokens) * self.kernel.lanes

    def in_lanes(self, values: Tensor) -> Tensor:
        """Numbers of the members, or of the first of them, [..., n] -> [..., lanes]; 0 in the others."""
        found = values.new_zeros(*values.shape[:-1], self.num_lanes, dtype=self.kernel.dtype)
        found[..., : values.shape[-1]] = values
        return found

    def pack(self, factors: Sequence[Tensor]) -> PackedFactor:
        """Factors [n, T, width] of each group, packed."""
        lanes, panel = self.kernel.lanes, self.kernel.panel
        width = -(-factors[0].shape[2] // panel) * panel
        starts = torch.cat([self.tokens.new_zeros(1), self.tokens.cumsum(0)]) * (width * lanes)
        packed = torch.empty(int(starts[-1]), dtype=self.kernel.dtype)
        if not self.is_full or width > factors[0].shape[2]:
            packed.zero_()
        for group, values in zip(self.groups, factors, strict=True):
            of_group = values if values.stride(2) == 1 else values.contiguous()
            for first, last in _in_blocks(group.first, group.last, lanes):
                block = first // lanes
                self.kernel.pack(
                    of_group[first - group.first : last - group.first],
                    first % lanes,
                    int(self.tokens[block]),
                    packed[int(starts[block]) : int(starts[block + 1])],
                )
        return PackedFactor(packed, starts[:-1].contiguous())


def tokens_of_blocks(lanes: int, groups: Sequence[tuple[int, int, int]]) -> list[int]:
    """Tokens of each block of so many lanes, of groups of members (first, last, tokens)."""
    found = [0] * -(-groups[-1][1] // lanes)
    for first, last, length in groups:
        for start, _ in _in_blocks(first, last, lanes):
            found[start // lanes] = max(found[start // lanes], length)
    return found


def _in_blocks(first: int, last: int, lanes: int) -> Iterator[tuple[int, int]]:
    """A range of members, cut where blocks end."""
    edges = [first, *range(first // lanes * lanes + lanes, last, lanes), last]
    return pairwise(edges)


@dataclass(frozen=True)
class PackedFactor:
    """X or D of a projection.

    Attributes:
        values: [block][panel of features][token][feature of the panel][lane].
        starts: Where each block's begin, int64 [blocks].
    """

    values: Tensor
    starts: Tensor


@dataclass(frozen=True)
class LaneWeights:
    """What members count for, in lanes; None where nobody asks.

    Attributes:
        fisher: In the Fisher, by task [T, lanes].
        means: In the mean gradient of their task, and in F of it [T, lanes].
        own_squares: Whether F is no multiple of what the task adds to the Fisher.
        own: In the Fisher, of whatever task [lanes] (``own_shares.Shares``).
        rest: What makes the rest of the Fisher a mean again, without each [lanes].
        of_tasks: Which task each is of, 0 and 1 [T, lanes].
    """

    fisher: Tensor
    means: Tensor | None = None
    own_squares: bool = False
    own: Tensor | None = None
    rest: Tensor | None = None
    of_tasks: Tensor | None = None

    @staticmethod
    def of(blocks: Blocks, fisher: Tensor, means: MeanWeights | None, shares: Shares | None) -> LaneWeights:
        """Those of members in their order."""
        found = LaneWeights(blocks.in_lanes(fisher))
        if means is not None:
            found = replace(found, means=blocks.in_lanes(means.of_squares), own_squares=means.needs_squares)
        if shares is not None:
            own, rest = blocks.in_lanes(shares.weights.flatten()), 1 + blocks.in_lanes(shares.rest.flatten() - 1)
            found = replace(found, own=own, rest=rest, of_tasks=blocks.in_lanes(shares.of_tasks))
        return found


@dataclass(frozen=True)
class PackedSite:
    """One projection.

    Attributes:
        blocks: How members lie in lanes.
        x: Inputs.
        d: Output gradients.
        x_start: The first feature of inputs that is there.
        d_start: The same of output gradients.
        weights: The members'.
    """

    blocks: Blocks
    x: PackedFactor
    d: PackedFactor
    x_start: int
    d_start: int
    weights: LaneWeights

    def knows(self, rule: Rule) -> bool:
        """Whether it forms such scores."""
        kind = KINDS[rule.score]
        known = {kind.left, kind.right} <= MAPS.keys() and kind.power == 1
        return known and not rule.may_vanish(self.blocks.kernel.dtype)

    def add_tile(
        self,
        scores: Tensor,
        rect: Rect,
        rule: Rule,
        buffers: Buffers,
        effects: InfluenceSums | None = None,
        own: tuple[OwnShares, Chosen] | None = None,
    ) -> Tensor:
        """:func:`qkov_dist.scoring.kernel.add_tile` of one head, from factors on.

        Args:
            scores: [1, left, right], added to.
            rect: The tile.
            rule: The score.
            buffers: The worker's.
            effects: Added to; None leaves them out.
            own: Own shares, added to, and the elements looked at; None leaves them out.

        Returns:
            What is known of I there: records of ``scoring.fisher_sums``, float64 [1, columns].
        """
        kernel, kind, weights = self.blocks.kernel, KINDS[rule.score], self.weights
        num_blocks, lanes, num_tasks = len(self.blocks.tokens), self.blocks.num_lanes, len(weights.fisher)
        fisher = torch.zeros(2 + num_tasks, dtype=torch.float64)
        fisher[0] = torch.inf
        products = influences = shares = None
        if effects is not None:
            products = torch.zeros(2 * num_tasks, 2 * num_tasks + 2, dtype=torch.float64)
            influences = torch.zeros(2, num_tasks, lanes, dtype=kernel.dtype)
        if own is not None:
            shares = torch.zeros(SUMS, num_tasks, lanes, dtype=kernel.dtype)
        needed = kernel.scratch(num_blocks, scores.shape[1], num_tasks)
        scratch = buffers.take("scratch", (1, needed), kernel.dtype, scores.device)
        kernel.add(
            Tile(
                **pointers(x=self.x.values, d=self.d.values, x_at=self.x.starts, d_at=self.d.starts),
                **pointers(tokens=self.blocks.tokens, weights=weights.fisher, mean_weights=weights.means),
                **pointers(own_weights=weights.own, rest=weights.rest),
                **pointers(scores=scores, fisher=fisher, products=products, influences=influences),
                **pointers(chosen=None if own is None else _marked(own[1], rect.area), of_tasks=weights.of_tasks),
                **pointers(own_shares=shares, scratch=scratch),
                blocks=num_blocks,
                row=rect.row - self.d_start,
                rows=rect.shape[0],
                col=rect.col - self.x_start,
                cols=rect.shape[1],
                tasks=num_tasks,
                own_squares=weights.own_squares,
                epsilon=rule.epsilon,
                ridge=rule.ridge,
                least=rule.least,
                left_map=MAPS[kind.left],
                right_map=MAPS[kind.right],
                alike=kind.is_symmetric,
                half=rule.is_symmetric,
                left=rule.left.start,
                left_end=rule.left.stop,
                right=rule.right.start,
                right_end=rule.right.stop,
            )
        )
        if rule.is_symmetric:
            mirror(scores[0])
        if effects is not None and products is not None and influences is not None:
            effects.add_formed(products, influences)
        if own is not None and shares is not None:
            own[0].add_formed(shares)
        return _fisher_record(rect.area, fisher)


@lru_cache(maxsize=64)
def _marked(elements: Chosen, size: int) -> Tensor:
    """Which of a tile's elements are chosen, uint8 [size]."""
    found = torch.zeros(size, dtype=torch.uint8)
    found[elements.places] = 1
    return found


def _fisher_record(size: int, found: Tensor) -> Tensor:
    """The record of so many elements, [1, columns], from what the kernel says of I there."""
    least, num_below, *by_task = found.unsqueeze(1)
    count = torch.full_like(least, size)
    of_all = {"sum": found[2:].sum(0, keepdim=True), "count": count, "min": least, "num_ridge_above": num_below}
    return fisher_records(of_all, by_task[:-1])
