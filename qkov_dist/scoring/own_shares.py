r"""What single samples do to scores through the Fisher: sums over some elements of each head, for intervals.

In a run I is the mean over the very samples that are scored. Beside M this forms M', where sample i's own square is
taken out of the I by which it is divided:

    M_ij  = sum_p left_i right_j / R^power        R    = max(I, epsilon) + ridge
    M'_ij = sum_p left_i right_j / R_-i^power     R_-i = max((I - w_i g_i^2) W / (W - w_i), epsilon) + ridge

with w_i the sample's weight in I and W that of all samples. Wanted of both are sums of rows by the task of the column,
and of columns by the task of the row, without any sample's pair with itself: O(N) products of an element, where scores
take O(N^2). Of a kind of scores with the same map on both sides M' is (M' + M'^T) / 2.

Wanted, too, is by how much the sums of M' over the pairs of two tasks would be larger were sample k no part of I: over
all pairs ij of these tasks without k,

    V_k  = sum_ij sum_p M'_ij,p ((R / R_-k)^power - 1)_p

for the pairs of its own task with another, of the other with its own, and of the other among itself; that is
O(N) products of an element again.

Their records are those of ``own_share_records``. Only quotients of these sums are used, which take few elements: about
``CHOSEN`` a head, in short runs of a row, by their place in the whole weight alone, so that they are the same however
it is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from qkov_dist.layout.rects import Rect
from qkov_dist.memory import moved

from .influence_sums import parts_of
from .own_share_records import SUMS
from .score import power_of, regularised
from .score_kinds import KINDS, ElementMap, Score
from .tiles import LayerTiles

CHOSEN = 1024  # elements of a head; all of one that has fewer
AT_ONCE = 1024  # elements of all heads that are worked on together at least
RUN = 8  # of these lie side by side: they share a line of memory


@dataclass(frozen=True)
class Shares:
    """The samples that are scored, in the order of their gradients.

    Attributes:
        weights: Each one's weight in the Fisher, [n, 1].
        rest: W / (W - w) of each, [n, 1].
        of_tasks: Which task each is of, [T, n] of 0 and 1.
        parts: Where the samples of each task are.
    """

    weights: Tensor
    rest: Tensor
    of_tasks: Tensor
    parts: Sequence[slice]

    @staticmethod
    def of(weights: Tensor, sizes: Sequence[int]) -> Shares:
        """From weights in the Fisher by task [T, members], of which the scored come first, and each task's number."""
        num, total = sum(sizes), weights.sum()
        own = weights.sum(0)[:num].unsqueeze(1)
        own = torch.where(own < total, own, 0.0)  # without the only sample there is no Fisher: it is left in
        of_tasks, parts = weights.new_zeros(len(sizes), num), parts_of(sizes)
        for task, part in enumerate(parts):
            of_tasks[task, part] = 1.0
        return Shares(own, total / (total - own), of_tasks, parts)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Shares:
        """The same where gradients are, and in their type."""
        weights, rest, of_tasks = (moved(of, device, dtype) for of in (self.weights, self.rest, self.of_tasks))
        return Shares(weights, rest, of_tasks, self.parts)


@dataclass(frozen=True, eq=False)
class Chosen:
    """Which elements of tiles that are worked on together are looked at; the same one for the same elements.

    Attributes:
        places: Of each tile's, among the elements of all, [heads * k].
        counts: 1; 0 of a place that makes up for a tile with fewer, [heads * k]. None where there is none.
    """

    places: Tensor
    counts: Tensor | None


