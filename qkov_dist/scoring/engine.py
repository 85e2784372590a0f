"""From captured factors to scores, layer by layer: the engine behind `qkov run` and the Python API.

    site's factors -> padded groups -> per head: tiles -> gradients -> Fisher, maps, one matrix product for all pairs

Heads are dealt to workers (the threads of a CPU, one for a GPU), some at a time, each of which adds up whole heads, so
that sums do not depend on who is faster. What leaves is additive: the sum over ranks of these results is the result of
one process.

Every layer that this rank has to score, round by round: factors come, scores go, nothing of a layer is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qkov_dist.distributed.topology import Topology
from qkov_dist.memory import UnlessShort, scratch_array

from .block_totals import BlockTotals, block_totals
from .exchange import Exchange
from .fisher_sums import FisherSums, add, no_sums
from .head_scorer import HeadScorer
from .influence_records import Influences, no_influences
from .own_share_records import Records as ShareRecords
from .own_share_records import no_shares
from .own_shares import stride_of
from .packed_factors import knows
from .pipeline import Turn, through_workers, workers
from .schedule import Round, layers_of, make_rounds
from .score import compiled
from .settings import Roles, ScoreSettings
from .site_inputs import FactorSource
from .tile_gradients import Buffers
from .tiles import LayerTiles, TilePlan

LayerSource = tuple[LayerTiles, FactorSource] | None  # None: no layer now, but maybe later


@dataclass
class BlockScores:
    """One block of one layer, as far as this rank owns it.

    Attributes:
        heads: Native heads, [h].
        scores: Partial scores [h, samples left, samples right] in the score dtype, on the CPU.
        fisher: What is known of I over each head's elements, [h, columns].
        influences: What they add to effects (``influence_records``), [h, optimizer, sums and influences];
            nothing where effects are left out.
        own_shares: What samples' own shares of the Fisher do to scores (``own_shares``), [h, sums]; nothing where that
            is left out.
        flops: Floating-point operations of its matrix products.
        kept: Scores where they were formed (``ScoreSettings.kept_layers``); None where they are not kept.
    """

    heads: tuple[int, ...]
    scores: Tensor
    fisher: FisherSums
    influences: Influences
    own_shares: ShareRecords
    flops: int = 0
    kept: Tensor | None = None


Scored = tuple[LayerTiles, dict[str, BlockScores]]


def score_layers(
    layers: Iterable[LayerSource],
    roles: Roles,
    settings: ScoreSettings,
    totals: Mapping[int, BlockTotals] | None = None,
) -> Iterator[Scored]:
    """Score every selected head of some layers for all pairs, one layer after another.

    Args:
        layers: Each layer's tiles and its captured factors, which have to be there until the next layer is asked for.
            That is while this one's last projection is worked on: before its scores are given back. None has nothing
            asked for before they are.
        roles: The samples.
        settings: The metric.
        totals: By layer, each whole block's sum of I over all ranks (``scoring.block_totals``), for a relative
            ridge.

    Yields:
        A layer's tiles, and its partial scores by block (Q, K, V, O, and O_bias where biases are included); additive
        over ranks.

    Raises:
        QkovError, RuntimeError: what ``layers`` raise, after the layers that were begun before are given back; where
            memory does not suffice.
    """
    ridges: dict[tuple[int, str], float] = {}
    strides: dict[tuple[int, str], int] = {}

    def begun() -> Iterator[Turn | None]:
        for layer in layers:
            if layer is None:
                yield None
                continue
            layer_tiles, source = layer
            of_blocks = _ridges(layer_tiles, settings, (totals or {}).get(layer_tiles.layer, {}))
            ridges.update({(layer_tiles.layer, block): ridge for block, ridge in of_blocks.items()})
            strides.update({(layer_tiles.layer, block): stride_of(layer_tiles, block) for block in of_blocks})
            rules = {block: scorer.rule(layer_tiles.layer, [block]) for block in of_blocks if settings.kernel}
            by_kernel = frozenset(block for block, rule in rules.items() if knows(rule, settings.dtype))
            yield Turn(layer_tiles, layer_tiles.tiles, source, by_kernel)

    device_type = torch.device(settings.device).type
    fused = compiled(device_type) if settings.compile and device_type != "cpu" else None
    scorer = HeadScorer(roles, settings, ridges, strides, fused)
    blocks: dict[str, BlockScores] | None = None
    kept = _Kept()
    for done in through_workers(begun(), roles, settings, scorer):
        if blocks is None:
            blocks = {block: _no_scores(heads, roles, settings) for block, heads in done.layer_tiles.heads.items()}
        for tile, part in done.results:
            block = blocks[tile.block]
            at = block.heads.index(tile.head)
            block.scores[at] += part.scores
            add(block.fisher, part.fisher, at)
            if part.influences.size:
                block.influences[at] += part.influences
            if part.own_shares.size:
                block.own_shares[at] += part.own_shares
            block.flops += part.flops
            if part.formed is not None:
                kept.add(tile.block, at, part.formed)
        if done.is_last:
            kept.hand_on(blocks)
            yield done.layer_tiles, blocks
            blocks = None


class _Kept:
    """A layer's scores where they were formed, of blocks whose heads all have a part here, if there is room."""

    def __init__(self) -> None:
        self._parts: dict[str, dict[int, Tensor]] = {}  # by block and place; of a head with several, their sum

    def add(self, block: str, at: int, formed: Tensor) -> None:
        """Add a part of a head's scores."""
        of_block = self._parts.setdefault(block, {})
        with UnlessShort():
            of_block[at] = of_block[at] + formed if at in of_block else formed
            return
        self._parts.clear()  # the host has them

    def hand_on(self, blocks: Mapping[str, BlockScores]) -> None:
        """Give a layer its scores, and begin the next one."""
        with UnlessShort():
            for name, of_block in self._parts.items():
                if len(of_block) == len(blocks[name].heads):
                    blocks[name].kept = torch.stack([of_block[at] for at in range(len(of_block))])
        self._parts.clear()


