"""The tables of a matrix of tasks: ``pairs``, ``tasks`` and ``heads_over_pairs``; the matrix itself in long form.

Numbers of a pair are those of all heads. ``change`` is for a unit step, its q over all pairs; ``on_a`` is what training
on b until its own loss is 10% lower does to a's loss, as a part of it, ``step_on_a`` such a step on a. ``direction``
holds over all pairs, ``own_direction`` by the pair's own interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np

from qkov_dist.results.matrix_data import MATRIX_KEYS
from qkov_dist.results.matrix_pairs import SCORES, PairRecord
from qkov_dist.results.task_matrix import TaskMatrix
from qkov_dist.results.verdict_facts import BY
from qkov_dist.scoring.influence_records import OPTIMIZERS

from .matrix_findings import heads_over_pairs, kinds_of, task_rows, words_of
from .table import Cell, Table

_TOTALS = ("change", "standard_error", "ci_low", "ci_high", "p_value", "q_value", "direction", "own_direction")
_RELATIVE = tuple(f"{name}_{task}" for task in "ab" for name in ("step_on", "on", "on_ci_low", "on_ci_high"))


def matrix_tables(matrix: TaskMatrix) -> tuple[Table, ...]:
    """Every table of a report of many tasks."""
    return pairs_table(matrix), tasks_table(matrix), heads_over_pairs_table(matrix), matrix_table(matrix)


def _count_columns(matrix: TaskMatrix) -> list[tuple[str, str, int]]:
    """Name of the column, kind and sign of all heads that are counted, adam first."""
    kinds = sorted(
        kinds_of(matrix), key=lambda kind: (kind == SCORES, -OPTIMIZERS.index(kind) if kind != SCORES else 0)
    )
    return [
        (word.replace(" ", "_") + ("" if kind == SCORES else f"_{kind}"), kind, sign)
        for kind in kinds
        for word, sign in zip(words_of(matrix, kind), (1, -1), strict=True)
    ]


def _optimizers(matrix: TaskMatrix) -> tuple[str, ...]:
    return OPTIMIZERS[::-1] if all(record.totals for record in matrix.records) else ()


def pairs_table(matrix: TaskMatrix) -> Table:
    """One row for each pair, those with most heads in conflict first, then those whose change is the surest."""
    counted, optimizers = _count_columns(matrix), _optimizers(matrix)
    cosines = {optimizer: matrix.cosines(optimizer) for optimizer in optimizers}
    averages = {name: matrix.average(name) for name in ("mean", "overlap")}
    columns = ["task_a", "task_b", "samples_a", "samples_b", *(name for name, _, _ in counted)]
    columns += [f"{name}_{optimizer}" for optimizer in optimizers for name in (*_TOTALS, *_RELATIVE, "cosine")]
    columns += ["mean_ab", "mean_ba", "overlap"]
    rows = []
    for record in _by_conflicts(matrix.records):
        a, b = (matrix.tasks.index(task) for task in record.tasks)
        row: list[Cell] = [*record.tasks, *record.num_samples, *(record.count(kind, sign) for _, kind, sign in counted)]
        for optimizer in optimizers:
            row += [*_of_total(record, optimizer), _known(float(cosines[optimizer][a, b]))]
        row += [
            _known(float(averages[name][at])) for name, at in (("mean", (a, b)), ("mean", (b, a)), ("overlap", (a, b)))
        ]
        rows.append(tuple(row))
    return Table("pairs", tuple(columns), tuple(rows))


def _by_conflicts(records: Iterable[PairRecord]) -> list[PairRecord]:
    def sureness(record: PairRecord) -> tuple[int, float]:
        return -record.count(BY, 1), record.totals[BY].total.p_value if record.totals else 1.0

    return sorted(records, key=sureness)


def _scores_at(a: int, b: int) -> Iterator[tuple[str, tuple[int, int]]]:
    yield "mean", (a, b)
    yield "mean", (b, a)
    yield "overlap", (a, b)


def _of_total(record: PairRecord, optimizer: str) -> Iterator[Cell]:
    of = record.totals[optimizer]
    total = of.total
    for value in (total.change, total.standard_error, *total.interval, total.p_value, of.q_value):
        yield _known(value)
    yield record.verdict(optimizer)
    yield record.direction(optimizer)
    for task in (0, 1):
        yield _known(of.steps[task])
        yield from map(_known, of.relative(task))


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def tasks_table(matrix: TaskMatrix) -> Table:
    """One row for each task, like tasks together: pairs by what they do, heads over all its pairs."""
    counted = _count_columns(matrix)
    columns = ("task", "samples", "mean_loss", "pairs_that_hurt", "pairs_that_help", "pairs_not_known")
    rows: list[tuple[Cell, ...]] = [
        (
            *(row.task, row.num_samples, _known(row.loss), *row.pairs),
            *(row.heads[kind][0 if sign > 0 else 1] for _, kind, sign in counted),
        )
        for row in task_rows(matrix)
    ]
    return Table("tasks", (*columns, *(name for name, _, _ in counted)), tuple(rows))


def heads_over_pairs_table(matrix: TaskMatrix) -> Table:
    """One row for each head, those in conflict in most pairs first: in how many pairs it shows what."""
    counted = _count_columns(matrix)
    rows: list[tuple[Cell, ...]] = [
        (one.block, one.layer, one.head, *(one.counts[kind][0 if sign > 0 else 1] for _, kind, sign in counted))
        for one in heads_over_pairs(matrix)
    ]
    return Table("heads_over_pairs", ("block", "layer", "head", *(name for name, _, _ in counted)), tuple(rows))


def matrix_table(matrix: TaskMatrix) -> Table:
    """One row for each two tasks in order, a task with itself included, of all heads and of each block."""
    known = [name for name in MATRIX_KEYS if all(name in of for of in matrix.values.values())]
    rows: list[tuple[Cell, ...]] = []
    for block in (None, *matrix.blocks):
        arrays = [
            matrix.total(name, block) if name.startswith("change") else matrix.average(name, block) for name in known
        ]
        for row, column in np.ndindex(len(matrix.tasks), len(matrix.tasks)):
            cells = [_known(float(array[row, column])) for array in arrays]
            rows.append((matrix.tasks[row], matrix.tasks[column], block or "all", *cells))
    return Table("matrix", ("task", "task_right", "block", *known), tuple(rows))
