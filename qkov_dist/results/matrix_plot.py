"""The one drawing of a matrix of tasks: task x task on a matplotlib axis, with numbers where there is room for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qkov_dist.errors import QkovError

from .block_view import missing_extra
from .heatmap_plot import as_plain, colors_of
from .verdict_facts import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]
MOST_WITH_NUMBERS, LONGEST_NAME = 10, 22  # tasks, beyond which cells hold no numbers; letters of a name


def draw_matrix(
    axis: Any, values: Floats, tasks: Sequence[str], title: str, *, is_signed: bool, is_integer: bool = False
) -> None:
    """Draw one matrix, and its colour bar.

    Args:
        axis: Where.
        values: [task, task] in the order of the drawing, NaN where there is nothing to say.
        tasks: Names in that order.
        title: Of the drawing.
        is_signed: Whether colours are about 0, those of values off the diagonal alone.
        is_integer: Whether numbers are counts.
    """
    apart = np.where(np.eye(len(tasks), dtype=bool), np.nan, values)
    image = axis.imshow(np.ma.masked_invalid(values), **{**colors_of(apart if is_signed else None), "origin": "upper"})
    if not is_signed and np.isfinite(apart).any():
        image.set_clim(float(np.nanmin(apart)), float(np.nanmax(apart)))
    axis.set_facecolor("0.85")
    axis.set_title(title)
    names = [as_plain(name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…") for name in tasks]
    axis.set_xticks(range(len(tasks)), labels=names, rotation=90)
    axis.set_yticks(range(len(tasks)), labels=names)
    if len(tasks) > 32:
        axis.tick_params(labelsize=5)
    axis.figure.colorbar(image, ax=axis)
    if is_integer:
        as_counts(image, float(np.nanmax(apart, initial=0)))
    if len(tasks) <= MOST_WITH_NUMBERS:
        _write_numbers(axis, image, values, is_integer=is_integer)


def as_counts(image: Any, most: float) -> None:
    """Colours of an image from 0 to a largest count, with whole numbers at its bar."""
    from matplotlib.ticker import MaxNLocator

    image.set_clim(0, max(most, 1))
    image.colorbar.locator = MaxNLocator(nbins=5, integer=True)
    image.colorbar.update_ticks()


def _write_numbers(axis: Any, image: Any, values: Floats, *, is_integer: bool) -> None:
    """Each cell's number, in an ink that is seen on its colour."""
    for row, column in np.argwhere(np.isfinite(values)):
        value = float(values[row, column])
        red, green, blue, _ = image.cmap(image.norm(value))
        ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
        text = f"{value:.0f}" if is_integer else number(value)
        axis.text(column, row, text, ha="center", va="center", fontsize=6, color=ink)


def plot_matrix(
    values: Floats, tasks: Sequence[str], label: str, title: str, *, is_signed: bool, axis: Axes | None = None
) -> Figure:
    """One matrix as a figure that belongs to no window, or on an axis of another.

    Raises:
        QkovError: where matplotlib is not installed, or the axis belongs to no figure.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("plot", "matplotlib") from error
    if axis is None:
        side = 2.4 + 0.28 * len(tasks)
        figure = Figure(figsize=(max(side + 1.2, 5.0), side), layout="constrained")
        figure.suptitle(as_plain(title))
        draw_matrix(figure.subplots(), values, tasks, label, is_signed=is_signed)
        return figure
    draw_matrix(axis, values, tasks, label, is_signed=is_signed)
    of_axis = None if axis.figure is None else axis.figure.canvas.figure
    if of_axis is None:
        raise QkovError("plot: ax", expected="an axis of a figure", got="one of none", remedy="Make it by subplots().")
    return of_axis
