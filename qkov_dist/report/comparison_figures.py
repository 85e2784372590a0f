"""Paper figures of a comparison: scatter, differences, and trajectories of more than two runs. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from qkov_dist.results.block_view import BlockView
from qkov_dist.results.comparison import Comparison
from qkov_dist.results.comparison_words import NAMES
from qkov_dist.results.heatmap_plot import as_plain, draw_block

from .drawing import MARK_FILLS, files_of
from .figures import BLOCK_COLORS

NUM_LINES = 8


def comparison_figures(comparison: Comparison) -> Iterator[tuple[str, bytes]]:
    """File name and content of every figure, as PDF and PNG.

    Raises:
        ModuleNotFoundError: where matplotlib is not installed.
    """
    makers: dict[str, Callable[[Comparison], Any]] = {"scatter": draw_scatter, "differences": draw_differences}
    if len(comparison.runs) > 2:
        makers["trajectories"] = draw_trajectories
    yield from files_of(makers, comparison)


def _panels(comparison: Comparison, height: float) -> tuple[Any, list[tuple[Any, str]]]:
    """A figure with an axis for each block, under the name of what it shows."""
    from matplotlib.figure import Figure

    blocks = comparison.blocks
    figure = Figure(figsize=(max(2.1 * len(blocks), 5.0), height), layout="constrained")
    figure.suptitle(as_plain(f"{comparison.title}: {NAMES[comparison.leading]}"))
    axes = figure.subplots(1, len(blocks), squeeze=False)[0]
    return figure, list(zip(axes, blocks, strict=True))


def draw_scatter(comparison: Comparison) -> Any:
    """Each head in the first run (across) and the last (up); heads that moved are coloured by their direction."""
    figure, panels = _panels(comparison, 2.6)
    quantity = comparison.quantities[comparison.leading]
    for axis, block in panels:
        first, last = quantity.values[block][0], quantity.values[block][-1]
        moved = quantity.moved(block, comparison.alpha)
        axis.scatter(first[~moved], last[~moved], s=5, color=BLOCK_COLORS[block], alpha=0.45, linewidths=0)
        for side, chosen in {"above": moved & (last > first), "below": moved & (last < first)}.items():
            axis.scatter(first[chosen], last[chosen], s=12, color=MARK_FILLS[side], edgecolors="0.2", linewidths=0.3)
        if quantity.moves is not None:
            axis.axline((0, 0), slope=1, color="0.5", linewidth=0.6, linestyle="--")
        axis.set(title=block, xlabel=as_plain(comparison.runs[0].name))
    panels[0][0].set_ylabel(as_plain(comparison.runs[-1].name))
    return figure


def draw_differences(comparison: Comparison) -> Any:
    """Layer x native head by block: last run minus first; a dot where a head moved."""
    figure, panels = _panels(comparison, 0.9 + 0.055 * max(len(comparison.runs[0].layers), 24))
    quantity, run = comparison.quantities[comparison.leading], comparison.runs[0]
    apart = {block: values[-1] - values[0] for block, values in quantity.values.items()}
    joined = np.concatenate([values.ravel() for values in apart.values()])
    for axis, block in panels:
        groups = np.ones(len(run.layers), np.int64)
        view = BlockView(block, run.layers, run.natives[block], run.natives[block], groups, apart[block], None, (), ())
        draw_block(axis, view, apart[block], "difference", joined)
        layers, heads = np.nonzero(quantity.moved(block, comparison.alpha))
        axis.scatter(heads, layers, s=4, color="0.1", linewidths=0)
    panels[0][0].set_ylabel("layer")
    return figure


def draw_trajectories(comparison: Comparison) -> Any:
    """Every head over the runs; those of a block that moved most from the first to the last are coloured."""
    figure, panels = _panels(comparison, 2.4)
    quantity = comparison.quantities[comparison.leading]
    for axis, block in panels:
        lines = quantity.values[block].reshape(len(comparison.runs), -1)
        lines = lines[:, np.isfinite(lines).all(axis=0)]
        places = np.arange(1, len(lines) + 1)
        axis.plot(places, lines, color="0.7", linewidth=0.4)
        far = np.argsort(-np.abs(lines[-1] - lines[0]))[:NUM_LINES]
        axis.plot(places, lines[:, far], color=BLOCK_COLORS[block], linewidth=1.0)
        axis.set(title=block, xlabel="run", xticks=places)
    panels[0][0].set_ylabel(NAMES[comparison.leading])
    return figure
