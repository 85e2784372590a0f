"""From captured factors to one layer's scores: the engine behind `qkov run` and the Python API.

    site's factors -> padded groups -> per head: tiles -> gradients -> Fisher, maps, one matrix product for all pairs

Heads are dealt to workers (the threads of a CPU, one for a GPU, which works on several heads at once), each of which
adds up whole heads, so that sums do not depend on who is faster. While they compute, the next projection's factors are
read. What leaves is additive: the sum over ranks of these results is the result of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from .capture import Site
from .errors import QkovError
from .groups import Ordering, order_samples
from .kernel import Buffers, Padded, Rule, add_tile, tile_flops, tile_gradients
from .plan import GPU_TILE_BYTES, LayerPlan, Tile
from .score import NO_ELEMENTS, FisherSums, Score, compiled, fisher_sums
from .scratch import scratch_array
from .shortage import is_shortage
from .stacks import Stack, stacks_of
from .windows import Table, Whole, Window
from .workers import workers

T = TypeVar("T")
BlockTotals = dict[str, float]
DTYPES = {"float32": torch.float32, "float64": torch.float64}  # in which scores may be formed


@dataclass(frozen=True)
class ScoreSettings:
    """How scores are formed; the meaning of each is in SPEC's metric and in :mod:`qkov_dist.score`."""

    score: Score = "interference"
    epsilon: float = 1e-10
    ridge_absolute: float = 1e-8
    ridge_relative: float = 0.0
    dtype: torch.dtype = torch.float32
    matmul_precision: str = "highest"  # torch's, of float32 products
    device: torch.device | str = "cpu"
    compile: bool = False
    scratch: Path | None = None  # where scores are that are too large for memory
    warn: Callable[[str], object] = lambda line: None  # takes a line where memory ran out
    stack_bytes: int | None = None  # of gradients of several heads at a time; 0: one head; None: as the device likes it

    def max_elements(self, num_samples: int) -> int:
        """Elements that the heads which are worked on together may have in a tile."""
        preferred = GPU_TILE_BYTES if torch.device(self.device).type == "cuda" else 0
        size = preferred if self.stack_bytes is None else self.stack_bytes
        return size // (num_samples * self.dtype.itemsize)


@dataclass(frozen=True)
class Roles:
    """Which samples take part.

    Attributes:
        members: Pooled sample numbers whose gradients are formed, [N].
        weights: Each member's weight in the Fisher, float64 [2, N]: in row 0 if it is of task A, else in row 1.
        left: Members in the role of i, a range of positions in ``members``.
        right: Members in the role of j.
    """

    members: tuple[int, ...]
    weights: np.ndarray
    left: slice
    right: slice

    @property
    def shape(self) -> tuple[int, int]:
        """(samples in the role of i, samples in the role of j)."""
        return self.left.stop - self.left.start, self.right.stop - self.right.start


@dataclass
class BlockScores:
    """One block of one layer, as far as this rank owns it.

    Attributes:
        heads: Native heads, [h].
        scores: Partial scores [h, samples left, samples right] in the score dtype, on the CPU.
        fisher: Summary of I over each head's elements, [h].
        flops: Floating-point operations of its matrix products.
    """

    heads: tuple[int, ...]
    scores: Tensor
    fisher: list[FisherSums] = field(default_factory=list)
    flops: int = 0


class FactorSource(Protocol):
    """Where a layer's factors come from: this process's own store, or the ranks that ran the samples."""

    def table(self, site: Site) -> Table:
        """Where each sample is at a site."""

    def x_site(self, site: Site) -> Site:
        """The site whose X this site shares."""

    def x(self, site: Site) -> Window:
        """Inputs of all factored samples' tokens."""

    def d(self, site: Site) -> Window:
        """Output gradients of all factored samples' tokens."""

    def g(self, site: Site) -> Whole | None:
        """Gradients of the samples that are kept as such."""


@dataclass(frozen=True)
class _HeadPart:
    """What the tiles of one head in one projection contribute; scores in the order of the roles."""

    scores: Tensor
    fisher: FisherSums
    flops: int


