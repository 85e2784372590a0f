"""The calibration study in small: exchangeable labels hold their level, and the study sees those that do not."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from calibration import ALPHA, MEAN, Condition, Outcome, run_condition
from pool import RESULTS, FisherRule, pooled, reordered
from power import DEFAULT, count_found
from samples import mixed_samples
from zoo import TINY, VOCAB

from qkov_dist.stats.significance import _CROSS_MEAN_REJECTED, _NOT_EXCHANGEABLE

EXACT = Condition("tiny llama", MEAN, 8, 8, 200, 199, rescored=False)


@pytest.fixture(scope="module")
def pool():
    with pooled(TINY["llama"].build(), mixed_samples(16, VOCAB, seed=11)) as made:
        yield made


def assert_calibrated(results) -> None:
    for name in ("cross_mean", "overlap"):
        for alternative, found in results[name].items():
            where = f"{name}, {alternative}"
            assert found["ks_p"] > 1e-3, where
            assert found["ks_worst_head_bonferroni_p"] > 1e-3, where
            low = found["rejected_low"]
            assert abs(low["mean"] - ALPHA) < 4 * low["error"], where
            assert found["family_wise"]["low"] <= ALPHA, where
            assert all(share["low"] <= ALPHA for share in found["false_discovery"].values()), where


@pytest.mark.long
def test_p_values_are_uniform_on_halves_of_one_task(pool):
    results = run_condition(EXACT, pool)
    assert list(results["overlap"]) == ["two-sided", "greater", "less"]
    assert_calibrated(results)


def test_under_a_mean_fisher_scoring_a_split_anew_only_reorders_the_scores(pool):
    order = np.random.default_rng(0).permutation(16).tolist()
    once = reordered(pool.scores(MEAN, range(16), 8), order)
    for block, anew in pool.scores(MEAN, order, 8).items():
        torch.testing.assert_close(once[block], anew, rtol=1e-4, atol=1e-5 * float(anew.abs().max()))


@pytest.mark.long
def test_a_fisher_of_one_task_is_seen_to_break_it(pool):
    broken = dataclasses.replace(EXACT, rule=FisherRule("mean", "a"), splits=16, rescored=True)
    results = run_condition(broken, pool)
    assert results["cross_mean"]["less"]["ks_p"] < 1e-3
    assert results["cross_mean"]["less"]["ks_pooled_distance"] > 0.3
    assert results["cross_mean"]["two-sided"]["rejected_low"]["mean"] > 2 * ALPHA


def test_too_small_p_values_are_seen():
    """Halved p-values, as of a one-sided test read two-sidedly, fail every one of the study's measures."""
    rng = np.random.default_rng(0)
    outcome = Outcome()
    for _ in range(200):
        p = (1 + rng.integers(200, size=8)) / 200 / 2
        outcome.add({"Q": {"p_value": p, "q_value": p, "p_max": p}}, 400, rng)
    with pytest.raises(AssertionError):
        assert_calibrated({name: {"two-sided": outcome.summary(rng)} for name in ("cross_mean", "overlap")})


def test_heads_with_weights_of_their_own_are_found_and_more_samples_find_more():
    """In five of six heads the tasks press on themselves more than on each other, each head more than the last."""
    rng = np.random.default_rng(1)
    near = 1 + np.arange(6)[:, None, None] / 8 * np.kron(np.eye(2), np.ones((12, 12)))
    scores = {"Q": torch.from_numpy(rng.gamma(4.0, size=(6, 24, 24)) * near)}
    many = count_found(scores, 12, DEFAULT, 400)
    few = count_found(reordered(scores, [0, 1, 2, 12, 13, 14]), 3, DEFAULT, 400)
    assert few["found"] < many["found"] == many["below"]
    assert 4 <= many["below"] <= 5
    assert many["above"] == 0
    swapped = count_found({"Q": 1 / scores["Q"]}, 12, DEFAULT, 400)
    assert 4 <= swapped["above"] == swapped["found"] <= 5


def test_the_rates_that_notes_quote_are_those_of_the_study():
    stored = json.loads((RESULTS / "calibration.json").read_text())["conditions"]
    for scope, quoted in _CROSS_MEAN_REJECTED.items():
        least, most, alternative = re.fullmatch(r"(\d+) to (\d+)% \((\S+)\)", quoted).groups()
        rates = [
            row["cross_mean"][alternative]["rejected_low"]["mean"] for row in stored if row["rule"]["scope"] == scope
        ]
        assert [round(100 * min(rates)), round(100 * max(rates))] == [int(least), int(most)]
    of_one_task = [row["overlap"] for row in stored if row["rule"]["scope"] != "pooled"]
    two_sided, greater = (
        [100 * found[side]["rejected_low"]["mean"] for found in of_one_task] for side in ("two-sided", "greater")
    )
    assert f"two-sided rejected {min(two_sided):.0f} to {max(two_sided):.0f}%" in _NOT_EXCHANGEABLE
    assert max(greater) < 5
