"""The report's tables: views and means of what a heatmap holds.

``heads`` has a row for each present native head, ``blocks`` and ``layers`` sum these up (effects add up, with errors of
their own), ``conflicts`` lists sample pairs that score beyond what their scales explain, and ``shared``, where there is
something to say, the parameters that belong to no head. Effects are named as in pandas: ``change_adam``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np

from qkov_dist.results.block_view import HEAD_DIM, Floats, Ints
from qkov_dist.results.effects import EFFECT_KEYS
from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.verdict_facts import CHANGE
from qkov_dist.scoring.influence_records import OPTIMIZERS

from .effect_findings import EFFECTS, effect_name, effects_of, found_by_change
from .findings import counts, found, name_of, sides, tally
from .table import Cell, Table

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
FINDING = ("finding",)
EFFECT_NAMES = tuple(finding.name for finding in EFFECTS)
TOTALS = ("change", "standard_error", "ci_low", "ci_high", "curvature_a", "curvature_b", "own_a", "own_b")
BESIDE = ("ci_low", "ci_high", "null_mean", "null_low", "null_high")  # what stands beside a block's extreme values
EXTREMES = {"largest": np.nanargmax, "lowest": np.nanargmin}


def all_tables(heatmap: Heatmap) -> tuple[Table, ...]:
    """Every table of a report."""
    tables = heads_table(heatmap), blocks_table(heatmap), layers_table(heatmap), conflicts_table(heatmap)
    return (*tables, shared_table(heatmap)) if heatmap.shared else tables


def heads_table(heatmap: Heatmap) -> Table:
    """One row for each present native head, the most harmful first; without effects the strongest of a block first.

    ``finding`` is what a significant head shows by the statistic that decides; a ``direction`` is the side of the null
    on which any head lies.
    """
    names = tuple(name for name in STATISTICS if name in (heatmap.statistics or {}))
    columns = ["block", "layer", "head", "kv_head", *effect_columns(heatmap, EFFECT_KEYS, FINDING)]
    columns += ["score_mean", "ridge_share", "share_a", *(["finding"] if heatmap.tests else [])]
    columns += [key if key == name else f"{name}_{key}" for name in names for key in (name, *TEST_COLUMNS[1:])]
    rows = [row for block in heatmap.blocks for row in _head_rows(heatmap, block, names)]
    if heatmap.has_tested_effects:
        place = columns.index(CHANGE)
        rows.sort(key=lambda row: -float(row[place] or 0.0))
    return Table("heads", tuple(columns), tuple(rows))


def effect_columns(heatmap: Heatmap, *names: Iterable[str]) -> list[str]:
    """Names of columns of effects, as pandas has them: ``change_adam``; none where the file knows no effects."""
    return [f"{name}_{optimizer}" for optimizer in _optimizers(heatmap) for name in chain(*names)]


def _optimizers(heatmap: Heatmap) -> tuple[str, ...]:
    return OPTIMIZERS[::-1] if heatmap.has_tested_effects else ()  # adam first: what training does


def _head_rows(heatmap: Heatmap, block: str, names: Iterable[str]) -> Iterator[tuple[Cell, ...]]:
    fisher = heatmap.fisher[block]
    tests = {name: test_arrays(heatmap, name, block) for name in names}
    codes = found(heatmap, block) if heatmap.tests else None
    side = {name: sides(arrays) for name, arrays in tests.items()}
    for layer, head in by_strength(heatmap, block):
        row: list[Cell] = [block, heatmap.layers[layer], heatmap.natives(block)[head]]
        row += [_kv_head(heatmap, block, layer, head), *_effects_of_head(heatmap, block, layer, head)]
        row += [float(heatmap.mean[block][layer, head])]
        row += [_number(fisher.get(key), layer, head) for key in ("ridge_share", "share_a")]
        row += [] if codes is None else [name_of(heatmap, int(codes[layer, head]))]
        for name, arrays in tests.items():
            direction = {1: "above", -1: "below"}.get(int(side[name][layer, head]))
            row += [direction if key == "direction" else _number(arrays.get(key), layer, head) for key in TEST_COLUMNS]
        yield tuple(row)


def _effects_of_head(heatmap: Heatmap, block: str, layer: int, head: int) -> Iterator[Cell]:
    for optimizer in _optimizers(heatmap):
        arrays = effects_of(heatmap, block, optimizer)
        yield from (_number(arrays[key], layer, head) for key in EFFECT_KEYS)
        yield effect_name(int(found_by_change(heatmap, block, optimizer)[layer, head]))


def _added_up(heatmap: Heatmap, block: str, place: int | None = None) -> Iterator[Cell]:
    """What the heads of a block, or of one layer of it, add up to, and how many show which effect."""
    layer = None if place is None else heatmap.layers[place]
    at = slice(None) if place is None else place
    for optimizer in _optimizers(heatmap):
        total = heatmap.total_effect(optimizer, block, layer)
        numbers = total.change, total.standard_error, *total.interval, *total.curvature.values(), *total.own.values()
        yield from (None if math.isnan(number) else number for number in numbers)
        codes = found_by_change(heatmap, block, optimizer)[at]
        yield from (int((codes == code).sum()) for code in range(1, 1 + len(EFFECTS)))


def blocks_table(heatmap: Heatmap) -> Table:
    """One row for each block: how many heads, whose Fisher it is, the extremes, and what the deciding test says."""
    columns = ["block", "heads", "layers", "share_a_median", "share_a_lowest", "share_a_highest", "score_mean"]
    columns += ["score_largest", "score_largest_layer", "score_largest_head"]
    columns[3:3] = effect_columns(heatmap, TOTALS, EFFECT_NAMES)
    if heatmap.tests:
        name, parts = heatmap.deciding, ("", "_layer", "_head", *(f"_{key}" for key in BESIDE))
        columns += [f"{name}_median", *(f"{name}_{which}{part}" for which in EXTREMES for part in parts)]
        columns += ["q_smallest", "significant", *(finding.name for finding in counts(heatmap))]
    return Table("blocks", tuple(columns), tuple(_block_row(heatmap, block) for block in heatmap.blocks))


def _block_row(heatmap: Heatmap, block: str) -> tuple[Cell, ...]:
    present, mean = heatmap.present[block], heatmap.mean[block]
    row: list[Cell] = [block, int(present.sum()), int(present.any(axis=1).sum()), *_added_up(heatmap, block)]
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
    columns: tuple[str, ...] = ("block", "layer", "heads", *effect_columns(heatmap, TOTALS, EFFECT_NAMES))
    columns += ("score_mean", "score_largest")
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
    row += _added_up(heatmap, block, place)
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
    """Sample pairs of each block beyond what their scales explain, with both texts; empty where pairs were not kept."""
    columns = ["block", "layer", "head", "score", "excess", "q_value", "finding"]
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
            record["excess"],
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
    """Block and record of each block's sample pairs that exceed most what the two samples' scales explain."""
    if heatmap.cross is None:
        return []
    return [(block, record) for block in heatmap.blocks for record in heatmap[block].top_excesses(NUM_CONFLICTS)]


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
