"""Conflicts beyond scale: against the formula pair by pair, and what a loud sample may not do."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
from heatmaps import make_heatmap, make_table

from qkov_dist.results.conflicts import excess
from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.heatmap_data import SampleTable, cross_of_pooled, mean_over_pairs

NUM = 16


def many_pairs(*, loud: int | None = None, seed: int = 0) -> Heatmap:
    """16 + 16 samples; a loud one has a hundred times the score with every other."""
    base = make_heatmap()
    rng = np.random.default_rng(seed)
    pooled = {}
    for block, mask in base.present.items():
        pooled[block] = np.where(mask[..., None, None], rng.gamma(4.0, size=(*mask.shape, 2 * NUM, 2 * NUM)), np.nan)
        if loud is not None:
            pooled[block][..., loud, :] *= 100
    cross = cross_of_pooled(pooled, NUM)
    tables = {f"samples_{task}": make_table(task, NUM) for task in "ab"}
    return dataclasses.replace(base, pooled=pooled, cross=cross, mean=mean_over_pairs(cross), shared={}, **tables)


def test_excess_is_the_score_over_what_rows_and_columns_explain() -> None:
    scores = np.random.default_rng(1).normal(size=(2, 4, 3))
    scores[0, 1, 2] = np.nan
    found = excess(scores)
    assert np.isnan(found[0, 1, 2])
    for head, i, j in [(0, 0, 2), (0, 1, 0), (1, 3, 1)]:
        size = np.abs(scores[head])
        expected = np.nanmean(size[i]) * np.nanmean(size[:, j]) / np.nanmean(size)
        assert found[head, i, j] == pytest.approx(scores[head, i, j] / expected)
    assert np.isnan(excess(np.zeros((1, 2, 2)))).all()


def test_scales_alone_exceed_nowhere() -> None:
    np.testing.assert_allclose(excess(np.outer([1.0, 50.0, 3.0], [2.0, 0.1])[None]), 1.0)


def test_a_loud_sample_fills_the_raw_ranking_but_not_that_beyond_scale() -> None:
    heatmap = many_pairs(loud=5)
    for view in heatmap.values():
        assert {record["sample_i"] for record in view.top_conflicts(50)} == {5}
        assert sum(record["sample_i"] == 5 for record in view.top_excesses(50)) <= 5


def test_no_sample_is_in_more_than_a_tenth_of_the_rows_and_no_pair_twice() -> None:
    for view in many_pairs().values():
        records = view.top_excesses(50)
        assert len(records) == 50
        assert [record["excess"] for record in records] == sorted((r["excess"] for r in records), reverse=True)
        for key in ("sample_i", "sample_j"):
            assert max(Counter(record[key] for record in records).values()) <= 5
        assert len({(record["sample_i"], record["sample_j"]) for record in records}) == 50


@pytest.mark.parametrize("score", ["interference", "signed"])
def test_the_first_row_is_the_largest_excess_of_all_heads(score: str) -> None:
    heatmap = dataclasses.replace(many_pairs(), attributes={"score": score})
    sign = -1 if score == "signed" else 1
    if sign < 0:
        cross = {block: scores - np.nanmean(scores) for block, scores in heatmap.cross.items()}
        heatmap = dataclasses.replace(heatmap, cross=cross)
    for block, view in heatmap.items():
        found = excess(heatmap.cross[block])
        layer, head, i, j = np.unravel_index(np.nanargmax(sign * found), found.shape)
        first = view.top_excesses(1)[0]
        assert first["excess"] == pytest.approx(found[layer, head, i, j])
        assert (first["layer"], first["sample_i"], first["sample_j"]) == (heatmap.layers[layer], i, j)
        assert first["head"] == heatmap.natives(block)[head]
        assert first["score"] == heatmap.cross[block][layer, head, i, j]


def test_a_sample_and_its_copy_are_not_listed() -> None:
    heatmap = many_pairs()
    contents = tuple(f"a{n}" for n in range(NUM)), ("a3", *(f"b{n}" for n in range(1, NUM)))
    tables = [
        SampleTable(table.ids, table.num_tokens, table.losses, table.texts, known)
        for table, known in zip((heatmap.samples_a, heatmap.samples_b), contents, strict=True)
    ]
    heatmap = dataclasses.replace(heatmap, samples_a=tables[0], samples_b=tables[1])
    heatmap.cross["Q"][:, :, 3, 0] = 1e6
    assert (3, 0) not in {(record["sample_i"], record["sample_j"]) for record in heatmap["Q"].top_excesses(200)}


def test_few_samples_give_as_many_rows_as_there_are_pairs() -> None:
    assert len(make_heatmap()["Q"].top_excesses(50)) == 12
