"""Numbers and words of a matrix of tasks: heads by pair, by task and by place, and how sure all of it is.

    kind            1 (above)                    -1 (below)
    adam, sgd       conflict                     synergy
    scores          contested, or above null     apart, or below null

A head's q is that of its pair, within a block; what chance alone gives over all pairs is said wherever heads are
counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qkov_dist.results.matrix_pairs import KINDS, SCORES, PairRecord, chance, heads_in, of_task
from qkov_dist.results.matrix_verdict import in_words
from qkov_dist.results.task_matrix import TaskMatrix
from qkov_dist.results.verdict_facts import BESIDE
from qkov_dist.scoring.influence_records import OPTIMIZERS

SIGNS = (1, -1)
COLUMNS = {"conflict": 1, "synergy": -1}


def kinds_of(matrix: TaskMatrix) -> tuple[str, ...]:
    """Of ``KINDS`` those that every pair has."""
    return tuple(kind for kind in KINDS if all(kind in record.codes for record in matrix.records))


def words_of(matrix: TaskMatrix, kind: str) -> tuple[str, str]:
    """What heads of either sign are called: above, below."""
    if kind != SCORES:
        return "conflict", "synergy"
    by_overlap = all(record.statistic == "overlap" for record in matrix.records)
    return ("contested", "apart") if by_overlap else ("above null", "below null")


@dataclass(frozen=True)
class HeadOverPairs:
    """One head, and what it shows over all pairs: kind -> how many pairs have it in either sign."""

    block: str
    layer: int
    head: int
    counts: dict[str, tuple[int, int]]


def heads_over_pairs(matrix: TaskMatrix) -> tuple[HeadOverPairs, ...]:
    """Every present head, those in conflict in most pairs first."""
    found = []
    kinds = kinds_of(matrix)
    for block in matrix.blocks:
        counts = {kind: [heads_in(matrix.records, kind, sign, block) for sign in SIGNS] for kind in kinds}
        for layer, head in np.argwhere(matrix.present[block]):
            of_head = {
                kind: (int(above[layer, head]), int(below[layer, head])) for kind, (above, below) in counts.items()
            }
            found.append(HeadOverPairs(block, matrix.layers[layer], matrix.natives(block)[head], of_head))
    first = next((kind for kind in OPTIMIZERS[::-1] if kind in kinds), None)
    return tuple(sorted(found, key=lambda one: -one.counts[first][0]) if first else found)


def pair_matrix(matrix: TaskMatrix, kind: str, sign: int, block: str | None = None) -> npt.NDArray[np.float64]:
    """How many heads of each pair have a sign, [task, task], symmetric; NaN on the diagonal: no task is a pair."""
    num = len(matrix.tasks)
    counts = np.full((num, num), np.nan)
    for record in matrix.records:
        a, b = (matrix.tasks.index(task) for task in record.tasks)
        counts[a, b] = counts[b, a] = record.count(kind, sign, block)
    return counts


def relative_change(matrix: TaskMatrix, optimizer: str) -> npt.NDArray[np.float64]:
    """[harmed task, stepped task]: a practical step's change of the harmed's loss, as a part of it; else NaN."""
    num = len(matrix.tasks)
    change = np.full((num, num), np.nan)
    for record in matrix.records:
        a, b = (matrix.tasks.index(task) for task in record.tasks)
        if total := record.totals.get(optimizer):
            change[a, b], change[b, a] = total.relative(0)[0], total.relative(1)[0]
    return change


def families(matrix: TaskMatrix) -> Iterator[str]:
    """What tests of heads are corrected over, and what chance alone gives over all pairs."""
    level = matrix.records[0].level
    for kind in (kind for kind in kinds_of(matrix) if kind != BESIDE):
        above, below = words_of(matrix, kind)
        yield in_words(chance(matrix.records, kind), level, f"{above} or {below}", has_totals=kind != SCORES)


def said_of_pairs(matrix: TaskMatrix) -> list[tuple[str, str]]:
    """Kinds and texts of all warnings and notes: those of the run, then those of pairs, each once with its pairs."""
    of_run = [
        (kind, str(text))
        for kind, key in (("warning", "warnings"), ("note", "notes"))
        for text in matrix.attributes.get(key, ())
    ]
    of_pairs: dict[tuple[str, str], list[PairRecord]] = {}
    for record in matrix.records:
        for said in record.said:
            if said not in of_run:
                of_pairs.setdefault(said, []).append(record)
    return of_run + [
        (kind, f"{_named(chosen, len(matrix.records))}: {text}") for (kind, text), chosen in of_pairs.items()
    ]


def _named(records: Sequence[PairRecord], num_pairs: int, most: int = 4) -> str:
    if len(records) == num_pairs:
        return "All pairs"
    names = [" × ".join(record.tasks) for record in records[:most]]
    more = len(records) - most
    return ", ".join(names) + (f" and {more:,} more pairs" if more > 0 else "")


@dataclass(frozen=True)
class TaskRow:
    """One task over all its pairs: pairs that hurt, help and are open over all pairs; heads by kind and sign."""

    task: str
    num_samples: int
    loss: float
    pairs: tuple[int, int, int]
    heads: dict[str, tuple[int, int]]


def task_rows(matrix: TaskMatrix) -> tuple[TaskRow, ...]:
    """Every task, in the clustered order."""
    rows = []
    for place in matrix.order:
        task, samples = matrix.tasks[place], matrix.samples[place]
        records = of_task(matrix.records, task)
        verdicts = [record.verdict() for record in records]
        pairs = verdicts.count("harm"), verdicts.count("help"), verdicts.count("unknown")
        heads = {
            kind: (sum(r.count(kind, 1) for r in records), sum(r.count(kind, -1) for r in records))
            for kind in kinds_of(matrix)
        }
        loss = float(np.mean(samples.losses)) if len(samples) else float("nan")
        rows.append(TaskRow(task, len(samples), loss, pairs, heads))
    return tuple(rows)
