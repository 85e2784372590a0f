"""The report's tables: views and means of what a heatmap holds.

``heads`` has a row for each present native head, ``blocks`` and ``layers`` sum these up, ``conflicts`` lists the
strongest sample pairs, and ``shared``, where there is something to say, the parameters that belong to no head.

A table as text: CSV for spreadsheets, Markdown for papers.

A spreadsheet runs text that begins like a formula, some also behind whitespace or with full-width signs: such cells get
an apostrophe in front.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qkov_dist.results.block_view import HEAD_DIM, Floats, Ints
from qkov_dist.results.heatmap import Heatmap

from .findings import counts, found, name_of, sides, tally

NUM_CONFLICTS = 50
STATISTICS = ("overlap", "cross_mean")
TEST_COLUMNS = (
    "statistic",
    "ci_low",
    "ci_high",
    "null_mean",
    "null_low",
    "null_high",
    "effect_size",
    "effect_low",
    "effect_high",
    "direction",
    "p_value",
    "p_greater",
    "p_less",
    "q_value",
    "q_value_by",
    "p_max",
)
BESIDE = ("ci_low", "ci_high", "null_mean", "null_low", "null_high")  # what stands beside a block's extreme values
EXTREMES = {"largest": np.nanargmax, "lowest": np.nanargmin}


def all_tables(heatmap: Heatmap) -> tuple[Table, ...]:
    """Every table of a report."""
    tables = heads_table(heatmap), blocks_table(heatmap), layers_table(heatmap), conflicts_table(heatmap)
    return (*tables, shared_table(heatmap)) if heatmap.shared else tables


def heads_table(heatmap: Heatmap) -> Table:
    """One row for each present native head, the strongest of a block first.

    ``finding`` is what a significant head shows by the statistic that decides; a ``direction`` is the side of the null
    on which any head lies.
    """
    names = tuple(name for name in STATISTICS if name in (heatmap.statistics or {}))
    columns = ["block", "layer", "head", "kv_head", "score_mean", "ridge_share", "share_a"]
    columns += ["finding"] if heatmap.tests else []
    columns += [key if key == name else f"{name}_{key}" for name in names for key in (name, *TEST_COLUMNS[1:])]
    rows = [row for block in heatmap.blocks for row in _head_rows(heatmap, block, names)]
    return Table("heads", tuple(columns), tuple(rows))


def _head_rows(heatmap: Heatmap, block: str, names: Iterable[str]) -> Iterator[tuple[Cell, ...]]:
    fisher = heatmap.fisher[block]
    tests = {name: test_arrays(heatmap, name, block) for name in names}
    codes = found(heatmap, block) if heatmap.tests else None
    side = {name: sides(arrays) for name, arrays in tests.items()}
    for layer, head in by_strength(heatmap, block):
        row: list[Cell] = [block, heatmap.layers[layer], heatmap.natives(block)[head]]
        row += [_kv_head(heatmap, block, layer, head), float(heatmap.mean[block][layer, head])]
        row += [_number(fisher.get(key), layer, head) for key in ("ridge_share", "share_a")]
        row += [] if codes is None else [name_of(heatmap, int(codes[layer, head]))]
        for name, arrays in tests.items():
            direction = {1: "above", -1: "below"}.get(int(side[name][layer, head]))
            row += [direction if key == "direction" else _number(arrays.get(key), layer, head) for key in TEST_COLUMNS]
        yield tuple(row)


def blocks_table(heatmap: Heatmap) -> Table:
    """One row for each block: how many heads, whose Fisher it is, the extremes, and what the deciding test says."""
    columns = ["block", "heads", "layers", "share_a_median", "share_a_lowest", "share_a_highest", "score_mean"]
    columns += ["score_largest", "score_largest_layer", "score_largest_head"]
    if heatmap.tests:
        name, parts = heatmap.deciding, ("", "_layer", "_head", *(f"_{key}" for key in BESIDE))
        columns += [f"{name}_median", *(f"{name}_{which}{part}" for which in EXTREMES for part in parts)]
        columns += ["q_smallest", "significant", *(finding.name for finding in counts(heatmap))]
    return Table("blocks", tuple(columns), tuple(_block_row(heatmap, block) for block in heatmap.blocks))


def _block_row(heatmap: Heatmap, block: str) -> tuple[Cell, ...]:
    present, mean = heatmap.present[block], heatmap.mean[block]
    row: list[Cell] = [block, int(present.sum()), int(present.any(axis=1).sum())]
    share = heatmap.fisher[block].get("share_a", np.full_like(mean, np.nan))
    row += [_over(reduce, share) for reduce in (np.nanmedian, np.nanmin, np.nanmax)]
    row += [_over(np.nanmean, mean), *_extreme(heatmap, block, "largest", mean)]
    if heatmap.tests:
        tests = heatmap.tests[block]
        row.append(_over(np.nanmedian, tests["statistic"]))
        for which in EXTREMES:
            row += _extreme(heatmap, block, which, tests["statistic"], *map(tests.get, BESIDE))
        row += [_over(np.nanmin, tests["q_value"]), *_significant(heatmap, found(heatmap, block))]
    return tuple(row)


def _extreme(heatmap: Heatmap, block: str, which: str, values: Floats, *others: Floats | None) -> list[Cell]:
    """The largest or lowest value, its layer and head, and other numbers of that head."""
    if np.isnan(values).all():
        return [None] * (3 + len(others))
    layer, head = map(int, np.unravel_index(int(EXTREMES[which](values)), values.shape))
    place: list[Cell] = [float(values[layer, head]), heatmap.layers[layer], heatmap.natives(block)[head]]
    return place + [_number(other, layer, head) for other in others]


def _significant(heatmap: Heatmap, codes: Ints) -> list[Cell]:
    """How many of some heads are significant, then how many show each finding that any head shows."""
    numbers = tally(heatmap, codes)
    return [sum(numbers.values()), *(numbers[finding] for finding in counts(heatmap))]


def layers_table(heatmap: Heatmap) -> Table:
    """The layer profile: mean over a layer's present native heads, of the mean score and the deciding statistic."""
    columns: tuple[str, ...] = ("block", "layer", "heads", "score_mean", "score_largest")
    if heatmap.tests:
        columns += (f"{heatmap.deciding}_mean", f"{heatmap.deciding}_largest", "significant")
        columns += tuple(finding.name for finding in counts(heatmap))
    rows = [
        _layer_row(heatmap, block, place)
        for block in heatmap.blocks
        for place in range(len(heatmap.layers))
        if heatmap.present[block][place].any()
    ]
    return Table("layers", columns, tuple(rows))