def score_layer(
    layer_tiles: LayerTiles,
    source: FactorSource,
    roles: Roles,
    settings: ScoreSettings,
    totals: BlockTotals | None = None,
) -> dict[str, BlockScores]:
    """Score one layer, as :func:`score_layers` does; a relative ridge is by default of the samples in ``source``."""
    if totals is None and settings.ridge_relative:
        totals = block_totals(layer_tiles, source, roles, settings)
    ((_, blocks),) = score_layers([(layer_tiles, source)], roles, settings, {layer_tiles.layer: totals or {}})
    return blocks


def _ridges(layer_tiles: LayerTiles, settings: ScoreSettings, totals: Mapping[str, float]) -> dict[str, float]:
    """Lambda of each block."""
    if not settings.ridge_relative:
        return dict.fromkeys(layer_tiles.block_sizes, settings.ridge_absolute)
    return {
        block: settings.ridge_absolute + settings.ridge_relative * totals[block] / size
        for block, size in layer_tiles.block_sizes.items()
    }


def _no_scores(heads: tuple[int, ...], roles: Roles, settings: ScoreSettings) -> BlockScores:
    dtype = np.float64 if settings.dtype == torch.float64 else np.float32
    zeros = scratch_array((len(heads), *roles.shape), dtype, settings.scratch)
    num, num_samples = len(roles.weights), None if roles.means is None else roles.num_scored
    influences = no_influences(len(heads), num_samples, num)
    shares = no_shares(len(heads), roles.num_scored if roles.own_shares else None, num)
    return BlockScores(heads, torch.from_numpy(zeros), no_sums(len(heads), num), influences, shares)


def rounds_of(
    tile_plan: TilePlan, topology: Topology, *, done: Callable[[int], bool] = lambda layer: False
) -> list[Round]:
    """The rounds of all ranks; each brings its own plan.

    Args:
        tile_plan: This rank's tiles.
        topology: The ranks.
        done: Whether this rank has scored a layer before.
    """
    mine = [layer.layer for layer in tile_plan.layers if layer.tiles and not done(layer.layer)]
    return make_rounds(topology.world.all_gather(mine))


def score_rounds(
    tile_plan: TilePlan,
    rounds: Sequence[Round],
    exchange: Exchange,
    roles: Roles,
    settings: ScoreSettings,
    topology: Topology,
    before_round: Callable[[], object] = lambda: None,
) -> Generator[Scored, None, None]:
    """Score this rank's layer of each round; all ranks go through all rounds.

    A round begins while this rank's layer of the one before is still worked on; where it cannot begin, that layer is
    given back first.

    Args:
        tile_plan: This rank's tiles.
        rounds: Whose turn each layer is.
        exchange: Brings factors.
        roles: The samples.
        settings: The metric.
        topology: The ranks.
        before_round: Called by all ranks before each round.

    Yields:
        The layer's tiles, and its partial scores.
    """
    layers = {layer.layer: layer for layer in tile_plan.layers}
    totals: Mapping[int, BlockTotals] = {}
    if settings.ridge_relative:
        totals = _totals(layers, rounds, exchange, roles, settings)
    yield from score_layers(_sources(layers, rounds, exchange, topology, before_round), roles, settings, totals)


def _sources(
    layers: Mapping[int, LayerTiles],
    rounds: Sequence[Round],
    exchange: Exchange,
    topology: Topology,
    before_round: Callable[[], object] = lambda: None,
) -> Iterator[LayerSource]:
    """This rank's layer of each round, and its factors; None where it has none."""
    for turn in rounds:
        before_round()
        with exchange.round(turn) as source:
            yield None if source is None else (layers[turn[topology.world.rank] or 0], source)


def _totals(
    layers: Mapping[int, LayerTiles], rounds: Sequence[Round], exchange: Exchange, roles: Roles, settings: ScoreSettings
) -> dict[int, BlockTotals]:
    """Each layer's sum of I over its whole blocks, over all ranks: of each rank's own samples, before any exchange."""
    wanted, store = layers_of(rounds), exchange.store
    there = wanted if store.sites else []  # of a rank that ran no sample there is nothing

    def of_layer(number: int, _buffers: Buffers) -> BlockTotals:
        return block_totals(layers[number], store, roles, settings, exchange.seen)

    with workers(torch.device(settings.device)) as submit:
        waiting = {str(number): submit(of_layer, number) for number in there}
        mine = {number: wait() for number, wait in waiting.items()}
    summed = {number: dict.fromkeys(layers[number].block_sizes, 0.0) for number in wanted}
    for theirs in exchange.topology.world.all_gather(mine):
        for number, blocks in theirs.items():
            for block, total in blocks.items():
                summed[int(number)][block] += total
    return summed
