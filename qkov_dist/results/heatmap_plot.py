"""The one drawing of a block: layer x native head on a matplotlib axis, with the model's own numbers.

Colours are safe for colour-blind readers and in grey print: cividis for values of one sign, blue to orange about 0 for
others. Grey are heads that a layer does not have. ``Heatmap.plot`` draws with it, and so do the report's figures.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from qkov_dist.errors import QkovError

from .block_view import HEAD_DIM, BlockView, Floats, missing_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE_ORANGE = ("#0b3c74", "#2f6fb1", "#86b6de", "#f3f3f1", "#f2b877", "#cc7318", "#743a02")
MOST_TICKS = 9
PICTURE_DPI = 72
SCORE_LABEL = "mean score"


def draw_block(axis: Any, view: BlockView, values: Floats, title: str, scale: Floats | None) -> None:
    """Draw one block, and its colour bar.

    Args:
        axis: Where.
        view: Whose numbers of layers and heads.
        values: [layer, native head], NaN where absent.
        title: Beside the block's name.
        scale: Values whose largest magnitude both ends of a scale about 0 have; None for values of one sign.
    """
    draw_block_values(axis, view.block, view.layers, view.natives, values, title, scale)


def draw_block_values(
    axis: Any,
    block: str,
    layers: Sequence[int],
    natives: Sequence[int],
    values: Floats,
    title: str,
    scale: Floats | None,
) -> None:
    """The same of a block of which only the numbers of its layers and native heads are known."""
    image = axis.imshow(np.ma.masked_invalid(values), **colors_of(scale))
    axis.set_facecolor("0.85")  # absent heads
    axis.set(title=f"{block}: {title}", xlabel=HEAD_DIM[block].replace("_", " "))
    _ticks(axis.xaxis, natives)
    _ticks(axis.yaxis, layers)
    axis.figure.colorbar(image, ax=axis)


def colors_of(scale: Floats | None) -> dict[str, Any]:
    """How an image is drawn: about 0 with both ends at the largest size in ``scale``, or as values of one sign."""
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


def plot_blocks(
    views: Sequence[BlockView], arrays: Sequence[Floats], label: str, title: str, axis: Axes | None = None
) -> Figure:
    """One quantity of blocks side by side, layer x native head: a matplotlib Figure that belongs to no window.

    Values of both signs share one scale about 0; blocks of mean scores have one each, as slices differ in size.

    Args:
        views: Whose numbers of layers and heads.
        arrays: Of each of them [layer, native head].
        label: What the quantity is called.
        title: Of the figure.
        axis: Where one block is drawn, in place of a figure of its own.

    Raises:
        QkovError: where matplotlib is not installed, or several blocks are to be drawn on one axis.
    """
    if axis is None:
        figure, axes = _side_by_side(views, title)
    else:
        figure, axes = _figure_of(axis), [axis]
    if len(axes) != len(views):
        names = ", ".join(view.block for view in views)
        raise QkovError("plot: ax", expected="one block on one axis", got=names, remedy="Say which: block='Q'.")
    joined = np.concatenate([array.ravel() for array in arrays])
    for place, view, values in zip(axes, views, arrays, strict=True):
        of_scale = values if label.startswith(SCORE_LABEL) else joined
        is_signed = view.conflict_is_low if label.startswith(SCORE_LABEL) else bool((joined < 0).any())
        draw_block(place, view, values, label, of_scale if is_signed else None)
    axes[0].set_ylabel("layer")
    figure._repr_png_ = partial(picture, figure)  # type: ignore[attr-defined]  # notebooks show it without pyplot
    return figure


def _figure_of(axis: Axes) -> Figure:
    figure = None if axis.figure is None else axis.figure.canvas.figure
    if figure is None:
        raise QkovError("plot: ax", expected="an axis of a figure", got="one of none", remedy="Make it by subplots().")
    return figure


def _side_by_side(views: Sequence[BlockView], title: str) -> tuple[Figure, list[Axes]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("plot", "matplotlib") from error
    figure = Figure(figsize=(3.2 * len(views) + 1, 1.6 + 0.16 * max(len(view.layers) for view in views)))
    figure.set_layout_engine("constrained")
    figure.suptitle(as_plain(title))
    return figure, list(figure.subplots(1, len(views), squeeze=False)[0])


def as_plain(text: str) -> str:
    """Text that matplotlib does not read as a formula."""
    return text.replace("$", r"\$")


def picture(figure: Figure) -> bytes:
    """A figure as a small PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=PICTURE_DPI)
    return content.getvalue()