def _layer_row(heatmap: Heatmap, block: str, place: int) -> tuple[Cell, ...]:
    mean = heatmap.mean[block][place]
    row: list[Cell] = [block, heatmap.layers[place], int(heatmap.present[block][place].sum())]
    row += [_over(np.nanmean, mean), _over(np.nanmax, mean)]
    if heatmap.tests:
        statistic = heatmap.tests[block]["statistic"][place]
        row += [_over(np.nanmean, statistic), _over(np.nanmax, statistic)]
        row += _significant(heatmap, found(heatmap, block)[place])
    return tuple(row)


def shared_table(heatmap: Heatmap) -> Table:
    """Mean scores, by layer, of parameters that belong to no head: O's bias."""
    rows = tuple(
        (name, layer, float(mean))
        for name, arrays in heatmap.shared.items()
        for layer, mean in zip(heatmap.layers, arrays["mean"], strict=True)
        if np.isfinite(mean)
    )
    return Table("shared", ("parameter", "layer", "score_mean"), rows)


def conflicts_table(heatmap: Heatmap) -> Table:
    """The strongest sample pairs of each block with both texts; empty where scores of pairs were not kept."""
    columns = ["block", "layer", "head", "score", "q_value", "finding"]
    columns += ["id_a", "tokens_a", "id_b", "tokens_b", "text_a", "text_b"]
    return Table("conflicts", tuple(columns), tuple(_conflict_rows(heatmap)))


def _conflict_rows(heatmap: Heatmap) -> Iterator[tuple[Cell, ...]]:
    a, b = heatmap.samples_a, heatmap.samples_b
    codes = {block: found(heatmap, block) for block in heatmap.blocks} if heatmap.tests else {}
    for block, record in top_conflicts(heatmap):
        i, j = record["sample_i"], record["sample_j"]
        at = heatmap.layers.index(record["layer"]), heatmap.natives(block).index(record["head"])
        yield (
            block,
            record["layer"],
            record["head"],
            record["score"],
            _number(test_arrays(heatmap, heatmap.deciding, block).get("q_value"), *at),
            name_of(heatmap, int(codes[block][at])) if codes else None,
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
    return [(block, record) for block in heatmap.blocks for record in heatmap[block].top_conflicts(NUM_CONFLICTS)]


def test_arrays(heatmap: Heatmap, name: str, block: str) -> Mapping[str, Floats]:
    """Name -> [layer, native head] of one statistic's tests of one block; empty where there are none."""
    arrays: Mapping[str, Floats] = (heatmap.statistics or {}).get(name, {}).get(block, {})
    return arrays


def by_strength(heatmap: Heatmap, block: str) -> list[tuple[int, int]]:
    """Places (layer, head) of a block's present heads: largest absolute mean score first."""
    mean = heatmap.mean[block]
    order = np.argsort(np.where(heatmap.present[block], -np.abs(mean), np.inf), axis=None, kind="stable")
    kept = order[: int(heatmap.present[block].sum())]
    return [(int(layer), int(head)) for layer, head in zip(*np.unravel_index(kept, mean.shape), strict=True)]


def _over(reduce: Any, values: Floats) -> Cell:
    """A reduction over what is there; None where nothing is."""
    return None if np.isnan(values).all() else float(reduce(values))


def _number(values: Floats | None, layer: int, head: int) -> Cell:
    return None if values is None or np.isnan(values[layer, head]) else float(values[layer, head])


def _kv_head(heatmap: Heatmap, block: str, layer: int, head: int) -> int:
    number = heatmap.natives(block)[head]
    return number // int(heatmap.groups[layer]) if HEAD_DIM[block] == "head" else number


Cell = str | int | float | None


MOST_MARKDOWN_ROWS = 400
MOST_MARKDOWN_TEXT = 90


_FORMULA = re.compile(r"^[\s\0\u200b\ufeff]*[=+\-@\t\r\uff1d\uff0b\uff0d\uff20]")
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
