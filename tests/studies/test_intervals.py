"""The study of intervals: what it found is what is promised, and it sees intervals that do not cover."""

from __future__ import annotations

import json

import intervals
import numpy as np
import pytest
import torch
from intervals import LEAST, MOST, REAL, SIZES, SPREADS, WORLDS_STUDIED, World, covered, draw, scores_of
from pool import RESULTS

from qkov_dist.stats import jackknife, loud_samples


def test_overlap_is_covered_as_promised_whatever_the_spread_of_norms():
    rows = json.loads((RESULTS / "coverage.json").read_text())
    assert len(rows) == len(WORLDS_STUDIED) * len(SPREADS) * len(SIZES) + len(SIZES)
    titles = [world.title for world in WORLDS_STUDIED]
    by_title = {title: [row["coverage"]["overlap"] for row in rows if row["title"] == title] for title in titles}
    for rates in by_title.values():
        assert len(rates) == len(SPREADS) * len(SIZES)
        assert LEAST <= min(rates) <= max(rates) <= MOST
    for row in rows[-len(SIZES) :]:
        assert row["title"] == REAL
        assert LEAST <= row["coverage"]["Fisher of the pool"] <= MOST
        assert abs(row["off"]["Fisher of the pool"]) < 0.5 * abs(row["off"]["shares left in"])


@pytest.mark.parametrize("world", [WORLDS_STUDIED[0], WORLDS_STUDIED[2]], ids=lambda world: world.title)
def test_the_truth_is_that_of_many_samples(world: World):
    """With a wrong truth no interval would be worth a word: means over 400 + 400 samples come close to it."""
    gradients, fisher, truth = draw(world, 400, 0.0, 1, (1, 2, 3))
    scores = scores_of(gradients, fisher)
    first, second = slice(0, 400), slice(400, None)
    ab, ba = scores[0, first, second].mean(), scores[0, second, first].mean()
    others = ~np.eye(400, dtype=bool)
    aa, bb = (scores[0, part, part][others].mean() for part in (first, second))
    assert 0.5 * np.log(ab * ba / (aa * bb)) == pytest.approx(truth["overlap"], abs=0.03)
    assert ab == pytest.approx(truth["cross_mean"], rel=0.1)


def test_few_samples_of_varied_size_are_covered_and_intervals_without_their_correction_are_seen(monkeypatch):
    """Three standard errors of 300 draws are 0.03 to 0.05."""
    torch.set_num_threads(1)
    world, size, spread = WORLDS_STUDIED[0], 16, 1.0
    assert covered(world, size, spread, 3, 100)["overlap"].mean() > 0.92

    shift = loud_samples.shift

    def nothing(scores, pairs, num_a):
        found = shift(scores, pairs, num_a)
        return found._replace(whole=torch.zeros(scores.shape[0]), left_out=torch.zeros(scores.shape[:2]))

    monkeypatch.setattr(loud_samples, "shift", nothing)
    assert covered(world, size, spread, 3, 100)["overlap"].mean() < 0.9


@pytest.mark.parametrize(("size", "spread"), [(8, 0.0), (16, 1.0)])
def test_tasks_that_are_alike_are_covered_and_intervals_by_all_of_the_jackknifes_variance_are_seen(
    monkeypatch, size: int, spread: float
):
    """Three standard errors of 300 draws at 96% are 0.034, at 99.5% 0.012."""
    torch.set_num_threads(1)
    world = WORLDS_STUDIED[2]
    assert 0.92 < covered(world, size, spread, 3, 100)["overlap"].mean() < 0.985
    monkeypatch.setattr(jackknife, "_width_towards_zero", lambda _value, width: width)
    assert covered(world, size, spread, 3, 100)["overlap"].mean() > 0.985


def test_a_fisher_of_the_pool_is_covered_and_shares_that_are_left_in_are_seen(monkeypatch):
    """Three standard errors of 180 draws at 98% are 0.03, at 60% 0.11."""
    torch.set_num_threads(1)
    world, size, spread = WORLDS_STUDIED[5], 8, 0.6
    assert covered(world, size, spread, 3, 60)["overlap"].mean() > 0.92
    nothing = np.array([1.0, 1.0, 1.0, 1.0, 0.0]).reshape(-1, 1)
    monkeypatch.setattr(intervals, "known_of", lambda _g, _fisher, n: np.broadcast_to(nothing, (60, 5, 2 * n)).copy())
    assert covered(world, size, spread, 3, 60)["overlap"].mean() < 0.8
