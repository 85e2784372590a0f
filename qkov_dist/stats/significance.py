"""From the tests of single heads to what a reader gets: corrections, the significant heads, and what to mind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np

from qkov_dist.errors import QkovError
from qkov_dist.results.heatmap import Heatmap

from .head_tests import Floats, LayerTests, Statistic, correct, join

_NEARLY_EXCHANGEABLE = (
    "Labels are nearly, not exactly, exchangeable: the Fisher weights samples by their place or task. "
    "fisher.estimator: mean with fisher.scope: pooled makes them exactly so."
)
# Rates are those of tests/studies/results/calibration.md.
_NOT_EXCHANGEABLE = (
    "With fisher.scope: {scope} labels are not exchangeable: the Fisher is that of one task. p-values of cross_mean "
    "are not valid: on halves of one task a level of 5% rejected {rejected}. Those of overlap are valid for "
    "alternative: greater alone, where they are conservative; two-sided rejected 10 to 20%. "
    "Use fisher.scope: pooled for tests."
)
_CROSS_MEAN_REJECTED = {"a": "18 to 42% (two-sided)", "b": "23 to 24% (greater)"}


class StatisticsResult(dict[str, Any]):
    """What was tested, how, and what is significant.

    ``fdr_corrected``: block -> records of its significant heads by q-value: dicts of block, layer, head (the model's
        numbers), statistic (its name), value, p_value, q_value, q_value_by, p_max, effect_size,
        direction ("above" or "below" the mean of its null distribution).
    ``cross_mean`` and, but for signed scores, ``overlap``: block -> name -> [layer, native head], NaN where absent;
        ``p_value`` is that of the alternative asked for, beside the one-sided ``p_greater`` and ``p_less``.
    ``undefined``: block -> (layer, head) of present heads without an overlap, as one of its means is zero.
    ``settings``: numbers, names and flags. ``notes``: sentences that a reader of the p-values should see.
    """

    def arrays(self) -> dict[str, dict[str, dict[str, Floats]]]:
        """Statistic -> block -> name -> [layer, native head] float64, as stored under ``/statistics``."""
        return {name: self[name] for name in get_args(Statistic) if name in self}


def _not_exactly_exchangeable(scope: str) -> str:
    rejected = _CROSS_MEAN_REJECTED.get(scope)
    return _NOT_EXCHANGEABLE.format(scope=scope, rejected=rejected) if rejected else _NEARLY_EXCHANGEABLE


def refuse_untested(heatmap: Heatmap, tests: LayerTests) -> None:
    """Raise for a present head without a test."""
    for block, present in heatmap.present.items():
        for place, head in np.argwhere(present):
            layer, number = heatmap.layers[place], heatmap.natives(block)[head]
            found = tests.layers.get(layer, {}).get(block)
            if found is None or number not in found.heads:
                raise QkovError(
                    f"statistics, layer {layer}, block {block}, head {number}",
                    expected="a test of every present head",
                    got="none",
                    remedy="Join the tests of all ranks first.",
                )


def corrected(heatmap: Heatmap, tests: LayerTests, block: str, name: Statistic) -> dict[str, Floats]:
    """One block's heads, corrected together: name -> [layer, native head], NaN where there is no head."""
    natives, rows, columns = heatmap.natives(block), list[int](), list[int]()
    parts = []
    for place, layer in enumerate(heatmap.layers):
        if found := tests.layers.get(layer, {}).get(block):
            parts.append(found.statistics[name])
            rows += [place] * len(found.heads)
            columns += map(natives.index, found.heads)
    arrays = {}
    for key, values in correct(join(parts), tests.max_z[name]).items():
        arrays[key] = np.full((len(heatmap.layers), len(natives)), np.nan)
        arrays[key][rows, columns] = values
    return arrays


def significant_heads(
    heatmap: Heatmap, block: str, name: Statistic, arrays: Mapping[str, Floats], alpha: float
) -> list[dict[str, Any]]:
    """Records of the heads of one block with q-value at most alpha: by q, then p, then distance from the null."""
    keys = ("p_value", "q_value", "q_value_by", "p_max", "effect_size")
    heads = heatmap.natives(block)
    records = [
        {"block": block, "layer": heatmap.layers[layer], "head": heads[head], "statistic": name}
        | {"value": float(arrays["statistic"][layer, head])}
        | {key: float(arrays[key][layer, head]) for key in keys}
        | {"direction": "above" if arrays["effect_size"][layer, head] > 0 else "below"}
        for layer, head in np.argwhere(arrays["q_value"] <= alpha)
    ]
    return sorted(records, key=lambda record: (record["q_value"], record["p_value"], -abs(record["effect_size"])))


def without_overlap(heatmap: Heatmap, block: str, result: StatisticsResult) -> list[tuple[int, int]]:
    """(layer, head) of one block's present heads that have no overlap."""
    if "overlap" not in result:
        return []
    without = np.isnan(result["overlap"][block]["statistic"]) & np.isfinite(result["cross_mean"][block]["statistic"])
    return [(heatmap.layers[layer], heatmap.natives(block)[head]) for layer, head in np.argwhere(without)]


def notes_on(
    result: StatisticsResult, scope: str, *, without_pairs: bool = False, knows_own_shares: bool = False
) -> tuple[str, ...]:
    """What a reader of the p-values should know.

    Args:
        result: The tests.
        scope: The Fisher's.
        without_pairs: Whether copies of a sample leave some group of some labelling without a pair.
        knows_own_shares: Whether intervals of overlap are freed of what samples' own shares of the Fisher do.
    """
    settings, notes = result["settings"], []
    if not settings["exactly_exchangeable"]:
        notes.append(_not_exactly_exchangeable(scope))
    blocks = result[settings["statistic"]].values()
    most = max((int(np.isfinite(arrays["p_value"]).sum()) for arrays in blocks), default=0)
    if most * settings["smallest_p"] > settings["fdr_alpha"]:
        needed, method = math.ceil(most / settings["fdr_alpha"]), settings["method"]
        remedy = "more samples" if method == "exhaustive" else f"statistics.permutations: {needed}"
        notes.append(
            f"With {settings['n_labellings']} labellings no p-value is below {settings['smallest_p']:.2g}, so that a "
            f"single head among {most} cannot pass the FDR correction on its own; that takes {remedy}."
        )
    if missing := sum(map(len, result["undefined"].values())):
        of_copies, of_zero = "some labelling makes a task of copies alone", "a mean score of theirs is zero"
        why = of_copies if without_pairs else of_zero
        notes.append(f"{missing} heads have no overlap, as {why}; they are not tested for it.")
    return (*notes, _what_intervals_know(result, knows_own_shares))


def _what_intervals_know(result: StatisticsResult, knows_own_shares: bool) -> str:
    """Figures: tests/studies/results/coverage.md, Fisher of the pool."""
    if "overlap" not in result:
        return "Intervals take the Fisher as given, which the samples themselves move."
    if knows_own_shares:
        return (
            "Intervals of overlap are freed of what samples of unequal gradient norms do to it, and of what each "
            "sample's own share of the Fisher does, and need not hold its value. Those of cross_mean and of effect "
            "sizes take the Fisher as given."
        )
    num = result["settings"]["n_a"] + result["settings"]["n_b"]
    return (
        f"Intervals take the Fisher as given. That of the {num} samples themselves moves overlap (by 0.01 to 0.07 with "
        "16 to 64 samples in a study), which narrow intervals do not show: the scores are of a run that did not form "
        "the sums by which intervals are freed of it, or tasks hold copies of samples. Overlap's are freed of what "
        "samples of unequal gradient norms do to it, and need not hold its value."
    )
