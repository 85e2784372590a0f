"""A projection's factors of all samples as the native kernel reads them, and what it makes of a tile of them.

Samples lie in lanes, as many side by side as a vector of the processor holds (a *block*), in the order of the members:
of a block all have as many tokens as the longest, those that a sample lacks are 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from qkov_dist.layout.rects import Rect

from .influence_sums import InfluenceSums, MeanWeights
from .kernel import Rule
from .native_kernel import NativeKernel, Rows, Tile, pointers
from .own_share_records import SUMS
from .own_shares import Chosen, OwnShares, Shares
from .padded_groups import PaddedGroup
from .score import fisher_records, mirror
from .score_kinds import KINDS, MAP_NUMBERS
from .tile_gradients import Buffers

LEAST_FILLED = 0.6  # of all lanes' tokens that are a sample's; with fewer, torch's products take less


@dataclass(frozen=True)
class Blocks:
    """How members lie in lanes.

    Attributes:
        kernel: Who reads them.
        rows: Where each member's are among those of a factor.
        tokens: Of each block, int64 [blocks].
    """

    kernel: NativeKernel
    rows: Rows
    tokens: Tensor

    @staticmethod
    def of(kernel: NativeKernel, groups: Sequence[PaddedGroup]) -> Blocks | None:
        """None where samples are kept as gradients, or lanes would be empty for the most part."""
        reals = [group.real for group in groups if group.real is not None]
        if len(reals) < len(groups):
            return None
        num = -(-groups[-1].last // kernel.lanes) * kernel.lanes
        rows = Rows(torch.zeros(num, dtype=torch.int64), torch.zeros(num, dtype=torch.int64))
        for group, real in zip(groups, reals, strict=True):
            rows.starts[group.first : group.last] = group.rows[:, 0]
            rows.lengths[group.first : group.last] = real.sum(1)
        tokens = rows.lengths.view(-1, kernel.lanes).amax(1)
        filled = float(rows.lengths.sum() / (kernel.lanes * tokens.sum()))
        return None if filled < LEAST_FILLED else Blocks(kernel, rows, tokens)

    @property
    def num_lanes(self) -> int:
        """Of all blocks."""
        return len(self.tokens) * self.kernel.lanes

    def in_lanes(self, values: Tensor) -> Tensor:
        """Numbers of the members, or of the first of them, [..., n] -> [..., lanes]; 0 in the others."""
        found = values.new_zeros(*values.shape[:-1], self.num_lanes, dtype=self.kernel.dtype)
        found[..., : values.shape[-1]] = values
        return found

    def pack(self, values: Tensor, scales: Tensor | None = None) -> PackedFactor:
        """X or D of all rows [rows, width], each member's times its scale [lanes], packed."""
        num = -(-values.shape[1] // self.kernel.panel) * self.kernel.panel * self.kernel.lanes
        starts = (self.tokens.cumsum(0) - self.tokens) * num
        packed = torch.empty(int(self.tokens.sum()) * num, dtype=self.kernel.dtype)
        self.kernel.pack(values, self.rows, scales, self.tokens, starts, packed)
        return PackedFactor(packed, starts)


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
        scales: What each member's gradient is multiplied by [lanes].
        own: In the Fisher, of whatever task [lanes] (``own_shares.Shares``).
        rest: What makes the rest of the Fisher a mean again, without each [lanes].
        of_tasks: Which task each is of, 0 and 1 [T, lanes].
    """

    fisher: Tensor
    means: Tensor | None = None
    own_squares: bool = False
    scales: Tensor | None = None
    own: Tensor | None = None
    rest: Tensor | None = None
    of_tasks: Tensor | None = None

    @staticmethod
    def of(
        blocks: Blocks,
        fisher: Tensor,
        means: MeanWeights | None,
        shares: Shares | None,
        scales: Tensor | None = None,
    ) -> LaneWeights:
        """Those of members in their order."""
        found = LaneWeights(blocks.in_lanes(fisher), scales=None if scales is None else blocks.in_lanes(scales))
        if means is not None:
            found = replace(found, means=blocks.in_lanes(means.of_squares), own_squares=means.needs_squares)
        if shares is not None:
            own, rest = blocks.in_lanes(shares.weights.flatten()), 1 + blocks.in_lanes(shares.rest.flatten() - 1)
            found = replace(found, own=own, rest=rest, of_tasks=blocks.in_lanes(shares.of_tasks))
        return found


def knows(rule: Rule, dtype: torch.dtype) -> bool:
    """Whether the kernel forms such scores in a type."""
    kind = KINDS[rule.score]
    known = {kind.left, kind.right} <= MAP_NUMBERS.keys() and kind.power == 1
    return known and not rule.may_vanish(dtype)


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

    def add_heads(
        self,
        scores: Tensor,
        rects: Sequence[Sequence[Rect]],
        rule: Rule,
        buffers: Buffers,
        effects: InfluenceSums | None = None,
        own: tuple[OwnShares, Callable[[Rect], Chosen | None]] | None = None,
    ) -> Tensor:
        """From factors on, what :func:`qkov_dist.scoring.kernel.add_tile` adds of a tile, of all of some heads.

        Args:
            scores: [heads, left, right], added to.
            rects: Each head's part of the weight.
            rule: The score.
            buffers: The worker's.
            effects: Added to; None leaves them out.
            own: Own shares, added to, and the elements looked at of a rectangle; None leaves them out.

        Returns:
            What is known of I there: records of ``scoring.fisher_sums``, float64 [heads, columns].
        """
        kernel, num_tasks = self.blocks.kernel, len(self.weights.fisher)
        sums = _Sums.zeros(self, scores, with_effects=effects is not None, with_shares=own is not None)
        needed = kernel.scratch(len(self.blocks.tokens), scores.shape[1], num_tasks)
        scratch = buffers.take("scratch", (1, needed), kernel.dtype, scores.device)
        common = {**self._fields, **_rule_fields(rule), **pointers(scratch=scratch)}
        for head, of_head in enumerate(rects):
            of_sums = sums.fields(head)
            for rect in of_head:
                elements = None if own is None else own[1](rect)
                chosen = None if elements is None else _marked(elements, rect.area)
                kernel.add(Tile(**common, **of_sums, **self._place(rect), **pointers(chosen=chosen)))
        if rule.is_symmetric:
            for of_head in scores:
                mirror(of_head)
        if effects is not None and sums.products is not None and sums.influences is not None:
            effects.add_formed(sums.products, sums.influences)
        if own is not None and sums.shares is not None:
            own[0].add_formed(sums.shares)
        return sums.fisher_records([sum(rect.area for rect in of_head) for of_head in rects])

    @cached_property
    def _fields(self) -> dict[str, Any]:
        """What a tile says of the projection."""
        weights = self.weights
        return {
            **pointers(x=self.x.values, d=self.d.values, x_at=self.x.starts, d_at=self.d.starts),
            **pointers(tokens=self.blocks.tokens, weights=weights.fisher, mean_weights=weights.means),
            **pointers(own_weights=weights.own, rest=weights.rest, of_tasks=weights.of_tasks),
            "blocks": len(self.blocks.tokens),
            "tasks": len(weights.fisher),
            "own_squares": weights.own_squares,
        }

    def _place(self, rect: Rect) -> dict[str, int]:
        """Where a rectangle lies among the features that are there."""
        row, col = rect.row - self.d_start, rect.col - self.x_start
        return {"row": row, "rows": rect.shape[0], "col": col, "cols": rect.shape[1]}


def _rule_fields(rule: Rule) -> dict[str, Any]:
    """What a tile says of the score."""
    kind = KINDS[rule.score]
    return {
        "epsilon": rule.epsilon,
        "ridge": rule.ridges[0],
        "least": rule.least[0],
        "left_map": MAP_NUMBERS[kind.left],
        "right_map": MAP_NUMBERS[kind.right],
        "alike": kind.is_symmetric,
        "half": rule.is_symmetric,
        "left": rule.left.start,
        "left_end": rule.left.stop,
        "right": rule.right.start,
        "right_end": rule.right.stop,
    }


@dataclass(frozen=True)
class _Sums:
    """What the kernel adds to, of some heads; None where nobody asks.

    Attributes:
        scores: [heads, left, right].
        fisher: Least of I, how much of it is of no consequence, sums of tasks, float64 [heads, 2 + T].
        products: Of vectors (``influence_sums``), float64 [heads, 2 T, 2 T + 2].
        influences: Of samples with each task's mean and step [heads, optimizer, T, lanes].
        shares: Sums of ``own_shares`` [heads, SUMS, T, lanes].
    """

    scores: Tensor
    fisher: Tensor
    products: Tensor | None
    influences: Tensor | None
    shares: Tensor | None

    @staticmethod
    def zeros(site: PackedSite, scores: Tensor, *, with_effects: bool, with_shares: bool) -> _Sums:
        """Nothing yet."""
        heads, num_tasks, lanes = len(scores), len(site.weights.fisher), site.blocks.num_lanes
        fisher = torch.zeros(heads, 2 + num_tasks, dtype=torch.float64)
        fisher[:, 0] = torch.inf
        products = influences = shares = None
        if with_effects:
            products = torch.zeros(heads, 2 * num_tasks, 2 * num_tasks + 2, dtype=torch.float64)
            influences = scores.new_zeros(heads, 2, num_tasks, lanes)
        if with_shares:
            shares = scores.new_zeros(heads, SUMS, num_tasks, lanes)
        return _Sums(scores, fisher, products, influences, shares)

    def fields(self, head: int) -> dict[str, Any]:
        """What a tile says of those of a head."""
        found = {
            "scores": self.scores,
            "fisher": self.fisher,
            "products": self.products,
            "influences": self.influences,
            "own_shares": self.shares,
        }
        return pointers(**{name: None if of is None else of[head] for name, of in found.items()})

    def fisher_records(self, sizes: Sequence[int]) -> Tensor:
        """The records of heads of so many elements, [heads, columns]."""
        least, num_below, *by_task = self.fisher.unbind(1)
        count = torch.tensor(sizes, dtype=torch.float64)
        of_all = {"sum": self.fisher[:, 2:].sum(1), "count": count, "min": least, "num_ridge_above": num_below}
        return fisher_records(of_all, by_task[:-1])


@lru_cache(maxsize=64)
def _marked(elements: Chosen, size: int) -> Tensor:
    """Which of a tile's elements are chosen, uint8 [size]."""
    found = torch.zeros(size, dtype=torch.uint8)
    found[elements.places] = 1
    return found
