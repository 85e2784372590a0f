"""The one drawing of a block: layer x native head on a matplotlib axis, with the model's own numbers.

Colours are safe for colour-blind readers and in grey print: cividis for values of one sign, blue to orange about 0 for
others. Grey are heads that a layer does not have. ``Heatmap.plot`` draws with it, and so do the report's figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .block_view import HEAD_DIM, BlockView, Floats, missing_extra

BLUE_ORANGE = ("#0b3c74", "#2f6fb1", "#86b6de", "#f3f3f1", "#f2b877", "#cc7318", "#743a02")
MOST_TICKS = 9


def draw_block(axis: Any, view: BlockView, values: Floats, title: str, scale: Floats | None) -> None:
    """Draw one block, and its colour bar.

    Args:
        axis: Where.
        view: Whose numbers of layers and heads.
        values: [layer, native head], NaN where absent.
        title: Beside the block's name.
        scale: Values whose largest magnitude both ends of a scale about 0 have; None for values of one sign.
    """
    image = axis.imshow(np.ma.masked_invalid(values), **_colors(scale))
    axis.set_facecolor("0.85")  # absent heads
    axis.set(title=f"{view.block}: {title}", xlabel=HEAD_DIM[view.block].replace("_", " "))
    _ticks(axis.xaxis, view.natives)
    _ticks(axis.yaxis, view.layers)
    axis.figure.colorbar(image, ax=axis)


def _colors(scale: Floats | None) -> dict[str, Any]:
    from matplotlib.colors import LinearSegmentedColormap

    options: dict[str, Any] = {"aspect": "auto", "origin": "lower", "interpolation": "nearest", "cmap": "cividis"}
    if scale is not None and np.isfinite(scale).any():
        most = float(np.nanmax(np.abs(scale))) or 1.0
        cmap = LinearSegmentedColormap.from_list("blue-orange", BLUE_ORANGE)
        options |= {"cmap": cmap, "vmin": -most, "vmax": most}
    return options


def _ticks(axis: Any, numbers: Sequence[int]) -> None:
    """Label cells with the model's own numbers, as many as fit."""
    places = range(0, len(numbers), -(-len(numbers) // MOST_TICKS))
    axis.set_ticks(list(places), labels=[str(numbers[place]) for place in places])


def plot_blocks(views: Sequence[BlockView], title: str) -> Any:
    """The blocks' mean scores side by side: a matplotlib Figure that belongs to no window.

    Raises:
        QkovError: where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("plot", "matplotlib") from error
    figure = Figure(figsize=(3.2 * len(views) + 1, 1.6 + 0.16 * max(len(view.layers) for view in views)))
    figure.set_layout_engine("constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, len(views), squeeze=False)[0]
    for axis, view in zip(axes, views, strict=True):
        draw_block(axis, view, view.native_avg, "mean score", view.native_avg if view.conflict_is_low else None)
    axes[0].set_ylabel("layer")
    return figure
