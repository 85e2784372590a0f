"""The report's tables: views and means of what a heatmap holds, as CSV for spreadsheets and Markdown for papers.

``heads`` has a row for each present native head, ``blocks`` and ``layers`` sum these up, ``conflicts`` lists the
strongest sample pairs. A spreadsheet runs text that begins like a formula: such cells get an apostrophe in front.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .results import Heatmap
from .views import HEAD_DIM, Floats

Cell = str | int | float | None

NUM_CONFLICTS = 50
MOST_MARKDOWN_ROWS = 400
MOST_MARKDOWN_TEXT = 90
STATISTICS = ("overlap", "cross_mean")
TEST_COLUMNS = ("statistic", "ci_low", "ci_high", "effect_size", "p_value", "q_value", "q_value_by", "p_max")

_FORMULA = re.compile(r"^\s*[=+\-@\t\r]")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#&~$])")


@dataclass(frozen=True)
class Table:
    """Named columns and rows of cells; None is an empty cell."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def to_csv(self) -> str:
        """Comma-separated, numbers in full precision, text that a spreadsheet would run with an apostrophe."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)  # else a lone \r ends a row
        writer.writerow(map(_csv_cell, self.columns))
        writer.writerows([_csv_cell(cell) for cell in row] for row in self.rows)
        return out.getvalue()

    def to_markdown(self) -> str:
        """A Markdown table: numbers with four digits, long text cut, nothing left to be read as markup."""
        rows = [[_markdown_cell(cell) for cell in row] for row in self.rows[:MOST_MARKDOWN_ROWS]]
        lines = [[_markdown_cell(name) for name in self.columns], ["---"] * len(self.columns), *rows]
        text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        if more := len(self.rows) - len(rows):
            text += f"\n{more} more rows are in {self.name}.csv.\n"
        return text


def all_tables(heatmap: Heatmap) -> tuple[Table, ...]:
    """Every table of a report."""
    return heads_table(heatmap), blocks_table(heatmap), layers_table(heatmap), conflicts_table(heatmap)


def heads_table(heatmap: Heatmap) -> Table:
    """One row for each present native head, the strongest of a block first."""
    names = tuple(name for name in STATISTICS if name in (heatmap.statistics or {}))
    tests = [(name, key) for name in names for key in TEST_COLUMNS]
    columns = ("block", "layer", "head", "kv_head", "score_mean", "ridge_share")
    titles = tuple(name if key == "statistic" else f"{name}_{key}" for name, key in tests)
    rows = tuple(
        (
            block,
            heatmap.layers[layer],
            heatmap.natives(block)[head],
            _kv_head(heatmap, block, layer, head),
            float(heatmap.mean[block][layer, head]),
            _number(heatmap.fisher[block].get("ridge_share"), layer, head),
            *(_number(test_arrays(heatmap, name, block).get(key), layer, head) for name, key in tests),
        )
        for block in heatmap.blocks
        for layer, head in by_strength(heatmap, block)
    )
    return Table("heads", columns + titles, rows)


def blocks_table(heatmap: Heatmap) -> Table:
    """One row for each block: how many heads, the strongest by mean score, and what the deciding statistic says."""
    rows = tuple(_block_row(heatmap, block) for block in heatmap.blocks)
    columns = ["block", "heads", "layers", "score_mean", "score_largest", "score_layer", "score_head"]
    if heatmap.tests:
        parts = ("median", "largest", "layer", "head", "ci_low", "ci_high")
        columns += [*(f"{heatmap.deciding}_{part}" for part in parts), "q_smallest", "significant"]
    return Table("blocks", tuple(columns), rows)


def layers_table(heatmap: Heatmap) -> Table:
    """The layer profile: mean over a layer's present native heads, of the mean score and the deciding statistic."""
    columns: tuple[str, ...] = ("block", "layer", "heads", "score_mean", "score_largest")
    tested = bool(heatmap.tests)
    columns += (f"{heatmap.deciding}_mean", f"{heatmap.deciding}_largest", "significant") if tested else ()
    rows = []
    for block in heatmap.blocks:
        for place, layer in enumerate(heatmap.layers):
            there = heatmap.present[block][place]
            if not there.any():
                continue
            row: list[Cell] = [block, layer, int(there.sum()), *_mean_and_largest(heatmap.mean[block][place])]
            if tested:
                row += _mean_and_largest(heatmap.tests[block]["statistic"][place])
                row.append(int((heatmap.tests[block]["q_value"][place] <= alpha(heatmap)).sum()))
            rows.append(tuple(row))
    return Table("layers", columns, tuple(rows))


def conflicts_table(heatmap: Heatmap) -> Table:
    """The strongest sample pairs of each block with both texts; empty where scores of pairs were not kept."""
    columns = ("block", "layer", "head", "score", "q_value", "id_a", "tokens_a", "id_b", "tokens_b", "text_a", "text_b")
    return Table("conflicts", columns, tuple(_conflict_rows(heatmap)))