@dataclass(frozen=True)
class _SiteFactors:
    """One projection's factors of all members, in an order of its own."""

    ordering: Ordering
    padded: Sequence[Padded]
    roles: Roles

    @cached_property
    def weights(self) -> Tensor:
        """Each member's weight in the Fisher, by task, in this order: float64 [2, N]."""
        return torch.from_numpy(self.roles.weights[:, list(self.ordering.order)])

    def in_order_of_roles(self, scores: Tensor) -> Tensor:
        """Scores [heads, left, right] of pairs of members in this order, as pairs in the order of the roles."""
        left, right = self._places
        return scores[:, left, right]

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """Where the members in the role of i are, as a column, and those in the role of j."""
        parts = (self.roles.left, self.roles.right)
        left, right = (torch.tensor(self.ordering.place[part]) - part.start for part in parts)
        return left.unsqueeze(1), right


def score_layer(
    plan: LayerPlan,
    source: FactorSource,
    roles: Roles,
    settings: ScoreSettings,
    totals: Mapping[str, float] | None = None,
) -> dict[str, BlockScores]:
    """Score every selected head of one layer for all pairs.

    Args:
        plan: The layer's tiles.
        source: Captured factors.
        roles: The samples.
        settings: The metric.
        totals: Each whole block's sum of I over all ranks, which a relative ridge needs (:func:`block_totals`); this
            process's own by default.

    Returns:
        Partial scores by block (Q, K, V, O, and O_bias where biases are included); additive over ranks.
    """
    ridges = _ridges(plan, source, roles, settings, totals)
    fused = compiled(torch.device(settings.device).type) if settings.compile else None
    rules = {
        block: Rule(settings.score, settings.epsilon, ridge, roles.left, roles.right, fused)
        for block, ridge in ridges.items()
    }

    def score_heads(stack: Stack, site: _SiteFactors, buffers: Buffers) -> list[_HeadPart]:
        rule, sums = rules[stack.first.block], [NO_ELEMENTS] * len(stack.heads)
        weights = site.weights.to(settings.device, settings.dtype)
        scores = torch.zeros((len(stack.heads), *roles.shape), dtype=settings.dtype, device=settings.device)
        for band in stack.bands:
            gradients = _gradients(band, site, buffers)
            by_task = add_tile(scores, gradients, weights, rule, buffers)
            sums = [known + more for known, more in zip(sums, fisher_sums(by_task, rule.ridge), strict=True)]
        flops = sum(tile_flops(site.padded, t.rect.area, roles.shape, bias=t.bias) for t in stack.heads[0])
        found = zip(site.in_order_of_roles(scores.cpu()), sums, strict=True)
        return [_HeadPart(of_head, of_sums, flops) for of_head, of_sums in found]

    blocks = {block: _no_scores(heads, roles, settings) for block, heads in plan.heads.items()}
    for tile, part in _by_head(plan.tiles, source, roles, settings, score_heads):
        block = blocks[tile.block]
        at = block.heads.index(tile.head)
        block.scores[at] += part.scores
        block.fisher[at] += part.fisher
        block.flops += part.flops
    return blocks


def block_totals(plan: LayerPlan, source: FactorSource, roles: Roles, settings: ScoreSettings) -> BlockTotals:
    """The sum of I over each whole block, as far as this rank owns it; additive over ranks."""

    def total(stack: Stack, site: _SiteFactors, buffers: Buffers) -> list[float]:
        found, weights = torch.zeros(len(stack.heads), dtype=torch.float64), site.weights.sum(0)
        for band in stack.bands:
            norms = torch.linalg.vector_norm(_gradients(band, site, buffers), dim=2, dtype=torch.float64)
            found += weights @ norms.cpu().square()
        return list(map(float, found))

    totals = dict.fromkeys(plan.block_sizes, 0.0)
    for tile, found in _by_head(plan.block_tiles, source, roles, settings, total):
        totals[tile.block] += found
    return totals


def _gradients(band: Sequence[Tile], site: _SiteFactors, buffers: Buffers) -> Tensor:
    return tile_gradients(site.padded, [tile.rect for tile in band], bias=band[0].bias, buffers=buffers)


def _ridges(
    plan: LayerPlan,
    source: FactorSource,
    roles: Roles,
    settings: ScoreSettings,
    totals: Mapping[str, float] | None,
) -> dict[str, float]:
    """Lambda of each block."""
    if not settings.ridge_relative:
        return dict.fromkeys(plan.block_sizes, settings.ridge_absolute)
    totals = block_totals(plan, source, roles, settings) if totals is None else totals
    return {
        block: settings.ridge_absolute + settings.ridge_relative * totals[block] / size
        for block, size in plan.block_sizes.items()
    }


