r"""Norms of samples' gradients over all scored weights, by which ``metric.sample_scale: unit`` divides each gradient.

    s_n = 1 / ||g_n||,      ||g_n||^2 summed over every selected layer and head, and the biases that are scored

One number a sample, the same on every rank and in every layer: scores, I, lambda and effects are those of s_n g_n. It
is known only when all layers were captured, before the first is scored; like the sums of I (``block_totals``) it comes
from factors as they lie where their samples ran, and only [N] numbers are sent. D (or a gradient that is kept) is
multiplied by it where factors are read (``site_inputs``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from qkov_dist.capture.numerics import products_as
from qkov_dist.errors import QkovError

from .block_totals import Seen, block_squares
from .exchange import Exchange
from .pipeline import workers
from .settings import Roles, ScoreSettings
from .site_inputs import FactorSource
from .tile_gradients import Buffers
from .tiles import LayerTiles, TilePlan

Floats = npt.NDArray[np.float64]
NO_GRADIENT = 1e-37  # a norm whose inverse float32 cannot hold; such a sample's gradients stay as they are, next to 0


def layer_squares(
    layer_tiles: LayerTiles, source: FactorSource, roles: Roles, settings: ScoreSettings, seen: Seen | None = None
) -> Floats:
    """One layer's part of ||g_n||^2, float64 [members], as far as samples are in ``source`` and elements are ``seen``.

    Args:
        layer_tiles: The layer; its selected heads count, and O's bias where it is scored.
        source: Factors of all members, or of some; those that it does not have count nothing.
        roles: The members.
        settings: Where products are formed, and how.
        seen: What this process looks at; everything by default.
    """
    scored = [tile for tile in layer_tiles.slices if tile.head in layer_tiles.heads.get(tile.block, ())]
    squares = np.zeros(len(roles.members))
    with products_as("highest", settings.device):  # terms cancel
        every = range(len(roles.members))
        for _, members, found in block_squares(scored, source, roles.members, every, settings, seen):
            squares[list(members)] += found.numpy()
    return squares


def summed_squares(tile_plan: TilePlan, exchange: Exchange, roles: Roles, settings: ScoreSettings) -> Floats:
    """What some layers add to ||g_n||^2, over all ranks: float64 [members], the same on every rank.

    Args:
        tile_plan: These layers; all ranks bring the same ones.
        exchange: Has the factors of the samples that this rank ran.
        roles: The members.
        settings: Where products are formed, and how.
    """
    there = tile_plan.layers if exchange.store.sites else ()  # of a rank that ran no sample there is nothing

    def of_layer(layer: LayerTiles, _buffers: Buffers) -> Floats:
        return layer_squares(layer, exchange.store, roles, settings, exchange.seen)

    mine = np.zeros(len(roles.members))
    with workers(torch.device(settings.device)) as submit:
        for wait in [submit(of_layer, layer) for layer in there]:
            mine += wait()
    total: Floats = np.asarray(exchange.topology.world.all_gather(mine.tolist()), np.float64).sum(0)
    return total


def norms_of(squares: Floats, names: Sequence[str]) -> Floats:
    """The norms, from the sums over all scored weights.

    Args:
        squares: Of each member.
        names: What each is called.

    Raises:
        QkovError: for a sample whose norm is not finite.
    """
    if not np.isfinite(squares).all():
        raise QkovError(
            f"sample {names[int(np.argmin(np.isfinite(squares)))]!r}",
            expected="a gradient with a finite norm",
            got="an overflow",
            remedy="Check this sample, or set metric.sample_scale=none.",
        )
    return np.sqrt(squares)


def unit_scales(norms: Floats) -> Floats:
    """What makes each gradient one of norm 1; that of a sample without any gradient stays as it is."""
    return 1 / np.where(norms < NO_GRADIENT, 1.0, norms)
