"""Figures of what a step does: changes by head, and what blocks and layers add up to. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qkov_dist.results.effects import Total
from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.heatmap_plot import draw_block
from qkov_dist.scoring.influence_records import OPTIMIZERS

from .drawing import MARK_EDGES, MARK_FILLS, add_legend, mark_heads, new_figure
from .effect_findings import BY, EFFECTS, found_by_change, is_family_wise_change


def draw_changes(heatmap: Heatmap) -> Any:
    """Layer x native head by block, with marks: the first-order change by a unit step, of each optimizer."""
    blocks, optimizers = heatmap.blocks, OPTIMIZERS[::-1]
    height = 0.8 + 0.055 * max(len(heatmap.layers), 24)
    figure = new_figure(heatmap, 1.9 * len(blocks), height * len(optimizers))
    rows = figure.subplots(len(optimizers), len(blocks), squeeze=False)
    for axes, optimizer in zip(rows, optimizers, strict=True):
        values = heatmap.quantity(f"change_{optimizer}")
        joined = np.concatenate([values[block] for block in blocks], axis=None)
        for axis, block in zip(axes, blocks, strict=True):
            draw_block(axis, heatmap[block], values[block], f"change ({optimizer})", joined)
            family = is_family_wise_change(heatmap, block, optimizer)
            mark_heads(axis, EFFECTS, found_by_change(heatmap, block, optimizer), family)
        axes[0].set_ylabel("layer")
    level = f"{heatmap.fdr_alpha:g}"
    add_legend(figure, EFFECTS, f"q $\\leq$ {level}; coloured: also family-wise p $\\leq$ {level}")
    return figure


def draw_waterfall(heatmap: Heatmap) -> Any:
    """What blocks, then layers, add up to, each with its own 95% interval."""
    figure = new_figure(heatmap, 2.5 + 0.22 * len(heatmap.layers), 2.4)
    left, right = figure.subplots(1, 2, width_ratios=(len(heatmap.blocks) + 1, max(len(heatmap.layers), 8)))
    whole = heatmap.total_effect(BY)
    by_block = [heatmap.total_effect(BY, block) for block in heatmap.blocks]
    by_layer = [heatmap.total_effect(BY, layer=layer) for layer in heatmap.layers]
    _draw_sums(left, [*by_block, whole], [*heatmap.blocks, "all"])
    _draw_sums(right, [*by_layer, whole], [*map(str, heatmap.layers), "all"])
    left.set(title="blocks", ylabel=f"change ({BY})")
    right.set(title="layers")
    return figure


def _draw_sums(axis: Any, totals: Sequence[Total], names: Sequence[str]) -> None:
    """Bars that begin where the one before ends; the last one, of all, begins at 0."""
    values = np.array([total.change for total in totals])
    starts = np.concatenate([[0.0], np.cumsum(values[:-1])[:-1], [0.0]])
    colors = [MARK_FILLS["above" if value > 0 else "below"] for value in values]
    edges = [MARK_EDGES["above" if value > 0 else "below"] for value in values]
    axis.bar(np.arange(len(values)), values, bottom=starts, color=colors, edgecolor=edges, linewidth=0.6, width=0.75)
    ends = np.array([total.interval for total in totals]) + starts[:, None]
    axis.vlines(np.arange(len(values)), ends[:, 0], ends[:, 1], color="0.2", linewidth=0.8)
    axis.axhline(0, color="0.4", linewidth=0.6)
    step = -(-len(names) // 16)
    places = sorted({*range(0, len(names) - 1, step), len(names) - 1})
    axis.set_xticks(places, labels=[names[place] for place in places])


EFFECT_FIGURES: dict[str, Callable[[Heatmap], Any]] = {"changes": draw_changes, "waterfall": draw_waterfall}
