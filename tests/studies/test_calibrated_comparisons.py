"""The study of comparisons: levels hold as told, its page is that of its numbers, and it sees heads that did move."""

from __future__ import annotations

import json

import numpy as np
import pytest
from calibrated_comparisons import ALPHA, KINDS, SIZES, SPREADS, compared, markdown, outcome
from pool import RESULTS

from qkov_dist.stats.comparison import TESTED


@pytest.fixture(scope="module")
def rows():
    return json.loads((RESULTS / "comparisons.json").read_text())


def test_levels_hold_as_the_chapter_says(rows):
    assert len(rows) == len(KINDS) * len(SPREADS) * len(SIZES)
    for name in TESTED:
        p, q, p_max = np.max([row[name] for row in rows], axis=0)
        assert p <= 0.04 + 5e-4, name
        assert q <= 0.04, name
        assert p_max <= (0.075 if name.startswith("relative") else 0.05), name
    assert min(row["rank"]["held"] for row in rows) >= 0.975


def test_the_page_is_that_of_the_numbers(rows):
    assert (RESULTS / "comparisons.md").read_text() == markdown(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_the_study_in_small_is_a_part_of_the_whole(kind):
    found = outcome(kind, SIZES[1], SPREADS[1], draws=20)
    for name in TESTED:
        assert found[name][0] <= ALPHA, name


def test_runs_of_the_study_are_paired_where_they_share_samples():
    for kind in KINDS:
        comparison = compared(kind, 0, SIZES[0], SPREADS[0])
        assert comparison.paired == (kind == "same samples")
        assert all(comparison.quantities[name].moves is not None for name in TESTED)
