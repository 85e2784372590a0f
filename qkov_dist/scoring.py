"""Every layer that this rank has to score, round by round: factors come, scores go, nothing of a layer is kept."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

import torch

from .block_totals import BlockTotals, block_totals
from .engine import LayerSource, Roles, Scored, ScoreSettings, score_layers
from .exchange import Exchange
from .kernel import Buffers
from .plan import LayerPlan, Plan
from .rounds import Round, layers_of, make_rounds
from .team import Team
from .workers import workers


def rounds_of(plan: Plan, team: Team, *, done: Callable[[int], bool] = lambda layer: False) -> list[Round]:
    """The rounds of all ranks; each brings its own plan.

    Args:
        plan: This rank's tiles.
        team: The ranks.
        done: Whether this rank has scored a layer before.
    """
    mine = [layer.layer for layer in plan.layers if layer.tiles and not done(layer.layer)]
    return make_rounds(team.world.gather(mine))


def score_rounds(
    plan: Plan,
    rounds: Sequence[Round],
    exchange: Exchange,
    roles: Roles,
    settings: ScoreSettings,
    team: Team,
    before_round: Callable[[], object] = lambda: None,
) -> Generator[Scored, None, None]:
    """Score this rank's layer of each round; all ranks go through all rounds.

    A round begins while this rank's layer of the one before is still worked on; where it cannot begin, that layer is
    given back first.

    Args:
        plan: This rank's tiles.
        rounds: Whose turn each layer is.
        exchange: Brings factors.
        roles: The samples.
        settings: The metric.
        team: The ranks.
        before_round: Called by all ranks before each round.

    Yields:
        The layer's tiles, and its partial scores.
    """
    layers = {layer.layer: layer for layer in plan.layers}
    totals: Mapping[int, BlockTotals] = {}
    if settings.ridge_relative:
        totals = _totals(layers, rounds, exchange, roles, settings)
    yield from score_layers(_sources(layers, rounds, exchange, team, before_round), roles, settings, totals)


def _sources(
    layers: Mapping[int, LayerPlan],
    rounds: Sequence[Round],
    exchange: Exchange,
    team: Team,
    before_round: Callable[[], object] = lambda: None,
) -> Iterator[LayerSource]:
    """This rank's layer of each round, and its factors; None where it has none."""
    for turn in rounds:
        before_round()
        with exchange.round(turn) as source:
            yield None if source is None else (layers[turn[team.world.rank] or 0], source)


def _totals(
    layers: Mapping[int, LayerPlan], rounds: Sequence[Round], exchange: Exchange, roles: Roles, settings: ScoreSettings
) -> dict[int, BlockTotals]:
    """Each layer's sum of I over its whole blocks, over all ranks: of each rank's own samples, before any exchange."""
    wanted, store = layers_of(rounds), exchange.store
    there = wanted if store.sites else []  # of a rank that ran no sample there is nothing

    def of_layer(number: int, _buffers: Buffers) -> BlockTotals:
        return block_totals(layers[number], store, roles, settings, exchange.seen)

    with workers(torch.device(settings.device), settings.matmul_precision) as submit:
        waiting = {str(number): submit(of_layer, number) for number in there}
        mine = {number: wait() for number, wait in waiting.items()}
    summed = {number: dict.fromkeys(layers[number].block_sizes, 0.0) for number in wanted}
    for theirs in exchange.team.world.gather(mine):
        for number, blocks in theirs.items():
            for block, total in blocks.items():
                summed[int(number)][block] += total
    return summed
