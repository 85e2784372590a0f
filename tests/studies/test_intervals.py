"""The study of intervals: what it found is what is promised, and it sees intervals that do not cover."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from intervals import LEAST, MOST, SIZES, SPREADS, WORLDS_STUDIED, World, covered, draw
from pool import RESULTS

from qkov_dist.stats import loud_samples


def test_overlap_is_covered_as_promised_whatever_the_spread_of_norms():
    rows = json.loads((RESULTS / "coverage.json").read_text())
    assert len(rows) == len(WORLDS_STUDIED) * len(SPREADS) * len(SIZES)
    for title in ("tasks differ, Fisher given", "more weights"):
        found = [row["coverage"]["overlap"] for row in rows if row["title"] == title]
        assert len(found) == len(SPREADS) * len(SIZES)
        assert LEAST <= min(found) <= max(found) <= MOST
    least = min(row["coverage"]["overlap"] for row in rows if row["title"] in ("tasks alike", "Fisher of the pool"))
    assert least >= 0.9  # conservative, and moved by the samples' own Fisher


@pytest.mark.parametrize("world", [WORLDS_STUDIED[0], WORLDS_STUDIED[2]], ids=lambda world: world.title)
def test_the_truth_is_that_of_many_samples(world: World):
    """With a wrong truth no interval would be worth a word: means over 400 + 400 samples come close to it."""
    scores, truth = draw(world, 400, 0.0, 1, (1, 2, 3))
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

    def nothing(scores, _pairs, _num_a):
        return loud_samples.Shift(torch.zeros(scores.shape[0]), torch.zeros(scores.shape[:2]))

    monkeypatch.setattr(loud_samples, "shift", nothing)
    assert covered(world, size, spread, 3, 100)["overlap"].mean() < 0.9
