"""Figures of a matrix of tasks, as PDF and PNG, like tasks side by side. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np

from qkov_dist.results.heatmap_plot import as_plain, draw_block_values
from qkov_dist.results.matrix_pairs import heads_in
from qkov_dist.results.matrix_plot import as_counts, draw_matrix
from qkov_dist.results.task_matrix import TaskMatrix
from qkov_dist.results.verdict_facts import BY

from .drawing import FORMATS, files_of
from .matrix_findings import pair_matrix, relative_change


def matrix_figures(matrix: TaskMatrix, kinds: Collection[str] = FORMATS) -> Iterator[tuple[str, bytes]]:
    """File name and content of every figure, in these formats.

    Raises:
        ModuleNotFoundError: where matplotlib is not installed.
    """
    has_effects = all(record.totals for record in matrix.records)
    chosen = FIGURES if has_effects else {"matrix_scores": draw_scores}
    yield from files_of(chosen, matrix, kinds)


def _figure(matrix: TaskMatrix, num_rows: int, num_columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    side = 1.5 + 0.2 * min(len(matrix.tasks), 24)
    figure = Figure(figsize=((side + 0.8) * num_columns, side * num_rows + 0.5), layout="constrained")
    figure.suptitle(as_plain(matrix.title))
    return figure, figure.subplots(num_rows, num_columns, squeeze=False)


def _draw(matrix: TaskMatrix, axis: Any, values: Any, title: str, *, is_signed: bool, is_integer: bool = False) -> None:
    order = list(matrix.order)
    tasks = [matrix.tasks[place] for place in order]
    ordered = values[np.ix_(order, order)]
    draw_matrix(axis, ordered, tasks, title, is_signed=is_signed, is_integer=is_integer)


def draw_totals(matrix: TaskMatrix) -> Any:
    """All heads together: in conflict, in synergy, change at a practical step (else a unit step), cosine."""
    figure, ((conflict, synergy), (change, cosine)) = _figure(matrix, 2, 2)
    for axis, word, sign in ((conflict, "conflict", 1), (synergy, "synergy", -1)):
        counts = pair_matrix(matrix, BY, sign)
        _draw(matrix, axis, counts, f"heads in {word} ({BY})", is_signed=False, is_integer=True)
    relative = 100 * relative_change(matrix, BY)
    if np.isfinite(relative).any():
        _draw(matrix, change, relative, "% of the row's loss, trained on the column", is_signed=True)
    else:
        _draw(matrix, change, matrix.total(f"change_{BY}"), f"change ({BY}), unit step", is_signed=True)
    _draw(matrix, cosine, matrix.cosines(), f"cosine ({BY})", is_signed=True)
    return figure


def draw_by_block(matrix: TaskMatrix) -> Any:
    """Each block: heads in conflict, and the change by a unit step."""
    figure, rows = _figure(matrix, 2, len(matrix.blocks))
    for block, counted, change in zip(matrix.blocks, *rows, strict=True):
        counts = pair_matrix(matrix, BY, 1, block)
        _draw(matrix, counted, counts, f"{block}: in conflict ({BY})", is_signed=False, is_integer=True)
        _draw(matrix, change, matrix.total(f"change_{BY}", block), f"{block}: change ({BY})", is_signed=True)
    return figure


def draw_scores(matrix: TaskMatrix) -> Any:
    """Each block: the mean score, i of the row's task and j of the column's; overlap where it is defined."""
    score = str(matrix.attributes.get("score", "score"))
    averages = {name: {block: matrix.average(name, block) for block in matrix.blocks} for name in ("mean", "overlap")}
    known = [name for name, of in averages.items() if any(np.isfinite(values).any() for values in of.values())]
    figure, rows = _figure(matrix, len(known), len(matrix.blocks))
    for name, axes in zip(known, rows, strict=True):
        for block, axis in zip(matrix.blocks, axes, strict=True):
            values = averages[name][block]
            title = f"{block}: {f'mean {score}' if name == 'mean' else name}"
            _draw(matrix, axis, values, title, is_signed=name != "mean" or bool((values < 0).any()))
    return figure


def draw_heads(matrix: TaskMatrix) -> Any:
    """Layer x native head by block: in how many pairs a head is in conflict, and in synergy."""
    from matplotlib.figure import Figure

    blocks = matrix.blocks
    height = 0.8 + 0.055 * max(len(matrix.layers), 24)
    figure = Figure(figsize=(max(1.9 * len(blocks), 5.0), 2 * height + 0.2), layout="constrained")
    figure.suptitle(as_plain(f"{matrix.title}: in how many of {len(matrix.pairs):,} pairs"))
    rows = figure.subplots(2, len(blocks), squeeze=False)
    for axes, word, sign in ((rows[0], "conflict", 1), (rows[1], "synergy", -1)):
        counts = {block: heads_in(matrix.records, BY, sign, block) for block in blocks}
        most = max(of_block.max() for of_block in counts.values())
        for block, axis in zip(blocks, axes, strict=True):
            shown = np.where(matrix.present[block], counts[block], np.nan)
            draw_block_values(axis, block, matrix.layers, matrix.natives(block), shown, f"in {word} ({BY})", None)
            as_counts(axis.images[0], float(most))
        axes[0].set_ylabel("layer")
    return figure


FIGURES: dict[str, Callable[[TaskMatrix], Any]] = {
    "matrix": draw_totals,
    "matrix_blocks": draw_by_block,
    "matrix_scores": draw_scores,
    "matrix_heads": draw_heads,
}