def stride_of(layer_tiles: LayerTiles, block: str) -> int:
    """One run of so many is looked at."""
    heads = {tile.head for tile in layer_tiles.slices if tile.block == block}
    return -(-layer_tiles.block_sizes[block] // (len(heads) * CHOSEN))


def chosen(
    rects: Sequence[Rect], strides: Sequence[int], device: torch.device | str, *, turned: bool = False
) -> Chosen | None:
    """The elements looked at of tiles of one shape, as gradients lie; None where there are none.

    Args:
        rects: The tiles, in their weights.
        strides: One run of so many is looked at, of each tile's block.
        device: Where gradients are.
        turned: Whether a tile's elements lie column by column.
    """
    starts = tuple(
        ((rect.row + rect.col // RUN) % stride, rect.col % RUN, stride)  # alike: looked up once
        for rect, stride in zip(rects, strides, strict=True)
    )
    return _chosen(starts, *rects[0].shape, turned, str(device))


@lru_cache(maxsize=1024)
def _chosen(starts: tuple[tuple[int, int, int], ...], rows: int, cols: int, turned: bool, device: str) -> Chosen | None:
    found = []
    for run, col, stride in starts:
        runs = (torch.arange(run, run + rows).unsqueeze(1) + torch.arange(col, col + cols) // RUN) % stride == 0
        found.append((runs.T if turned else runs).flatten().nonzero().flatten())
    most = max(map(len, found))
    if not most:
        return None
    places, counts = torch.zeros(len(found), most, dtype=torch.int64), torch.zeros(len(found), most)
    for number, of_tile in enumerate(found):
        places[number, : len(of_tile)] = of_tile
        counts[number, : len(of_tile)] = 1.0
    places += torch.arange(len(found)).unsqueeze(1) * (rows * cols)
    return Chosen(places.flatten().to(device), None if counts.all() else counts.flatten().to(device))


class OwnShares:
    """The sums of some heads, tile by tile.

    Args:
        shares: The samples.
        num_heads: Heads that are worked on together.
        score: Which score.
        epsilon: Floor of I.
        ridges: lambda of all heads, or of each.
    """

    def __init__(self, shares: Shares, num_heads: int, score: Score, epsilon: float, ridges: Sequence[float]) -> None:
        self._shares, self._kind, self._epsilon, self._ridges = shares, KINDS[score], epsilon, ridges
        self._sums = shares.of_tasks.new_zeros(SUMS, num_heads, *reversed(shares.of_tasks.shape))
        self._waiting: list[tuple[Tensor, Tensor]] = []  # elements of tiles: few are nearly as much work as many

    def kept(self, gradients: Tensor, elements: Chosen) -> Tensor:
        """What has to be kept of tiles' gradients [members, heads * p], before these are used up: [n, heads * k]."""
        found = gradients[: len(self._shares.weights)].index_select(1, elements.places)
        return found if elements.counts is None else found.mul_(elements.counts)

    def add(self, kept: Tensor, fisher: Tensor) -> None:
        """Add elements' gradients [n, heads * k], with I there [heads * k]."""
        heads = self._sums.shape[1]
        self._waiting.append((kept.view(len(kept), heads, -1), fisher.view(heads, -1)))
        if sum(of.numel() for _, of in self._waiting) >= AT_ONCE:
            self._add_waiting()

    def add_formed(self, sums: Tensor) -> None:
        """Add what is formed of elements of heads, of every sample and maybe more: [heads, SUMS, T, n or more]."""
        self._sums += sums[..., : len(self._shares.weights)].transpose(0, 1).mT

    def _add_waiting(self) -> None:
        if self._waiting:
            kept, fisher = (torch.cat(parts, -1) for parts in zip(*self._waiting, strict=True))
            self._waiting.clear()
            self._add_elements(kept.flatten(1), fisher.flatten())

    def _add_elements(self, kept: Tensor, fisher: Tensor) -> None:
        shares, squares = self._shares, kept.square()
        left, right = (_map(which, kept, squares) for which in (self._kind.left, self._kind.right))
        power = self._kind.power
        given = regularised(fisher.clone(), self._epsilon, self._ridges)
        without_own = torch.addcmul(fisher, shares.weights, squares, value=-1).mul_(shares.rest)
        rest = regularised(without_own, self._epsilon, self._ridges)
        inverse, without = power_of(given, power).reciprocal(), left / power_of(rest, power)
        lost = power_of(torch.div(given, rest, out=rest), power).sub_(1.0)
        if max(self._epsilon, min(self._ridges)) == 0:  # where no sample, or no other one, has a gradient
            inverse.masked_fill_(inverse.isinf(), 0.0)
            without.masked_fill_(~without.isfinite(), 0.0)
            lost.masked_fill_(~lost.isfinite(), 0.0)
        of_without, of_right, both = self._by_task(without), self._by_task(right), without * right
        self._add(0, without, right, of_without, of_right, both)
        self._add_lost(lost, without, right, of_without, of_right, both)
        of_left, of_right = (of * inverse.view(len(of), 1, -1) for of in (self._by_task(left), of_right))
        self._add(2, left, right, of_left, of_right, left * right * inverse)

    def _add(self, place: int, left: Tensor, right: Tensor, of_left: Tensor, of_right: Tensor, own: Tensor) -> None:
        """Rows and columns of one matrix: of both maps [n, heads * k] and their tasks' sums [heads, T, k]."""
        of_own = self._by_head(own).sum(-1).unsqueeze(-1) * self._shares.of_tasks.T
        of_rows, of_columns = self._sums[place : place + 2]
        of_rows.baddbmm_(self._by_head(left), of_right.mT).sub_(of_own)
        of_columns.baddbmm_(self._by_head(right), of_left.mT).sub_(of_own)

    def _add_lost(
        self, lost: Tensor, left: Tensor, right: Tensor, of_left: Tensor, of_right: Tensor, own: Tensor
    ) -> None:
        """V_k, from (R / R_-k)^power - 1 [n, heads * k], maps and their tasks' sums as in ``_add``.

        Sums over pairs without k are those over all, less k's row and column: (l_X - l_k) r_Y of X's pairs with Y.
        """
        by_k, among = self._by_head(lost), of_left * of_right - self._by_task(own)
        of_rows = torch.bmm(self._by_head(lost * left), of_right.mT)
        of_columns = torch.bmm(self._by_head(lost * right), of_left.mT)
        twice = 2 * self._by_head(lost * own).sum(-1)
        for task, part in enumerate(self._shares.parts):
            of_part = by_k[:, part]
            to_others = torch.bmm(of_part, (of_left[:, task, None] * of_right).mT) - of_rows[:, part]
            from_others = torch.bmm(of_part, (of_left * of_right[:, task, None]).mT) - of_columns[:, part]
            of_others = torch.bmm(of_part, among.mT)
            of_task = of_others[..., task] - of_rows[:, part, task] - of_columns[:, part, task] + twice[:, part]
            for place, found in enumerate((to_others, from_others, of_others), start=4):
                found[..., task] = of_task
                self._sums[place, :, part].add_(found)

    def _by_head(self, values: Tensor) -> Tensor:
        """[n, heads * k] -> [heads, n, k]."""
        return values.view(len(values), self._sums.shape[1], -1).transpose(0, 1)

    def _by_task(self, values: Tensor) -> Tensor:
        """Sums over each task's samples, [heads, T, k]."""
        return self._by_head(self._shares.of_tasks @ values)

    def records(self) -> Tensor:
        """float64 [heads, SUMS T n] in the order of the gradients, where these are."""
        self._add_waiting()
        sums = self._sums.double()
        if self._kind.is_symmetric:
            sums = (sums + sums[[1, 0, 3, 2, 5, 4, 6]]) / 2
        return sums.permute(1, 0, 3, 2).flatten(1)


def _map(which: ElementMap, gradients: Tensor, squares: Tensor) -> Tensor:
    if which == "square":
        return squares
    return gradients.abs() if which == "magnitude" else gradients