def _no_scores(heads: tuple[int, ...], roles: Roles, settings: ScoreSettings) -> BlockScores:
    dtype = np.float64 if settings.dtype == torch.float64 else np.float32
    zeros = scratch_array((len(heads), *roles.shape), dtype, settings.scratch)
    return BlockScores(heads, torch.from_numpy(zeros), [NO_ELEMENTS] * len(heads))


def _by_head(
    tiles: Sequence[Tile],
    source: FactorSource,
    roles: Roles,
    settings: ScoreSettings,
    work: Callable[[Stack, _SiteFactors, Buffers], list[T]],
) -> Iterator[tuple[Tile, T]]:
    """Have ``work`` done for the heads of each projection; yields a tile of each head, and its result.

    Results come in the order of the tiles, whoever is faster. The factors of two projections are held at a time.
    """
    with workers(torch.device(settings.device), settings.matmul_precision) as submit:
        warn = settings.warn
        waiting: list[tuple[Stack, Callable[[], list[T]]]] = []
        for site, factors in _sites(tiles, source, roles, settings):
            of_site, num = [tile for tile in tiles if tile.site == site], len(roles.members)
            stacks = stacks_of(of_site, settings.max_elements(num), num)
            started = [(stack, submit(_in_memory, warn, work, stack, factors)) for stack in stacks]
            yield from _results(waiting)
            waiting = started
        yield from _results(waiting)


def _results(waiting: Sequence[tuple[Stack, Callable[[], list[T]]]]) -> Iterator[tuple[Tile, T]]:
    for stack, results in waiting:
        yield from zip((tiles[0] for tiles in stack.heads), results(), strict=True)


def _in_memory(
    warn: Callable[[str], object],
    work: Callable[[Stack, _SiteFactors, Buffers], list[T]],
    stack: Stack,
    factors: _SiteFactors,
    buffers: Buffers,
) -> list[T]:
    """Do the work; where its tiles do not fit into memory, for half of the heads, or with tiles of half the height.

    Raises:
        QkovError: where a tile of one row does not fit.
    """
    try:
        return work(stack, factors, buffers)
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        buffers.held.clear()
        tile = stack.first
        if len(stack.heads) == stack.tallest == 1:
            raise QkovError(
                f"layer {tile.site.layer}, block {tile.block}, head {tile.head}",
                expected="memory for one row of a weight's gradients of all samples",
                got="too little",
                remedy="Use fewer samples, more ranks, or a machine with more memory.",
            ) from error
    warn(f"out of memory in layer {tile.site.layer}: going on with tiles of half the size")
    return [found for part in stack.smaller() for found in _in_memory(warn, work, part, factors, buffers)]


def _sites(
    tiles: Sequence[Tile], source: FactorSource, roles: Roles, settings: ScoreSettings
) -> Iterator[tuple[Site, _SiteFactors]]:
    """Each projection with its factors, group by group; X is read once for those that share it.

    Raises:
        QkovError: where a projection's factors do not fit into a GPU's memory beside what is there.
    """
    try:
        yield from _read_sites(tiles, source, roles, settings)
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        raise QkovError(
            f"layer {tiles[0].site.layer}",
            expected=f"memory on {settings.device} for the factors of all samples at two projections",
            got="too little",
            remedy="Use fewer or shorter samples, or more ranks; in Python, score with the metric's device='cpu'.",
        ) from error


def _read_sites(
    tiles: Sequence[Tile], source: FactorSource, roles: Roles, settings: ScoreSettings
) -> Iterator[tuple[Site, _SiteFactors]]:
    cuts = (roles.left.start, roles.left.stop, roles.right.start, roles.right.stop)
    x_site, inputs = None, []
    for site in sorted({tile.site for tile in tiles}, key=lambda site: (source.x_site(site), site)):
        ordering = order_samples(roles.members, source.table(site), cuts)
        if x_site != source.x_site(site):
            x_site, x = source.x_site(site), source.x(site).to(settings.device, settings.dtype)
            inputs = [Window(group.inputs(x.values), x.start) for group in ordering.groups]
        d, whole = source.d(site).to(settings.device, settings.dtype), source.g(site)
        whole = whole and whole.to(settings.device, settings.dtype)
        outputs = [Window(group.outputs(d.values), d.start) for group in ordering.groups]
        kept = [whole and group.wholes(whole) for group in ordering.groups]
        groups = zip(ordering.groups, inputs, outputs, kept, strict=True)
        yield site, _SiteFactors(ordering, [Padded(*group) for group in groups], roles)
