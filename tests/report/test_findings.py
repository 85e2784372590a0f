"""Words for significant heads: which side of the null, and what that says."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from heatmaps import make_heatmap, make_statistics, present

from qkov_dist.report.findings import counts, findings, found, how_tested, is_family_wise, name_of, significance
from qkov_dist.results.heatmap import Heatmap
from qkov_dist.stats.statistics import QKOVStatistics


def one_head(
    effect: float, *, score: str = "interference", statistic: str = "overlap", mean: float = 1.0, q: float = 0.01
) -> Heatmap:
    """A heatmap of which every Q head looks alike, and no other head is significant."""
    heatmap = make_heatmap(attributes={"run_id": "r", "score": score})
    there = present("Q")
    means = {**heatmap.mean, "Q": np.where(there, mean, np.nan)}
    statistics = make_statistics()
    for block in "QKVO":
        statistics[statistic][block]["q_value"] = np.where(present(block), 1.0, np.nan)
    statistics[statistic]["Q"] |= {
        "q_value": np.where(there, q, np.nan),
        "effect_size": np.where(there, effect, np.nan),
        "p_max": np.where(there, 0.04, np.nan),
    }
    statistics["settings"] = {"statistic": statistic, "alternative": "two-sided", "fdr_alpha": 0.05}
    return dataclasses.replace(heatmap, mean=means).with_statistics(statistics)


def names(heatmap: Heatmap, block: str = "Q") -> set[str | None]:
    """What the present heads of a block show; absent ones must show nothing."""
    codes = found(heatmap, block)
    assert not codes[~present(block)].any()
    return {name_of(heatmap, int(code)) for code in codes[present(block)]}


@pytest.mark.parametrize(
    ("score", "statistic", "effect", "mean", "expected"),
    [
        ("interference", "overlap", 2.0, 1.0, "contested"),
        ("interference", "overlap", -2.0, 1.0, "apart"),
        ("symmetric", "overlap", -0.1, 1.0, "apart"),
        ("interference", "cross_mean", 2.0, 1.0, "higher"),
        ("symmetric", "cross_mean", -2.0, 1.0, "lower"),
        ("signed", "cross_mean", 2.0, 1.0, "synergy"),
        ("signed", "cross_mean", 2.0, -1.0, "milder"),
        ("signed", "cross_mean", -2.0, -1.0, "conflict"),
        ("signed", "cross_mean", -2.0, 1.0, "weaker"),
        ("interference", "overlap", np.nan, 1.0, "unlike"),
    ],
)
def test_the_side_of_the_null_has_a_name(score, statistic, effect, mean, expected):
    heatmap = one_head(effect, score=score, statistic=statistic, mean=mean)
    assert names(heatmap) == {expected}
    assert names(heatmap, "K") == {None}
    numbers = {finding.name: number for finding, number in counts(heatmap).items()}
    assert numbers[expected] == present("Q").sum() == sum(numbers.values())
    assert is_family_wise(heatmap, "Q").sum() == present("Q").sum()


def test_above_alpha_nothing_is_found():
    heatmap = one_head(2.0, q=0.0501)
    assert names(heatmap) == {None}
    assert not is_family_wise(heatmap, "Q").any()  # although p_max is below alpha
    assert names(one_head(2.0, q=0.05)) == {"contested"}


def test_every_mark_of_a_heatmap_has_its_own_shape():
    for heatmap in (one_head(1.0), one_head(1.0, score="signed", statistic="cross_mean")):
        for part in ("name", "mark", "glyph"):
            assert len({getattr(finding, part) for finding in findings(heatmap)}) == len(findings(heatmap))


def test_rare_findings_are_listed_only_where_they_occur():
    listed = {
        effect: [finding.name for finding in counts(one_head(effect, score="signed", statistic="cross_mean", mean=-1))]
        for effect in (-1.0, 1.0, np.nan)
    }
    assert listed[-1.0] == ["synergy", "conflict", "weaker"]
    assert listed[1.0] == [*listed[-1.0], "milder"]
    assert listed[np.nan] == [*listed[-1.0], "unlike"]


@pytest.mark.parametrize(
    ("heatmap", "settings", "expected"),
    [
        (one_head(2.0), {}, "16 of 44 heads: 16 contested, 0 apart (overlap, two-sided, q <= 0.05)"),
        (one_head(-2.0), {}, "16 of 44 heads: 0 contested, 16 apart (overlap, two-sided, q <= 0.05)"),
        (one_head(2.0, q=1.0), {}, "0 of 44 heads (overlap, two-sided, q <= 0.05)"),
        (
            one_head(2.0),
            {"alternative": "greater"},
            "16 of 44 heads: 16 contested, 0 apart (overlap, one-sided above, q <= 0.05)",
        ),
        (one_head(2.0), {"alternative": None}, "16 of 44 heads: 16 contested, 0 apart (overlap, q <= 0.05)"),
        (make_heatmap(), None, "not tested"),
    ],
)
def test_significance_in_one_line(heatmap, settings, expected):
    if settings is not None:
        statistics = heatmap.statistics
        heatmap = heatmap.with_statistics({**statistics, "settings": {**statistics["settings"], **settings}})
    assert significance(heatmap) == expected


@pytest.mark.parametrize(
    ("settings", "attributes", "parts"),
    [
        ({"method": "exhaustive", "n_labellings": 35}, {}, ["All 35 labellings of 4 + 3 samples", "below 0.029"]),
        ({"exactly_exchangeable": True}, {}, ["exactly exchangeable under this Fisher"]),
        ({"exactly_exchangeable": False}, {"scope": "pooled"}, ["nearly, not exactly"]),
        ({"exactly_exchangeable": False}, {"scope": "b"}, ["not exchangeable", "of one task"]),
        ({}, {}, ["1,000 random labellings of 4 + 3 samples (seed 7) and the observed one", "below 0.001"]),
    ],
)
def test_how_heads_were_tested_in_words(settings, attributes, parts):
    known = {"method": "monte-carlo", "n_labellings": 1001, "seed": 7, "n_a": 4, "n_b": 3}
    heatmap = one_head(1.0)
    heatmap = dataclasses.replace(heatmap, attributes={**heatmap.attributes, **attributes})
    statistics = {**heatmap.statistics, "settings": {**heatmap.statistics["settings"], **known, **settings}}
    said = " ".join(how_tested(heatmap.with_statistics(statistics)))
    for part in parts:
        assert part in said
    assert "two-sided" in said


def test_apart_is_below_the_null_and_may_be_above_zero():
    """The words say what is tested, and how many heads below their null lie above 0."""
    heatmap = one_head(-2.0)
    statistic = heatmap.statistics["overlap"]["Q"]["statistic"]
    statistic[...] = np.where(present("Q"), -0.5, np.nan)
    statistic[0, :3] = 0.25
    said = " ".join(how_tested(heatmap))
    assert "Compared with its null, not with 0" in said
    assert f"Of {present('Q').sum()} significant heads below their null 3 have an overlap above 0." in said
    meanings = {finding.name: finding.meaning for finding in findings(heatmap)}
    assert all("themselves" not in meaning for meaning in meanings.values())
    assert "may be above 0" in meanings["apart"]
    assert "not with 0" not in " ".join(how_tested(one_head(1.0, score="signed", statistic="cross_mean")))


@pytest.mark.parametrize("score", ["interference", "signed"])
def test_findings_are_the_records_of_the_statistics(score):
    attributes = {"run_id": "r", "score": score, "estimator": "mean", "scope": "pooled"}
    heatmap = make_heatmap(attributes=attributes)
    results = QKOVStatistics(fdr_alpha=0.9, n_permutations=40).test_heatmap(heatmap)
    heatmap = heatmap.with_statistics(results)
    sides = set()
    for block in heatmap.blocks:
        codes = found(heatmap, block)
        records = {(r["layer"], r["head"]): r["direction"] for r in results["fdr_corrected"][block]}
        at = np.argwhere(codes > 0)
        shown = {(heatmap.layers[i], heatmap.natives(block)[j]): findings(heatmap)[codes[i, j] - 1].side for i, j in at}
        assert shown == records
        sides |= set(shown.values())
    assert sides == {"above", "below"}
