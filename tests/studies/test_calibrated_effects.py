"""The study of effects in small: levels hold, coverage is as told, and it sees tests and intervals that err."""

from __future__ import annotations

import json

import numpy as np
import pytest
from calibrated_effects import SIZES, SPREADS, WORLDS, draw, markdown, outcome, simulated
from pool import RESULTS
from real import smollm2
from real_effects import pair_products, real_draws

from qkov_dist.scoring.influence_records import OPTIMIZERS
from qkov_dist.stats import effect_tests

BY_TITLE = {world.title: world for world in WORLDS}
SYMMETRIC = ("no common mean", "no common mean, heavy tails", "weights of their own")


@pytest.fixture(scope="module")
def rows():
    return json.loads((RESULTS / "effects.json").read_text())


def test_levels_hold_wherever_no_kind_of_samples_is_rare(rows):
    """In the study as it was run, of which the short forms below are a part."""
    assert len(rows) == len(WORLDS) * len(SPREADS) * len(SIZES) + 3 * 2
    nulls = [row for row in rows if row["title"] in (*SYMMETRIC, "SmolLM2: signs of A's samples at random")]
    assert len(nulls) == 3 * len(SPREADS) * len(SIZES) + 2
    for row in nulls:
        for optimizer in OPTIMIZERS:
            bounds = {"level 5%": 0.05, "level 1%": 0.01, "family-wise": 0.05, "false discoveries": 0.05}
            for name, level in bounds.items():
                assert row[optimizer][name]["mean"] <= level, (row["title"], name)
    of_mixed = [row[o]["false discoveries"]["mean"] for row in rows if "quarter" in row["title"] for o in OPTIMIZERS]
    assert max(of_mixed) <= 0.05


def test_what_notes_quote_is_what_the_study_found(rows):
    rare = [row for row in rows if row["title"] == "rare opponents" and row["size"] == 8]
    assert f"{max(row[o]['level 5%']['mean'] for row in rare for o in OPTIMIZERS):.0%}" == effect_tests.RARE_OPPONENTS
    shown = [row for row in rows if "halves" in row["title"] or "quarter" in row["title"]]
    loud = [row for row in shown if row["adam"]["even"]["mean"] < effect_tests.UNEVEN]
    covered = [row[o]["coverage"]["mean"] for row in loud for o in OPTIMIZERS]
    assert f"{100 * min(covered):.0f} to {max(covered):.0%}" == effect_tests.UNEVEN_COVERED
    alike = [row for row in shown if row["adam"]["even"]["mean"] > 0.9]
    assert min(row[o]["coverage"]["mean"] for row in alike for o in OPTIMIZERS) >= 0.945
    assert (RESULTS / "effects.md").read_text() == markdown(rows)


@pytest.mark.parametrize("title", ["halves of one task", "a quarter in conflict"])
def test_the_truth_is_that_of_many_samples(title):
    """With a wrong truth no interval would be worth a word: 2000 samples a task come close to it."""
    influences, truth = draw(BY_TITLE[title], 2000, 0.0, np.random.default_rng(1))
    found = influences[..., :2000].mean(-1)
    assert np.abs(found - truth).max() < 0.1 * np.abs(truth).max()
    assert np.corrcoef(found[:, 0], truth[:, 0])[0, 1] > 0.99


def test_few_draws_hold_their_level_and_find_conflicts():
    null, mixed = (simulated(BY_TITLE[title], 16, 0.0, 30) for title in ("no common mean", "a quarter in conflict"))
    for optimizer in OPTIMIZERS:
        assert null[optimizer]["level 5%"]["mean"] < 0.05
        assert null[optimizer]["family-wise"]["mean"] < 0.2
        assert mixed[optimizer]["power"]["mean"] > 0.9
        assert mixed[optimizer]["false discoveries"]["mean"] < 0.05
        assert mixed[optimizer]["coverage"]["mean"] > 0.94


def test_errors_of_one_task_alone_are_seen():
    """As if B's samples were all there are: every other variance is lost."""
    world, rng = BY_TITLE["no common mean"], np.random.default_rng(2)

    def certain_of_a():
        influences, truth = draw(world, 16, 0.0, rng)
        means = influences[..., :16].mean(-1, keepdims=True)
        influences[..., :16] = means + 0.1 * (influences[..., :16] - means)
        return influences, truth

    found = outcome((certain_of_a() for _ in range(30)), 16)["sgd"]
    assert found["level 5%"]["mean"] > 0.2
    assert found["family-wise"]["mean"] > 0.5


@pytest.mark.long
@pytest.mark.real
def test_real_gradients_hold_their_level_and_their_truth():
    """The first layers of SmolLM2, 20 samples a task."""
    draws_of = real_draws(pair_products(smollm2(num_layers=2), (1,), 20))
    found = {}
    for title, draw_of in draws_of.items():
        rng = np.random.default_rng(3)
        found[title] = outcome((draw_of(10, rng) for _ in range(300)), 10)
    for optimizer in OPTIMIZERS:
        null, halves = found["signs of A's samples at random"][optimizer], found["halves of Python"][optimizer]
        for name in ("level 5%", "family-wise"):
            assert 0 < null[name]["mean"] <= 0.05 + 3 * null[name]["error"], name
        assert halves["coverage"]["mean"] >= 0.9
        assert halves["power"]["mean"] > null["level 5%"]["mean"]
