"""Tables of a comparison: a row a head; a row for every quantity, block and two runs; and what the terminal shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tabulate import tabulate

from qkov_dist.results.comparison import Comparison
from qkov_dist.results.comparison_data import Quantity
from qkov_dist.results.comparison_words import NAMES

from .summary import filled
from .table import Cell, Table

NUM_SHOWN = 10


def heads_table(comparison: Comparison) -> Table:
    """One row a head, with the columns of ``to_pandas``."""
    return _table("heads", comparison.records())


def correlations_table(comparison: Comparison) -> Table:
    """Rank correlations with their intervals; runs by name."""
    names = [run.name for run in comparison.runs]
    rows = comparison.correlations()
    return _table(
        "correlations",
        [{**row, "first": names[row["first"] - 1], "second": names[row["second"] - 1]} for row in rows],
    )


def _table(name: str, records: Sequence[Mapping[str, Any]]) -> Table:
    columns = tuple(records[0]) if records else ()
    return Table(name, columns, tuple(tuple(_cell(record[column]) for column in columns) for record in records))


def _cell(value: Any) -> Cell:
    cell: Cell = None if isinstance(value, float) and math.isnan(value) else value
    return cell


def print_comparison(comparison: Comparison) -> None:
    """Print the answer in words, rank correlations and counts by block, and the heads that moved most, to stdout."""
    for text in comparison.verdict:
        print(filled(text))
    print(f"\n{comparison.title}: rank correlation{_which(comparison)} and heads that moved, by block\n")
    print(tabulate(_by_block(comparison), headers=["quantity", *comparison.blocks, "moved"]))
    if len(comparison.runs) > 2:
        print(f"\nrank correlation of every two runs, {NAMES[comparison.leading]}, mean over blocks\n")
        names = [run.name for run in comparison.runs]
        print(tabulate(_matrix(comparison), headers=["", *names], floatfmt=".2f"))
    rows, headers = most_moved(comparison)
    print(f"\nheads that moved most, {NAMES[comparison.leading]}\n")
    print(tabulate(rows, headers=headers, floatfmt=".4g"))
    print()
    for note in comparison.notes:
        print(filled(f"note: {note}"))


def _which(comparison: Comparison) -> str:
    return "" if len(comparison.runs) == 2 else " (last with first)"


def _by_block(comparison: Comparison) -> list[list[str]]:
    rows = []
    for name, quantity in comparison.quantities.items():
        cells = [interval(quantity, block) for block in comparison.blocks]
        moved = "-" if quantity.moves is None else f"{comparison.num_moved(name)}"
        rows.append([NAMES[name], *cells, moved])
    return rows


def interval(quantity: Quantity, block: str, one: int = 0, other: int = -1) -> str:
    """A rank correlation with its interval; a dash where there is none."""
    value, low, high = (float(of[block][one, other]) for of in (quantity.correlation, quantity.low, quantity.high))
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" + ("" if math.isnan(low) else f" [{low:.2f}, {high:.2f}]")


def _matrix(comparison: Comparison) -> list[list[Any]]:
    matrices = np.stack(list(comparison.quantities[comparison.leading].correlation.values()))
    means = np.nanmean(matrices, axis=0) if np.isfinite(matrices).any() else matrices[0]
    return [[run.name, *row] for run, row in zip(comparison.runs, means, strict=True)]


def most_moved(comparison: Comparison, count: int = NUM_SHOWN) -> tuple[list[list[Any]], list[str]]:
    """Rows and titles of the heads that moved most by the leading quantity: those that moved first, by p."""
    runs, quantity = comparison.runs, comparison.quantities[comparison.leading]
    titles = ["head", *(run.name for run in runs), "difference"]
    titles += ["largest step, to"] if len(runs) > 2 else []
    titles += ["standard error", "q", "family-wise p"] if quantity.moves is not None else []
    rows = []
    for block, layer, head in comparison.heads():
        values = quantity.values[block][:, layer, head]
        difference = float(values[-1] - values[0])
        row: list[Any] = [comparison.name_of(block, layer, head), *map(float, values), difference]
        if len(runs) > 2:
            step, to = (of_block[layer, head] for of_block in quantity.largest_step(block))
            row.append(f"{step:.4g}, {runs[int(to)].name}")
        order = (False, 0.0, -abs(difference))
        if quantity.moves is not None:
            of_head = {key: float(array[layer, head]) for key, array in quantity.moves[block].items()}
            row += [of_head[key] for key in ("standard_error", "q_value", "p_max")]
            order = (not of_head["q_value"] <= comparison.alpha, of_head["p_value"], -abs(difference))
        rows.append((order, row))
    known = [pair for pair in rows if not any(map(math.isnan, pair[0]))]
    return [row for _, row in sorted(known, key=lambda pair: pair[0])[:count]], titles
