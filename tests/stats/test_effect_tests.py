"""Tests of effects against what defines them: samples left out one by one, scipy's t test, loops over signs."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import false_discovery_control, ttest_ind

from qkov_dist.results.effects import TESTED_KEYS, counted_samples
from qkov_dist.results.influences import Samples, changes, without_self_pairs
from qkov_dist.scoring.influence_records import OPTIMIZERS
from qkov_dist.stats import effect_tests as module
from qkov_dist.stats.effect_tests import effect_tests, even_samples, notes_on_effects

NUM_A, NUM_B, SIZE = 6, 4, 5
IS_A = np.arange(NUM_A + NUM_B) < NUM_A
ALL = Samples(IS_A, ~IS_A)


@pytest.fixture(scope="module")
def gradients():
    """Of one head, [N, p]; tasks of unlike means and sizes."""
    rng = np.random.default_rng(5)
    return rng.normal(size=(NUM_A + NUM_B, SIZE)) * np.exp(rng.normal(size=(NUM_A + NUM_B, 1))) + 0.4


@pytest.fixture(scope="module")
def scale():
    """P of an optimizer, [p]."""
    return np.exp(np.random.default_rng(6).normal(size=SIZE))


def influences_of(gradients, scale, samples=ALL):
    """One sample at a time."""
    mean_a, mean_b = (gradients[chosen].mean(0) for chosen in (samples.a, samples.b))
    return np.array(
        [-(g * scale * (mean_b if is_a else mean_a)).sum() for g, is_a in zip(gradients, IS_A, strict=True)]
    )


def change_of(of_a, of_b, scale) -> float:
    """The mean over all pairs, in two loops."""
    return float(np.mean([-(g_i * scale * g_j).sum() for g_i in of_a for g_j in of_b]))


def made_heads(seed: int, *shape: int, shift: float = 0.0):
    """Influences [layer, head, optimizer, N] of unlike samples, some heads alike."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=NUM_A + NUM_B) * np.exp(rng.normal(size=NUM_A + NUM_B))
    return common + rng.normal(size=(*shape, len(OPTIMIZERS), NUM_A + NUM_B)) + shift


def test_the_error_is_that_of_leaving_out_one_sample_after_the_other(gradients, scale):
    of_a, of_b = gradients[:NUM_A], gradients[NUM_A:]
    variance = 0.0
    for num, without in (
        (NUM_A, lambda n: change_of(np.delete(of_a, n, 0), of_b, scale)),
        (NUM_B, lambda n: change_of(of_a, np.delete(of_b, n, 0), scale)),
    ):
        left = np.array([without(n) for n in range(num)])
        variance += (num - 1) / num * ((left - left.mean()) ** 2).sum()
    found = changes(influences_of(gradients, scale), ALL)
    assert found.value == pytest.approx(change_of(of_a, of_b, scale), rel=1e-12)
    assert found.standard_error == pytest.approx(variance**0.5, rel=1e-12)


def test_p_and_interval_are_those_of_welch_as_scipy_has_them():
    heads = {"Q": made_heads(1, 2, 3, shift=0.5), "V": made_heads(2, 2, 1)}
    for block, of_block in heads.items():
        # of two samples whose means differ by the change: B's are centred, which moves no variance
        of_b = of_block[..., NUM_A:] - of_block[..., NUM_A:].mean(-1, keepdims=True)
        welch = ttest_ind(of_block[..., :NUM_A], of_b, axis=-1, equal_var=False)
        low, high = welch.confidence_interval(0.9)
        found = effect_tests(heads, ALL, num_draws=20, confidence=0.9)[block]
        for place, optimizer in enumerate(OPTIMIZERS):
            assert set(found[optimizer]) == set(TESTED_KEYS)
            for name, expected in (("p_value", welch.pvalue), ("ci_low", low), ("ci_high", high)):
                np.testing.assert_allclose(found[optimizer][name], expected[..., place], rtol=1e-9, err_msg=name)
            p_values = found[optimizer]["p_value"]
            expected = false_discovery_control(p_values.ravel(), method="bh").reshape(p_values.shape)
            np.testing.assert_allclose(found[optimizer]["q_value"], expected)


def test_family_wise_p_is_the_share_of_signs_that_reach_it_in_any_head_of_any_block():
    heads, num_draws, seed = {"Q": made_heads(1, 2, 3, shift=0.7), "V": made_heads(2, 2, 1, shift=0.2)}, 50, 9
    heads["Q"][1, 2] = np.nan  # a head that its layer lacks
    found = effect_tests(heads, ALL, num_draws=num_draws, seed=seed)
    signs = np.random.default_rng((seed, NUM_A + NUM_B, 1)).choice((-1.0, 1.0), size=(NUM_A + NUM_B, num_draws))
    for place, optimizer in enumerate(OPTIMIZERS):
        rows = [row for block in heads.values() for row in block[:, :, place].reshape(-1, NUM_A + NUM_B)]
        largest = []
        for draw in range(num_draws):
            of_draw = []
            for row in rows:
                if np.isnan(row).any():
                    continue
                parts = [(row[m] - row[m].mean()) * signs[m, draw] for m in (ALL.a, ALL.b)]
                error = sum(part.var(ddof=1) / len(part) for part in parts) ** 0.5
                of_draw.append(abs(sum(part.mean() for part in parts)) / error)
            largest.append(max(of_draw))
        for block in heads:
            arrays = found[block][optimizer]
            z = np.abs(arrays["change"] / arrays["standard_error"])
            beyond = (np.array(largest) >= z[..., None]).sum(-1)
            expected = np.where(np.isnan(z), np.nan, (1 + beyond) / (1 + num_draws))
            np.testing.assert_allclose(arrays["p_max"], expected)
    assert len(np.unique(found["Q"]["sgd"]["p_max"])) > 3  # the shares differ


