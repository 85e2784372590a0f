"""Tests of more than two tasks: which of them are corrected together.

Within a pair (``family: pair``) each block's heads are a family, as in a run of two tasks: among what a pair's tests
find about a share of ``fdr_alpha`` is false, whatever other pairs there are. Over all pairs (``family: all``) a block's
heads of all pairs are one family: Benjamini-Hochberg over all of their p-values, and the family-wise p of each pair
times the number of pairs (Bonferroni), which holds however pairs that share samples depend on each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import numpy as np

from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.matrix_data import Pair

from .head_tests import Floats, Statistic, q_values
from .significance import StatisticsResult, significant_heads

Arrays = Mapping[str, Floats]


def over_all_pairs(heatmaps: Mapping[Pair, Heatmap], *, with_effects: bool = True) -> dict[Pair, Heatmap]:
    """The tested heatmaps of all pairs, corrected over all of them.

    Args:
        heatmaps: Tested, corrected within each pair.
        with_effects: Whether effects are corrected too.
    """
    found = dict(heatmaps)
    for block in next(iter(heatmaps.values())).blocks:
        for name in get_args(Statistic):
            tested = {pair: hm for pair, hm in found.items() if block in (hm.statistics or {}).get(name, {})}
            corrected = _corrected([(hm.statistics or {})[name][block] for hm in tested.values()], len(heatmaps))
            for (pair, heatmap), arrays in zip(tested.items(), corrected, strict=True):
                found[pair] = _with_tests(heatmap, block, name, arrays)
        if with_effects:
            found = _with_effects(found, block)
    return found


def _corrected(tests: list[Arrays], num_pairs: int) -> list[dict[str, Floats]]:
    """The tests of one block's heads of all pairs, corrected together."""
    if not tests:
        return []
    p_values = np.stack([arrays["p_value"] for arrays in tests])
    known = {"q_value": q_values(p_values, "bh")}
    if "q_value_by" in tests[0]:
        known["q_value_by"] = q_values(p_values, "by")
    known["p_max"] = np.minimum(np.stack([arrays["p_max"] for arrays in tests]) * num_pairs, 1.0)
    return [{**arrays, **{key: values[n] for key, values in known.items()}} for n, arrays in enumerate(tests)]


def _with_tests(heatmap: Heatmap, block: str, name: Statistic, arrays: Arrays) -> Heatmap:
    """The heatmap with other tests of one block by one statistic."""
    result: dict[str, Any] = StatisticsResult(heatmap.statistics or {})
    result[name] = {**result[name], block: dict(arrays)}
    settings = result["settings"]
    if settings["statistic"] == name:
        records = significant_heads(heatmap, block, name, arrays, settings["fdr_alpha"])
        result["fdr_corrected"] = {**result["fdr_corrected"], block: records}
    return replace(heatmap, statistics=result)


def _with_effects(heatmaps: Mapping[Pair, Heatmap], block: str) -> dict[Pair, Heatmap]:
    found = {pair: heatmap for pair, heatmap in heatmaps.items() if heatmap.has_tested_effects}
    for optimizer in ("sgd", "adam"):
        tests = [(heatmap.effects or {})[block][optimizer] for heatmap in found.values()]
        for pair, arrays in zip(list(found), _corrected(tests, len(heatmaps)), strict=True):
            effects = dict(found[pair].effects or {})
            effects[block] = {**effects[block], optimizer: arrays}
            found[pair] = replace(found[pair], effects=effects)
    return {**heatmaps, **found}


def note_on_families(num_pairs: int, family: str) -> str:
    """What a reader of all pairs' q-values must know."""
    if family == "all":
        return (
            f"q-values are over the heads of a block of all {num_pairs} pairs together (statistics.family: all); "
            f"family-wise p-values are a pair's times {num_pairs}."
        )
    return (
        f"q-values are within each of {num_pairs} pairs of tasks: whoever looks for the most striking of all pairs "
        "corrects over all of them, by statistics.family: all."
    )
