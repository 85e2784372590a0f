"""From captured factors to one layer's scores: the engine behind `qkov run` and the Python API.

For each layer the factors are loaded once. Each tile's gradients are formed, its Fisher is taken from them, and one
matrix product adds the tile to its head's scores for all pairs. What leaves is additive: the sum over ranks of these
results is the result of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .capture import Site
from .factors import Window
from .plan import LayerPlan, Tile
from .score import (
    NO_ELEMENTS,
    FisherSums,
    Score,
    compiled_maps,
    diagonal_fisher,
    fisher_sums,
    maps,
    pair_scores,
    sample_gradients,
)

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
    device: torch.device | str = "cpu"
    compile: bool = False


@dataclass(frozen=True)
class Roles:
    """Which samples take part.

    Attributes:
        members: Pooled sample numbers whose gradients are formed, [N].
        weights: Each member's weight in the Fisher, float64 [N].
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
        scores: Partial scores [h, samples left, samples right] in the score dtype.
        fisher: Summary of I over each head's elements, [h].
    """

    heads: tuple[int, ...]
    scores: Tensor
    fisher: list[FisherSums] = field(default_factory=list)


class FactorSource(Protocol):
    """Where a layer's factors come from: this process's own store, or the ranks that ran the samples."""

    @property
    def spans(self) -> Mapping[int, tuple[int, int]]:
        """Rows (start, stop) of each sample, by its pooled number."""

    def x_site(self, site: Site) -> Site:
        """The site whose X this site shares."""

    def x(self, site: Site) -> Window:
        """Inputs of all samples' tokens."""

    def d(self, site: Site) -> Window:
        """Output gradients of all samples' tokens."""


def score_layer(
    plan: LayerPlan,
    source: FactorSource,
    roles: Roles,
    settings: ScoreSettings,
    total_over_ranks: Callable[[BlockTotals], BlockTotals] = dict,
) -> dict[str, BlockScores]:
    """Score every selected head of one layer for all pairs.

    Args:
        plan: The layer's tiles.
        source: Captured factors.
        roles: The samples.
        settings: The metric.
        total_over_ranks: Sums each block's total of I over all ranks, where a relative ridge needs it.

    Returns:
        Partial scores by block (Q, K, V, O, and O_bias where biases are included); additive over ranks.
    """
    ridge = dict.fromkeys(plan.block_sizes, settings.ridge_absolute)
    if settings.ridge_relative:
        totals = total_over_ranks(_block_totals(plan, source, roles, settings))
        for block, size in plan.block_sizes.items():
            ridge[block] += settings.ridge_relative * totals[block] / size
    blocks = {block: _no_scores(heads, roles, settings) for block, heads in plan.heads.items()}
    weights = torch.as_tensor(roles.weights).to(settings.device, settings.dtype)
    elementwise = compiled_maps() if settings.compile else maps
    for tile, gradients in _tile_gradients(plan.tiles, source, roles, settings):
        fisher = diagonal_fisher(gradients, weights)
        scored, at = blocks[tile.block], blocks[tile.block].heads.index(tile.head)
        scored.fisher[at] += fisher_sums(fisher, ridge[tile.block])
        scored.scores[at] += pair_scores(
            gradients,
            fisher,
            left=roles.left,
            right=roles.right,
            score=settings.score,
            epsilon=settings.epsilon,
            ridge=ridge[tile.block],
            maps=elementwise,
        )
    return blocks


def _no_scores(heads: tuple[int, ...], roles: Roles, settings: ScoreSettings) -> BlockScores:
    zeros = torch.zeros((len(heads), *roles.shape), dtype=settings.dtype, device=settings.device)
    return BlockScores(heads, zeros, [NO_ELEMENTS] * len(heads))


def _block_totals(plan: LayerPlan, source: FactorSource, roles: Roles, settings: ScoreSettings) -> BlockTotals:
    """This rank's share of the sum of I over each whole block."""
    totals = dict.fromkeys(plan.block_sizes, 0.0)
    weights = torch.as_tensor(roles.weights, dtype=torch.float64)
    for tile, gradients in _tile_gradients(plan.block_tiles, source, roles, settings):
        norms = torch.linalg.vector_norm(gradients, dim=1, dtype=torch.float64).square()
        totals[tile.block] += float(weights @ norms.cpu())
    return totals


def _tile_gradients(
    tiles: Sequence[Tile], source: FactorSource, roles: Roles, settings: ScoreSettings
) -> Iterator[tuple[Tile, Tensor]]:
    """Each tile with its per-sample gradients [N, P]; a layer's factors are read once per projection."""
    spans = [source.spans[member] for member in roles.members]
    x_site, x = None, Window(torch.empty(0))
    sites = sorted({tile.site for tile in tiles}, key=lambda site: (source.x_site(site), site))
    for site in sites:
        if x_site != source.x_site(site):
            x_site, x = source.x_site(site), source.x(site).to(settings.device, settings.dtype)
        d = source.d(site).to(settings.device, settings.dtype)
        for tile in (tile for tile in tiles if tile.site == site):
            inputs = None if tile.bias else x.features(tile.rect.cols)
            yield tile, sample_gradients(inputs, d.features(tile.rect.rows), spans)