def test_heads_tested_in_pieces_are_tested_alike(monkeypatch):
    heads = {"Q": made_heads(1, 4, 3)}
    whole = effect_tests(heads, ALL, num_draws=30)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1)
    for optimizer, arrays in effect_tests(heads, ALL, num_draws=30)["Q"].items():
        np.testing.assert_array_equal(arrays["p_max"], whole["Q"][optimizer]["p_max"])


def test_samples_that_both_tasks_have_count_in_neither(gradients, scale):
    contents_a, contents_b = ["a1", "both", "a3", "", "a5", "a6"], ["b1", "", "both", "b4"]
    samples = counted_samples(contents_a, contents_b)
    assert samples.a.nonzero()[0].tolist() == [0, 2, 3, 4, 5]  # unknown contents are no copies of each other
    assert samples.b.nonzero()[0].tolist() == [6, 7, 9]
    found = changes(influences_of(gradients, scale, samples), samples)
    of_a, of_b = gradients[[0, 2, 3, 4, 5]], gradients[[6, 7, 9]]
    assert found.value == pytest.approx(change_of(of_a, of_b, scale), rel=1e-12)
    kept = np.array([0, 2, 3, 4, 5, 6, 7, 9])
    alone = changes(influences_of(gradients, scale, samples)[kept], Samples(IS_A[kept], ~IS_A[kept]))
    assert found.standard_error == alone.standard_error
    assert any("leave out 2 samples" in note for note in notes_on_effects({"Q": made_heads(3, 1, 2)}, samples))


@pytest.mark.parametrize("num_a", [0, 1])
def test_with_fewer_than_two_samples_there_is_a_change_at_most(num_a):
    samples = Samples(np.arange(NUM_A + NUM_B) < num_a, ~IS_A)
    found = effect_tests({"Q": made_heads(3, 1, 2)}, samples, num_draws=5)["Q"]["adam"]
    assert np.isfinite(found["change"]).all() == bool(num_a)
    for name in set(TESTED_KEYS) - {"change"}:
        assert np.isnan(found[name]).all(), name
    assert any("fewer than two samples" in note for note in notes_on_effects({"Q": made_heads(3, 1, 2)}, samples))
    assert np.isnan(without_self_pairs(np.array([1.0]), np.array([1.0]), num_a)).all()


def test_a_dead_head_is_not_significant_and_an_absent_one_not_there():
    heads = made_heads(4, 1, 3, shift=5.0)
    heads[0, 1], heads[0, 2] = 0.0, np.nan
    found = effect_tests({"Q": heads}, ALL, num_draws=100)["Q"]["sgd"]
    for name in ("p_value", "q_value", "p_max"):
        assert found[name][0, 0] < 0.05
        assert found[name][0, 1] == 1, name
        assert np.isnan(found[name][0, 2]), name
    assert (found["change"][0, 1], found["standard_error"][0, 1]) == (0, 0)


def test_a_step_on_oneself_is_the_mean_over_pairs_of_different_samples(gradients, scale):
    of_a = gradients[:NUM_A]
    pairs = [-(of_a[i] * scale * of_a[j]).sum() for i in range(NUM_A) for j in range(NUM_A) if i != j]
    own, norm = -(of_a.mean(0) ** 2 * scale).sum(), ((of_a**2).mean(0) * scale).sum()
    assert without_self_pairs(own, norm, NUM_A) == pytest.approx(np.mean(pairs), rel=1e-12)
    assert abs(own - np.mean(pairs)) > 0.05 * abs(own)


def test_loud_samples_count_as_fewer_alike_and_are_told_of():
    rng, is_a = np.random.default_rng(7), np.arange(40) < 20
    samples = Samples(is_a, ~is_a)
    of_heads = rng.choice((-1.0, 1.0), size=(3, 5, 2, 40)) * np.exp(rng.normal(size=(3, 5, 2, 1)))  # all of one size
    of_heads[2, 4] = np.nan
    assert even_samples({"Q": of_heads}, samples) == pytest.approx((20, 20))
    assert notes_on_effects({"Q": of_heads}, samples) == []
    of_heads[..., 20:25] *= 9
    assert even_samples({"Q": of_heads}, samples) == pytest.approx((20, (5 * 9 + 15) ** 2 / (5 * 81 + 15)))
    (note,) = notes_on_effects({"Q": of_heads}, samples)
    assert "task B are loud, so that 20 count as 9 alike" in note
    few = Samples(is_a & (np.arange(40) < 15), ~is_a)
    assert "rest on 15 samples" in notes_on_effects({"Q": of_heads}, few)[1]
    assert even_samples({"Q": 0 * of_heads}, samples) == (20, 20)
