"""What a finished run prints: the answer, the strongest heads, or of many tasks the pairs, and where everything is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

import numpy as np
from tabulate import tabulate

from qkov_dist.results.advice import Action
from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.task_matrix import TaskMatrix

from .findings import found, name_of, null_of, significance
from .matrix_findings import families, said_of_pairs
from .matrix_tables import pairs_table, tasks_table
from .table import Cell, Table

NUM_SHOWN, NUM_ROWS = 5, 12
WIDTH = 110
PAIR_COLUMNS = {"a": "task_a", "b": "task_b", "contested": "contested", "apart": "apart"}
EFFECT_PAIRS = {
    "conflict": "conflict_adam",
    "synergy": "synergy_adam",
    "change": "change_adam",
    "low": "ci_low_adam",
    "high": "ci_high_adam",
    "q": "q_value_adam",
    "direction": "direction_adam",
}
SCORE_PAIRS = {"mean a on b": "mean_ab", "mean b on a": "mean_ba", "overlap": "overlap"}
TASK_COLUMNS = {"task": "task", "samples": "samples", "loss": "mean_loss"}
EFFECT_TASKS = {
    "hurt": "pairs_that_hurt",
    "help": "pairs_that_help",
    "not known": "pairs_not_known",
    "conflict": "conflict_adam",
    "synergy": "synergy_adam",
}


def print_summary(heatmap: Heatmap, folder: str | Path, file: str = "heatmap.h5") -> None:
    """Print the answer, each block's strongest heads and the path of the file, to stdout."""
    print_verdict(heatmap)
    score = heatmap.attributes["score"]
    rows = [row for block in heatmap.blocks for row in _strongest(heatmap, block)]
    headers = ["block", "layer", "head", f"mean {score}"]
    if heatmap.tests:
        headers += [heatmap.deciding, *(["its null"] if _knows_null(heatmap) else []), "q", "finding"]
    print(f"\n{heatmap.task_a} x {heatmap.task_b}: strongest heads of each block (K, V: kv heads)\n")
    print(tabulate(rows, headers=headers, floatfmt=".4g"))
    print(f"\nsignificant: {significance(heatmap)}")
    for note in heatmap.attributes.get("notes", []):
        print(f"note: {note}")
    print(f"\nscores, samples and settings: {Path(folder) / file}")
    print("open it with qkov_dist.load_heatmap, xarray (engine='h5netcdf'), h5web or HDFView")


def print_verdict(heatmap: Heatmap) -> None:
    """Print the answer in words, and what to do next; nothing where no effects are known."""
    verdict = heatmap.verdict
    if verdict is None:
        return
    _print_answer(verdict.sentences, verdict.details, verdict.actions)


def print_matrix_summary(matrix: TaskMatrix, folder: str | Path, file: str = "heatmap.h5") -> None:
    """Print the answer, pairs with most heads in conflict first, tasks, and the path of the file, to stdout."""
    if verdict := matrix.verdict:
        _print_answer(verdict.sentences, verdict.details, verdict.actions)
    pairs, tasks = (EFFECT_PAIRS, EFFECT_TASKS) if verdict else ({}, {})
    scores = {} if verdict else SCORE_PAIRS
    _print_table(matrix, pairs_table(matrix), {**PAIR_COLUMNS, **pairs, **scores})
    _print_table(matrix, tasks_table(matrix), {**TASK_COLUMNS, **tasks})
    if not verdict:
        print()
        for text in families(matrix):
            print(filled(text))
    for kind, text in said_of_pairs(matrix):
        if kind == "note":
            print(f"note: {text}")
    print(f"\nscores, samples and settings: {Path(folder) / file}")
    print(f"open it with qkov_dist.load_matrix, a pair of it with load_heatmap(..., pair={matrix.pairs[0]!r})")


def _print_table(matrix: TaskMatrix, table: Table, columns: Mapping[str, str]) -> None:
    """The first rows of a table, under other names of columns; those that it does not have are left out."""
    known = {name: table.columns.index(column) for name, column in columns.items() if column in table.columns}
    rows = [[_cell(row[place]) for place in known.values()] for row in table.rows[:NUM_ROWS]]
    print(f"\n{matrix.title}: {table.name}\n")
    print(tabulate(rows, headers=list(known), floatfmt=".3g"))
    if more := len(table.rows) - len(rows):
        print(f"... and {more:,} more")


def _cell(cell: Cell) -> Cell:
    return "-" if cell is None else cell


def _print_answer(sentences: Sequence[str], details: Sequence[str], actions: Sequence[Action]) -> None:
    print()
    for text in sentences:
        print(filled(text))
    print()
    for detail in details:
        print(filled(f"- {detail}", indent="  "))
    print("\nWhat to do next:")
    for place, action in enumerate(actions, 1):
        print(filled(f"{place}. {action.why}", indent="   "))
        if action.command:
            print(f"     {action.command}")


def filled(text: str, indent: str = "") -> str:
    """Text in lines; names of heads stay whole."""
    whole = re.sub(r"\b([QKVO]) (?=\d)", "\\1\N{NO-BREAK SPACE}", text)
    return fill(whole, WIDTH, subsequent_indent=indent).replace("\N{NO-BREAK SPACE}", " ")


def print_page(path: Path) -> None:
    """Say where the report is, to stdout."""
    print(f"report: {path} (opens in any browser)")


def _strongest(heatmap: Heatmap, block: str) -> list[list[object]]:
    mean = heatmap.mean[block]
    order = np.argsort(np.where(np.isnan(mean), -np.inf, np.abs(mean)), axis=None, kind="stable")[::-1]
    codes = found(heatmap, block) if heatmap.tests else None
    rows: list[list[object]] = []
    for flat in order[: min(NUM_SHOWN, int(heatmap.present[block].sum()))]:
        at = np.unravel_index(flat, mean.shape)
        row: list[object] = [block, heatmap.layers[at[0]], heatmap.natives(block)[at[1]], float(mean[at])]
        if codes is not None:
            tests = heatmap.tests[block]
            row.append(float(tests["statistic"][at]))
            if _knows_null(heatmap):
                null = null_of(tests, int(at[0]), int(at[1]))
                row.append("-" if null is None else "{:.3g} [{:.3g}, {:.3g}]".format(*null))
            row += [float(tests["q_value"][at]), name_of(heatmap, int(codes[at])) or "-"]
        rows.append(row)
    return rows


def _knows_null(heatmap: Heatmap) -> bool:
    """Whether the file says where heads lie under exchanged labels; files of before do not."""
    return any("null_mean" in heatmap.tests[block] for block in heatmap.blocks)