def _conflict_rows(heatmap: Heatmap) -> Iterator[tuple[Cell, ...]]:
    a, b = heatmap.samples_a, heatmap.samples_b
    for block, found in top_conflicts(heatmap):
        i, j = found["sample_i"], found["sample_j"]
        at = heatmap.layers.index(found["layer"]), heatmap.natives(block).index(found["head"])
        yield (
            block,
            found["layer"],
            found["head"],
            found["score"],
            _number(test_arrays(heatmap, heatmap.deciding, block).get("q_value"), *at),
            a.ids[i],
            int(a.num_tokens[i]),
            b.ids[j],
            int(b.num_tokens[j]),
            a.texts[i],
            b.texts[j],
        )


def top_conflicts(heatmap: Heatmap) -> list[tuple[str, dict[str, Any]]]:
    """Block and record of each block's strongest sample pairs."""
    if heatmap.cross is None:
        return []
    return [(block, found) for block in heatmap.blocks for found in heatmap[block].top_conflicts(NUM_CONFLICTS)]


def test_arrays(heatmap: Heatmap, name: str, block: str) -> Mapping[str, Floats]:
    """Name -> [layer, native head] of one statistic's tests of one block; empty where there are none."""
    found: Mapping[str, Floats] = (heatmap.statistics or {}).get(name, {}).get(block, {})
    return found


def alpha(heatmap: Heatmap) -> float:
    """At or below which q a head is significant."""
    return float((heatmap.statistics or {}).get("settings", {}).get("fdr_alpha", 0.05))


def by_strength(heatmap: Heatmap, block: str) -> list[tuple[int, int]]:
    """Places (layer, head) of a block's present heads: largest absolute mean score first."""
    mean = heatmap.mean[block]
    order = np.argsort(np.where(heatmap.present[block], -np.abs(mean), np.inf), axis=None, kind="stable")
    kept = order[: int(heatmap.present[block].sum())]
    return [(int(layer), int(head)) for layer, head in zip(*np.unravel_index(kept, mean.shape), strict=True)]


def _block_row(heatmap: Heatmap, block: str) -> tuple[Cell, ...]:
    present, mean = heatmap.present[block], heatmap.mean[block]
    row: list[Cell] = [block, int(present.sum()), int(present.any(axis=1).sum()), _nan(np.nanmean, mean)]
    row += _largest(heatmap, block, mean)
    if heatmap.tests:
        tests = heatmap.tests[block]
        row += [_nan(np.nanmedian, tests["statistic"]), *_largest(heatmap, block, tests["statistic"])]
        row += [_at_largest(tests.get(key), tests["statistic"]) for key in ("ci_low", "ci_high")]
        row += [_nan(np.nanmin, tests["q_value"]), int((tests["q_value"] <= alpha(heatmap)).sum())]
    return tuple(row)


def _largest(heatmap: Heatmap, block: str, values: Floats) -> tuple[Cell, Cell, Cell]:
    if np.isnan(values).all():
        return None, None, None
    layer, head = np.unravel_index(int(np.nanargmax(values)), values.shape)
    return float(values[layer, head]), heatmap.layers[layer], heatmap.natives(block)[head]


def _at_largest(values: Floats | None, by: Floats) -> Cell:
    return None if values is None or np.isnan(by).all() else float(values.flat[int(np.nanargmax(by))])


def _mean_and_largest(values: Floats) -> tuple[Cell, Cell]:
    return _nan(np.nanmean, values), _nan(np.nanmax, values)


def _nan(reduce: Any, values: Floats) -> Cell:
    """A reduction over what is there; None where nothing is."""
    return None if np.isnan(values).all() else float(reduce(values))


def _number(values: Floats | None, layer: int, head: int) -> Cell:
    return None if values is None or np.isnan(values[layer, head]) else float(values[layer, head])


def _kv_head(heatmap: Heatmap, block: str, layer: int, head: int) -> int:
    number = heatmap.natives(block)[head]
    return number // int(heatmap.groups[layer]) if HEAD_DIM[block] == "head" else number


def _csv_cell(cell: Cell) -> Cell:
    if isinstance(cell, str):
        clean = cell.encode("utf-8", "backslashreplace").decode()
        return f"'{clean}" if _FORMULA.match(clean) else clean
    return "" if cell is None else cell


def _markdown_cell(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:.4g}"
    text = " ".join(str(cell).encode("utf-8", "backslashreplace").decode().split())
    text = text if len(text) <= MOST_MARKDOWN_TEXT else f"{text[: MOST_MARKDOWN_TEXT - 1]}…"
    return _MARKDOWN.sub(r"\\\1", text)
