"""Oracles are plain loops over pairs, exact fractions, or scipy; simulations use fixed seeds and loose bounds."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import optimize, stats

from qkov_dist.data.copies import different_pairs
from qkov_dist.errors import QkovError
from qkov_dist.stats import head_tests, jackknife, loud_samples, pair_sums, permutation
from qkov_dist.stats import head_tests as layer_tests
from qkov_dist.stats.head_tests import LayerTests
from qkov_dist.stats.statistics import QKOVStatistics

BLOCKS = ("Q", "K", "V", "O")
STATISTICS = ("cross_mean", "overlap")
ALTERNATIVES = ("greater", "less", "two-sided")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Samples:
    ids: tuple[str, ...]
    contents: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.contents = self.contents or ("",) * len(self.ids)


@dataclass
class FakeHeatmap:
    pooled: dict | None
    layers: tuple = (3, 7)
    heads: tuple = (0, 1, 5, 6)
    kv_heads: tuple = (0, 2)
    samples_a: Samples = field(default_factory=lambda: Samples(tuple(f"a{i}" for i in range(5))))
    samples_b: Samples = field(default_factory=lambda: Samples(tuple(f"b{i}" for i in range(6))))
    attributes: dict = field(default_factory=lambda: {"score": "interference", "estimator": "mean", "scope": "pooled"})
    own_shares: dict | None = None

    @property
    def present(self):
        return {block: ~np.isnan(np.asarray(scores)).all((-2, -1)) for block, scores in self.pooled.items()}

    def natives(self, block):
        return self.kv_heads if block in "KV" else self.heads


def interference(rng, shape, num_samples, *, scale=None, num_parameters=30):
    """Scores of the metric's own form, from gradients of which all samples' are drawn alike but for ``scale`` [N]."""
    grad = rng.normal(size=(*shape, num_samples, num_parameters)) * np.exp(0.4 * rng.normal(size=(num_samples, 1)))
    grad = grad * np.exp(rng.normal(size=(*shape, 1, num_parameters)))
    if scale is not None:
        grad = grad * scale[:, None]
    return grad**2 / (grad**2).mean(-2, keepdims=True) @ np.swapaxes(np.abs(grad), -1, -2)


def heatmap_of(rng, **changes):
    pooled = {b: interference(rng, (2, 2 if b in "KV" else 4), 11).astype(np.float32) for b in BLOCKS}
    pooled["Q"][1, 3] = np.nan
    return replace(FakeHeatmap(pooled), **changes)


def pair_mean(M, left, right):
    values = [M[i][j] for i in left for j in right if i != j]
    return sum(values) / len(values)


def slow(name, M, group_a, group_b):
    """By lists of sample numbers, in which a sample may stand twice."""
    M = np.asarray(M, dtype=np.float64)
    if name == "cross_mean":
        return pair_mean(M, group_a, group_b)
    cross = pair_mean(M, group_a, group_b) * pair_mean(M, group_b, group_a)
    return 0.5 * math.log(cross / (pair_mean(M, group_a, group_a) * pair_mean(M, group_b, group_b)))


def groups(labels):
    """The two lists of sample numbers of every labelling."""
    return [([i for i, x in enumerate(c) if x], [i for i, x in enumerate(c) if not x]) for c in labels.a.T.tolist()]


def slow_null(name, M, labels):
    return np.array([slow(name, M, *pair) for pair in groups(labels)])


def slow_mean(name, M, values, labels):
    """The null's mean: that of all pairs where labellings of ``cross_mean`` are drawn, else that of these values."""
    if name == "overlap" or labels.exhaustive:
        return values.mean()
    return pair_mean(np.asarray(M, np.float64), range(len(M)), range(len(M)))


def slow_z(values, alternative, mean=None):
    """The standardised and directed values, in plain numpy."""
    deviation = values - (values.mean() if mean is None else mean)
    z = deviation / np.sqrt(np.mean(deviation**2))
    return {"greater": z, "less": -z, "two-sided": abs(z)}[alternative]


def different(num, contents=None):
    """Which pairs of samples are of different ones."""
    return torch.from_numpy(different_pairs(contents or [""] * num))


def head_nulls(scores, labels, contents=None):
    pairs = different(labels.n_a + labels.n_b, contents)
    return permutation.head_nulls(torch.as_tensor(scores), labels, pairs, permutation.pair_counts(labels, pairs))


def p_values(scores, labels, alternative="greater", name="overlap"):
    null = head_nulls(scores, labels)[name]
    return permutation.p_value(permutation.standardise(null), alternative).numpy()


# ---- labellings


def test_labellings_start_with_the_observed_one_and_depend_on_nothing_but_seed_and_counts():
    labels = permutation.draw_labels(3, 5, 7, 100)
    assert labels.a.shape == (12, 101)
    assert not labels.exhaustive
    assert labels.a[:, 0].tolist() == [1] * 5 + [0] * 7
    assert (labels.a.sum(0) == 5).all()
    assert torch.equal(labels.a, permutation.draw_labels(3, 5, 7, 100).a)
    assert not torch.equal(labels.a, permutation.draw_labels(4, 5, 7, 100).a)
    share_of_a = labels.a[:, 1:].mean(1)  # each sample is called A equally often: sd 0.05
    assert (abs(share_of_a - 5 / 12) < 0.2).all()


@pytest.mark.parametrize(("limit", "exhaustive"), [(126, True), (125, False)])
def test_labellings_are_enumerated_where_no_more_exist_than_asked_for(limit, exhaustive):
    labels = permutation.draw_labels(0, 4, 5, limit)
    assert labels.exhaustive is exhaustive
    assert labels.a.shape[1] == 126
    assert labels.a[:, 0].tolist() == [1] * 4 + [0] * 5
    if exhaustive:
        assert len({tuple(column) for column in labels.a.T.tolist()}) == math.comb(9, 4)


# ---- the statistics


@pytest.mark.parametrize(("n_a", "n_b", "num_permutations"), [(4, 5, 1000), (6, 9, 40), (2, 3, 10)])
def test_every_labelling_equals_loops_over_pairs(n_a, n_b, num_permutations):
    scores = interference(np.random.default_rng(1), (2, 3), n_a + n_b)
    labels = permutation.draw_labels(0, n_a, n_b, num_permutations)
    nulls = head_nulls(scores, labels)
    for name in STATISTICS:
        for layer, head in np.ndindex(2, 3):
            expected = slow_null(name, scores[layer, head], labels)
            np.testing.assert_allclose(nulls[name].values[layer, head], expected, rtol=1e-11, atol=1e-12)


def test_self_pairs_take_no_part():
    scores = interference(np.random.default_rng(1), (2,), 9)
    labels = permutation.draw_labels(0, 4, 5, 50)
    changed = scores.copy()
    changed[:, range(9), range(9)] = 1e6
    for name in STATISTICS:
        before, after = (head_nulls(s, labels)[name].values for s in (scores, changed))
        assert torch.equal(before, after)
    assert changed[0, 0, 0] == 1e6  # the input is left alone


def test_overlap_does_not_depend_on_a_tasks_gradient_scale_and_keeps_its_digits():
    rng = np.random.default_rng(0)
    scores = interference(rng, (), 12)
    factor = np.where(np.arange(12) < 6, 1e3, 1.0)
    scaled = factor[:, None] ** 2 * scores * factor  # A's gradients 1000 times larger under one Fisher
    labels = permutation.draw_labels(0, 6, 6, 10)
    before, after = (head_nulls(s, labels)["overlap"].values[0].item() for s in (scores, scaled))
    assert after == pytest.approx(before, abs=1e-5)  # b'Mb is 1e-9 of the total: seven digits are left

    single = torch.from_numpy(scaled).float().fill_diagonal_(0)
    a = labels.a[:, 0].float()
    difference = single.sum() - single.sum(1) @ a - single.sum(0) @ a + a @ single @ a
    exact = pair_mean(scaled, range(6, 12), range(6, 12)) * 30
    assert abs(difference.item() - exact) > 0.1 * exact  # float32 would have lost it


# ---- samples that occur more than once

CONTENTS = ["u", "v", "w", "v", "x", "u", "y", "", ""]  # v twice in A (of four), u in both; two unknown ones differ


def without_copies(M, left, right):
    values = [M[i][j] for i in left for j in right if i != j and (CONTENTS[i] != CONTENTS[j] or not CONTENTS[i])]
    return sum(values) / len(values)


def slow_without_copies(name, M, labels):
    found = []
    for a, b in groups(labels):
        ab, ba, aa, bb = (without_copies(M, *pair) for pair in ((a, b), (b, a), (a, a), (b, b)))
        found.append(ab if name == "cross_mean" else 0.5 * math.log(ab * ba / (aa * bb)))
    return np.array(found)


@pytest.mark.parametrize("name", STATISTICS)
def test_a_sample_and_its_copy_are_no_pair_wherever_a_labelling_puts_them(name):
    scores = interference(np.random.default_rng(1), (), 9)
    labels = permutation.draw_labels(0, 4, 5, 1000)
    found = head_nulls(scores, labels, CONTENTS)[name].values
    np.testing.assert_allclose(found, slow_without_copies(name, scores, labels), rtol=1e-11)
    changed = scores.copy()
    for i, j in itertools.product(range(9), range(9)):
        if i != j and CONTENTS[i] == CONTENTS[j] != "":
            changed[i, j] = 1e6
    assert torch.equal(head_nulls(changed, labels, CONTENTS)[name].values, found)
    assert abs(head_nulls(scores, labels)[name].values - found).max() > 1e-3  # they would count


def test_copies_in_a_heatmap_take_no_part_in_tests_intervals_and_effects():
    rng = np.random.default_rng(3)
    contents = tuple(f"c{i}" for i in range(11))
    shared = (*contents[:5], contents[0], *contents[6:])  # the first of B is the first of A
    heatmap = heatmap_of(
        rng, samples_a=Samples(tuple("abcde"), shared[:5]), samples_b=Samples(tuple("fghijk"), shared[5:])
    )
    tests = QKOVStatistics(n_permutations=100)
    before = tests.test_heatmap(heatmap)
    for scores in heatmap.pooled.values():
        scores[..., 0, 5] *= 1e6
        scores[..., 5, 0] *= 1e6
    after = tests.test_heatmap(heatmap)
    for name, block in itertools.product(STATISTICS, BLOCKS):
        for key, array in before[name][block].items():
            np.testing.assert_array_equal(after[name][block][key], array, err_msg=key)


def test_one_file_under_two_names_is_not_contested():
    """With self-pairs between the tasks counted, every head was above its null."""
    rng = np.random.default_rng(0)
    once = interference(rng, (30,), 12)
    twice = np.tile(once, (1, 2, 2))
    contents = [f"c{i % 12}" for i in range(24)]
    plain, known = (QKOVStatistics(n_permutations=300).design(12, 12, contents=c) for c in (None, contents))
    assert (corrected(twice, plain)["p_value"] <= 0.1).mean() > 0.9
    assert (corrected(twice, known)["p_value"] > 0.1).all()


# ---- p-values


@pytest.mark.parametrize("alternative", ["greater", "less"])
@pytest.mark.parametrize("name", STATISTICS)
def test_exhaustive_p_equals_scipy(name, alternative):
    rng = np.random.default_rng(7)
    labels = permutation.draw_labels(0, 4, 5, 126)
    for _ in range(4):
        M = interference(rng, (), 9, scale=np.exp(rng.normal(size=9)))
        expected = stats.permutation_test(
            (np.arange(4), np.arange(4, 9)),
            lambda a, b, M=M: slow(name, M, a, b),
            n_resamples=np.inf,
            vectorized=False,
            alternative=alternative,
        )
        assert p_values(M, labels, alternative, name) == pytest.approx(expected.pvalue, abs=1e-12)


@pytest.mark.parametrize(("n_a", "n_b"), [(4, 4), (3, 5)])
@pytest.mark.parametrize("factor", [0.1, 1e-18, 1e15 / 3])
def test_ties_are_counted_as_in_exact_arithmetic(n_a, n_b, factor):
    """Small integers tie often; times ``factor`` they tie no more in floating point, were it not for the tolerance."""
    rng = np.random.default_rng(0)
    labels = permutation.draw_labels(0, n_a, n_b, 10_000)
    missed = 0
    for _ in range(10):
        whole = rng.integers(1, 4, size=(8, 8)).tolist()
        exact = {"cross_mean": [], "overlap": []}
        for a, b in groups(labels):
            ab, ba, aa, bb = (
                Fraction(sum(whole[i][j] for i in x for j in y if i != j)) for x, y in ((a, b), (b, a), (a, a), (b, b))
            )
            exact["cross_mean"].append(ab)
            exact["overlap"].append(ab * ba / (aa * bb))
        nulls = head_nulls(torch.tensor(whole, dtype=torch.float64) * factor, labels)
        for name, values in exact.items():
            expected = sum(value >= values[0] for value in values) / len(values)
            found = permutation.standardise(nulls[name])
            assert permutation.p_value(found, "greater").item() == expected
            exact_ties = found._replace(tolerance=0 * found.tolerance)
            missed += permutation.p_value(exact_ties, "greater").item() != expected
    assert missed  # without the tolerance


def test_swapped_tasks_have_the_same_overlap_so_that_no_p_is_below_two_labellings():
    scores = interference(np.random.default_rng(0), (200,), 6)
    p = p_values(scores, permutation.draw_labels(0, 3, 3, 20))
    assert p.min() == 2 / 20
    np.testing.assert_allclose(p * 10, np.round(p * 10), atol=1e-12)


def test_the_exact_mean_of_cross_mean_is_that_over_every_labelling_and_nearly_so_with_copies():
    scores = interference(np.random.default_rng(1), (3,), 9)
    every, drawn = (permutation.draw_labels(0, 4, 5, limit) for limit in (1000, 20))
    for contents, relative in ((None, 1e-12), (CONTENTS, 0.02)):
        null = head_nulls(scores, every, contents)["cross_mean"]
        exact = head_nulls(scores, drawn, contents)["cross_mean"].exact_mean
        sd = null.values.std(-1)
        assert null.exact_mean is None  # enumerated: the mean of its values is exact
        assert (abs(exact - null.values.mean(-1)) < relative * sd).all()
        assert head_nulls(scores, drawn, contents)["overlap"].exact_mean is None


def test_a_two_sided_p_of_cross_mean_moves_with_the_seed_no_more_than_its_own_count():
    """A count of K labellings has an sd of sqrt(p (1 - p) / K); a mean that is drawn too adds most of that again."""
    grad = np.random.default_rng(3).normal(size=(1, 24, 30))
    scores = grad @ grad.swapaxes(-1, -2)  # signed: their null is skewed, so that both of its tails do not even out
    exact, drawn = [], []
    for seed in range(300):
        null = head_nulls(scores, permutation.draw_labels(seed, 12, 12, 400))["cross_mean"]
        for found, of in ((exact, null), (drawn, replace(null, exact_mean=None))):
            found.append(permutation.p_value(permutation.standardise(of), "two-sided").item())
    p = np.mean(exact)
    assert 0.05 < p < 0.5
    assert np.std(exact) < 1.15 * math.sqrt(p * (1 - p) / 400)
    assert np.std(drawn) > 1.5 * np.std(exact)


# ---- the whole result


@pytest.mark.parametrize("alternative", ALTERNATIVES)
@pytest.mark.parametrize("num_permutations", [60, 1000])  # drawn; all 462
def test_all_numbers_equal_a_slow_implementation(alternative, num_permutations):
    heatmap = heatmap_of(np.random.default_rng(11))
    tests = QKOVStatistics(0.1, num_permutations, seed=5, alternative=alternative)
    result = tests.test_heatmap(heatmap)
    labels = permutation.draw_labels(5, 5, 6, num_permutations)
    assert labels.exhaustive is (num_permutations == 1000)
    for name in STATISTICS:
        nulls = {
            (block, layer, head): slow_null(name, heatmap.pooled[block][layer, head], labels)
            for block in BLOCKS
            for layer, head in np.ndindex(heatmap.pooled[block].shape[:2])
            if (block, layer, head) != ("Q", 1, 3)
        }
        means = {at: slow_mean(name, heatmap.pooled[at[0]][at[1:]], values, labels) for at, values in nulls.items()}
        largest = np.max([slow_z(values, alternative, means[at]) for at, values in nulls.items()], axis=0)
        for (block, layer, head), values in nulls.items():
            got = {key: array[layer, head] for key, array in result[name][block].items()}
            z = slow_z(values, alternative, means[block, layer, head])
            reference = values if labels.exhaustive else values[1:]
            mean = slow_mean(name, heatmap.pooled[block][layer, head], reference, labels)
            sd = np.sqrt(np.mean((reference - mean) ** 2))
            assert got["statistic"] == pytest.approx(values[0], rel=1e-10)
            assert got["p_value"] == pytest.approx(np.mean(z >= z[0] - 1e-9))
            for key, up in (("p_greater", slow_z(values, "greater")), ("p_less", slow_z(values, "less"))):
                assert got[key] == pytest.approx(np.mean(up >= up[0] - 1e-9)), key
            assert got["p_max"] == pytest.approx(np.mean(largest >= z[0] - 1e-9))
            assert got["p_max"] >= got["p_value"]
            assert got["effect_size"] == pytest.approx((values[0] - mean) / sd, rel=1e-9)
            assert got["detectable"] == pytest.approx(slow_detectable(reference - mean, alternative, 0.1), rel=1e-9)
            assert got["detectable_sd"] == pytest.approx(got["detectable"] / sd, rel=1e-9)
            assert got["null_mean"] == pytest.approx(mean, rel=1e-9)
            band = tuple(np.quantile(reference, [0.025, 0.975]))
            assert (got["null_low"], got["null_high"]) == pytest.approx(band, rel=1e-9)
            if layer == head == 0:
                scores = heatmap.pooled[block][layer, head]
                assert (got["ci_low"], got["ci_high"]) == pytest.approx(slow_interval(name, scores, 5), rel=1e-8)
        for block in BLOCKS:
            p = np.array([nulls_p for key, nulls_p in np.ndenumerate(result[name][block]["p_value"]) if nulls_p >= 0])
            for method, key in (("bh", "q_value"), ("by", "q_value_by")):
                q = result[name][block][key]
                np.testing.assert_allclose(q[np.isfinite(q)], slow_q(p, method), rtol=1e-12)


def slow_shift(M, a, b):
    """What unequal norms do to overlap, sample by sample, pair by pair."""
    M, total = np.asarray(M, np.float64), 0.0
    for own, other in ((a, b), (b, a)):
        left = {i: np.mean([M[i, k] for k in other]) for i in own}
        right = {i: np.mean([M[k, i] for k in other]) for i in own}
        pairs = [left[i] * right[j] for i in own for j in own if i != j]
        total += 0.5 * math.log(np.mean(pairs) / (np.mean(list(left.values())) * np.mean(list(right.values()))))
    return total


def slow_interval(name, M, n_a, confidence=0.95):
    """The delete-one jackknife by its definition: each sample taken out of the scores."""
    M, num = np.asarray(M, np.float64), len(M)

    def value(kept):
        a, b = ([i for i in kept if (i < n_a) is is_a] for is_a in (True, False))
        found = slow(name, M, a, b)
        return math.log(found) if name == "cross_mean" else found + slow_shift(M, a, b)

    theta = value(range(num))
    left_out = np.array([value([i for i in range(num) if i != out]) for out in range(num)])
    bias, variances = 0.0, []
    for own, other in ((slice(n_a), slice(n_a, num)), (slice(n_a, num), slice(n_a))):
        part, roles = left_out[own], (M[own, other].mean(1), M[other, own].mean(0))
        n, p = len(part), sum(means / means.sum() for means in roles) / 2
        bias += (n - 1) * (part.mean() - theta)
        factors = (1 - p) ** 2 / (1 - 2 * p + (p**2).sum()) if name == "overlap" else (n - 1) / n
        variances.append((factors * (part - part.mean()) ** 2).sum())
    (a, b), m = variances, num - n_a
    if name == "overlap":
        freedom = (a + b) ** 2 / (a**2 / (n_a + 1) + b**2 / (m + 1)) - 2
    else:
        freedom = (a + b) ** 2 / (a**2 / (n_a - 1) + b**2 / (m - 1))
    width = stats.t.ppf(0.5 + confidence / 2, freedom) * math.sqrt(a + b)
    if name == "overlap":
        return slow_ends(theta, width)
    return math.exp(theta - bias - width), math.exp(theta - bias + width)


def slow_ends(theta, width):
    """Where an overlap is as far from theta as its own variance allows, found by bisection on either side."""

    def excess(x):
        return (theta - x) ** 2 - width**2 * (1 + (min(abs(x / theta), 1) if theta else 1)) / 2

    return tuple(optimize.brentq(excess, theta, theta + 1.5 * turned, xtol=1e-14) for turned in (-width, width))


@pytest.mark.parametrize("theta", [0.0, 1e-9, 0.3, 0.5, 0.51, 0.6, 0.7, 0.71, 0.8, 1.5, 20.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_overlap_is_judged_by_the_variance_that_belongs_to_it(theta, sign):
    """``theta`` in full widths. Away from 0 an interval has its full width, towards 0 at least 0.71 of it."""
    left_out = torch.randn(1, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    part = torch.tensor([5 * [1 / 5] + 6 * [1 / 6]], dtype=torch.float64)
    width = jackknife._half_width(left_out, 5, 0.95, part)
    value = sign * theta * width
    low, high = jackknife._interval_of_overlap(value, left_out, part, 5, 0.95)
    assert (low.item(), high.item()) == pytest.approx(slow_ends(value.item(), width.item()), rel=1e-9, abs=1e-12)
    inner, outer = ((value - low) / width, (high - value) / width)[::sign]
    assert outer.item() == pytest.approx(1)
    assert 0.5**0.5 < inner.item() < 1 + 1e-12
    assert (low <= 0 <= high).item() is (theta < 0.5**0.5)  # 0 is judged by half the variance


def test_an_overlap_that_no_sample_moves_has_an_interval_of_no_width_and_an_absent_one_none():
    left_out = torch.tensor([0.0, 0.2, torch.nan], dtype=torch.float64).unsqueeze(-1).expand(3, 11)
    part = torch.full_like(left_out, 0.1).index_fill(1, torch.tensor([0, 5]), 0.5)
    low, high = jackknife._interval_of_overlap(left_out[:, 0], left_out, part, 5, 0.95)
    for end in (low, high):
        torch.testing.assert_close(end, left_out[:, 0], rtol=0, atol=1e-15, equal_nan=True)


def test_the_jackknife_of_samples_of_unequal_size_has_the_variance_of_their_weighted_mean():
    """In expectation, exactly: moves are linear in samples, so that their mean squares are sums of coefficients."""
    part = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05], dtype=torch.float64)
    left_out = (part.expand(5, 5) * (1 - torch.eye(5))) / (1 - part).unsqueeze(1)  # row i: weights without sample i
    of_moves = (left_out - part).square().sum(1)
    assert (jackknife._of_unequal(part) * of_moves).sum().item() == pytest.approx(part.square().sum().item(), rel=1e-12)
    assert 4 / 5 * of_moves.sum() > 1.06 * part.square().sum()  # as of samples alike
    alike = jackknife._of_unequal(torch.full((5,), 0.2, dtype=torch.float64))
    torch.testing.assert_close(alike, torch.full_like(alike, 4 / 5), rtol=1e-12, atol=0)
    assert jackknife._of_unequal(torch.tensor([1.0, 0.0])).tolist() == [1.0, 0.5]


def test_shares_of_a_task_are_those_of_means_with_the_other():
    """In both roles; copies make no pair, and where all scores are 0 all samples are alike."""
    rng = np.random.default_rng(8)
    scores, pairs = rng.random((2, 7, 7)), different(7).clone()
    scores[1] = 0.0
    pairs[1, 5] = pairs[5, 1] = False
    *_, rows, columns = loud_samples.shift(torch.from_numpy(scores), pairs, 3)
    counted = np.where(pairs.numpy(), scores[0], np.nan)
    for found, of in ((rows, counted), (columns, counted.T)):
        for own, other in ((slice(0, 3), slice(3, 7)), (slice(3, 7), slice(0, 3))):
            means = np.nanmean(of[own, other], axis=1)
            np.testing.assert_allclose(found[0, own].numpy(), means / means.sum(), rtol=1e-12)
            np.testing.assert_allclose(found[1, own].numpy(), 1 / len(means))


def test_overlap_of_scores_that_differ_by_norms_alone_is_zero_once_it_is_freed_of_them():
    """Loud samples alone make overlap positive; copies within and across tasks are left out like other self-pairs."""
    rng = np.random.default_rng(5)
    scores = np.exp(rng.normal(size=(3, 11, 1)) + rng.normal(size=(3, 1, 11)) + rng.normal(size=(3, 1, 1)))
    pairs = different(11).clone()
    for i, j in ((1, 3), (2, 8)):
        pairs[i, j] = pairs[j, i] = False
    scores[:] = np.exp(2 * np.log(scores.diagonal(axis1=1, axis2=2)[:, :, None]) + np.log(scores))  # in both roles
    labels = permutation.draw_labels(0, 5, 6, 30)
    nulls = permutation.head_nulls(torch.from_numpy(scores), labels, pairs, permutation.pair_counts(labels, pairs))
    found = loud_samples.shift(torch.from_numpy(scores), pairs, 5)
    raw = nulls["overlap"].values[:, 0]
    assert (raw.abs() > 0.1).all()
    a, b = list(range(5)), list(range(5, 11))
    for head in range(3):
        plain = loud_samples.shift(torch.from_numpy(scores[head : head + 1]), different(11), 5)
        assert slow("overlap", scores[head], a, b) + plain.whole.item() == pytest.approx(0, abs=1e-12)
    kept = [i for i in range(11) if i != 8]  # without the copy of 2 in B
    fewer = loud_samples.shift(torch.from_numpy(scores[:, kept][:, :, kept]), pairs[kept][:, kept], 5)
    torch.testing.assert_close(found.left_out[:, 8], fewer.whole, rtol=1e-12, atol=0)


def test_the_interval_of_an_effect_size_is_that_of_its_distance_from_the_null_without_each_sample():
    n_a, labels = 5, permutation.draw_labels(0, 5, 6, 60)
    scores = interference(np.random.default_rng(2), (2,), 11)
    pairs = different(11)
    for name in STATISTICS:
        effect, _ = permutation.effect_size(head_nulls(scores, labels)[name], labels.exhaustive)
        effects = dict.fromkeys(STATISTICS, effect)
        shared = jackknife.LeftOut.of(labels, pairs)
        _, (low, high) = jackknife.intervals(torch.from_numpy(scores), shared, effects, 0.9)[name]
        for head in range(2):
            left_out = []
            for out in range(11):
                values = np.array(
                    [
                        slow(name, scores[head], *([i for i in part if i != out] for part in pair))
                        for pair in groups(labels)
                    ]
                )
                kept = [i for i in range(11) if i != out]
                mean = slow_mean(name, scores[head][np.ix_(kept, kept)], values[1:], labels)
                left_out.append((values[0] - mean) / np.sqrt(np.mean((values[1:] - mean) ** 2)))
            parts = np.array(left_out[:n_a]), np.array(left_out[n_a:])
            variances = [(len(part) - 1) ** 2 / len(part) * part.var(ddof=1) for part in parts]
            freedom = sum(variances) ** 2 / sum(v**2 / (len(p) - 1) for v, p in zip(variances, parts, strict=True))
            width = stats.t.ppf(0.95, freedom) * math.sqrt(sum(variances))
            assert low[head].item() == pytest.approx(effect[head].item() - width, rel=1e-8)
            assert high[head].item() == pytest.approx(effect[head].item() + width, rel=1e-8)


def test_the_null_is_looked_at_under_some_of_the_labellings_without_each_sample():
    labels = permutation.draw_labels(0, 10, 10, 1000)
    some = jackknife.LeftOut.of(labels, different(20)).a
    assert some.shape == (20, 1 + jackknife.LABELLINGS)
    assert torch.equal(some[:, 0], labels.a[:, 0])
    assert len({tuple(column) for column in some.T.tolist()}) > jackknife.LABELLINGS - 5
    few = permutation.draw_labels(0, 3, 3, 30)
    assert torch.equal(jackknife.LeftOut.of(few, different(6)).a, few.a)


def slow_detectable(up, alternative, alpha):
    if alternative == "two-sided":
        critical = np.quantile(abs(up), 1 - alpha)
        return max(critical - np.quantile(up, 0.2), critical + np.quantile(up, 0.8))
    up = up if alternative == "greater" else -up
    return np.quantile(up, 1 - alpha) - np.quantile(up, 0.2)


def slow_q(p, method):
    """The step-up procedure by its definition."""
    ordered = sorted(p)
    factor = sum(1 / k for k in range(1, len(p) + 1)) if method == "by" else 1.0
    scaled = [min(1.0, factor * value * len(p) / (rank + 1)) for rank, value in enumerate(ordered)]
    return [min(s for value, s in zip(ordered, scaled, strict=True) if value >= own) for own in p]


def test_absent_heads_stay_nan_and_change_nothing_else():
    heatmap = heatmap_of(np.random.default_rng(2))
    padded = {
        block: np.concatenate([scores, np.full((2, 3, 11, 11), np.nan, np.float32)], axis=1)
        for block, scores in heatmap.pooled.items()
    }
    tests = QKOVStatistics(n_permutations=50)
    lean = tests.test_heatmap(heatmap)
    wide = tests.test_heatmap(replace(heatmap, pooled=padded, heads=(*range(7),), kv_heads=(*range(5),)))
    for name, block in itertools.product(STATISTICS, BLOCKS):
        for key, array in wide[name][block].items():
            np.testing.assert_allclose(array[:, :-3], lean[name][block][key], rtol=1e-12)
            assert np.isnan(array[:, -3:]).all()
    assert np.isnan(lean["overlap"]["Q"]["p_value"][1, 3])
    assert np.isfinite(lean["overlap"]["Q"]["p_value"]).sum() == 7
    assert not any(wide["undefined"].values())


def test_ranks_that_hold_different_heads_agree_with_one_process():
    scores = torch.from_numpy(interference(np.random.default_rng(4), (7,), 10))
    design = QKOVStatistics(n_permutations=80).design(4, 6)
    expected = corrected(scores, design)
    parts = [head_tests.head_tests({"Q": part}, design) for part in (scores[:1], scores[1:5], scores[5:])]
    max_z = head_tests.largest(max_z for _, max_z in parts)
    together = head_tests.correct(head_tests.join([tests["Q"]["overlap"] for tests, _ in parts]), max_z["overlap"])
    for key, array in expected.items():
        np.testing.assert_allclose(together[key], array, rtol=1e-10)
    own_only = np.concatenate([head_tests.correct(x["Q"]["overlap"], own["overlap"])["p_max"] for x, own in parts])
    assert (own_only < expected["p_max"]).any()  # a rank's own maximum would not do


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("score", ["interference", "signed"])
def test_layers_tested_by_several_ranks_and_joined_are_bit_for_bit_those_of_one_process(score, num_ranks):
    """Layers are dealt out, sent as JSON text and joined; the third rank has none."""
    heatmap = heatmap_of(np.random.default_rng(8))
    heatmap.attributes["score"] = score
    heatmap.pooled["O"][0, 2] = 0.0  # no overlap
    tests = QKOVStatistics(n_permutations=90)
    expected = tests.test_heatmap(heatmap)
    sent = []
    for rank in range(num_ranks):
        places = range(rank, len(heatmap.layers), 2 if num_ranks > 1 else 1) if rank < 2 else ()
        sent.append(json.dumps(layers_tested(heatmap, tests, places).to_json()))
        assert json.loads(sent[-1])["max_z"].keys() == (set(expected.arrays()) if places else set())
    joined = LayerTests.joined(LayerTests.from_json(json.loads(text)) for text in sent)
    frame = SimpleNamespace(
        layers=heatmap.layers, natives=heatmap.natives, present=heatmap.present, attributes=heatmap.attributes
    )
    result = tests.results(frame, tests.design(5, 6, tests.names(score)), joined)
    assert {k: v for k, v in result.items() if k not in STATISTICS} == {
        k: v for k, v in expected.items() if k not in STATISTICS
    }
    for name, blocks in expected.arrays().items():
        assert list(result[name]) == list(blocks)
        for block, arrays in blocks.items():
            for key, array in arrays.items():
                np.testing.assert_array_equal(result[name][block][key], array, err_msg=f"{name} {block} {key}")


def layers_tested(heatmap, tests, places):
    """What a rank that holds these layers has of them."""
    names = tests.names(heatmap.attributes["score"])
    design = tests.design(len(heatmap.samples_a.ids), len(heatmap.samples_b.ids), names)
    ids = (*heatmap.samples_a.ids, *heatmap.samples_b.ids)
    parts = []
    for place in places:
        scores = {block: torch.from_numpy(pooled[place]) for block, pooled in heatmap.pooled.items()}
        heads = {block: heatmap.natives(block) for block in scores}
        parts.append(one_layer_tested(design, heatmap.layers[place], scores, heads, ids))
    return LayerTests.joined(parts)


def one_layer_tested(*layer):
    with head_tests.threads_that_test() as submit:
        return head_tests.layer_tests(submit, *layer)()


def test_every_present_head_is_tested_once():
    heatmap = heatmap_of(np.random.default_rng(8))
    tests = QKOVStatistics(n_permutations=20)
    first, both = layers_tested(heatmap, tests, [0]), layers_tested(heatmap, tests, [0, 1])
    with pytest.raises(QkovError, match="layer 3, block Q, head 0: expected one test, got two"):
        LayerTests.joined([first, both])
    with pytest.raises(QkovError, match="layer 7, block Q, head 0: expected a test of every present head, got none"):
        tests.results(heatmap, tests.design(5, 6), first)
    heads, statistics = both.layers[7]["K"]
    beheaded = {**both.layers, 7: {**both.layers[7], "K": layer_tests.BlockTests(heads[:1], first_head(statistics))}}
    with pytest.raises(QkovError, match="layer 7, block K, head 2"):
        tests.results(heatmap, tests.design(5, 6), replace(both, layers=beheaded))


def first_head(statistics):
    return {
        name: head_tests.HeadTests({k: array[:1] for k, array in made.arrays.items()}, made.threshold[:1])
        for name, made in statistics.items()
    }


def test_heads_of_one_layer_may_be_tested_by_different_ranks():
    """In any order, one rank without any head of K and V, none with the absent head."""
    heatmap = heatmap_of(np.random.default_rng(8))
    tests = QKOVStatistics(n_permutations=90)
    expected = tests.test_heatmap(heatmap)
    design, ids = tests.design(5, 6), (*heatmap.samples_a.ids, *heatmap.samples_b.ids)
    parts = []
    for place, layer in enumerate(heatmap.layers):
        for at in ([3, 2], [1, 0]):
            scores, heads = {}, {}
            for block, pooled in heatmap.pooled.items():
                mine = [x for x in at if x < len(pooled[place]) and not np.isnan(pooled[place][x]).any()]
                scores[block] = torch.from_numpy(pooled[place][mine])
                heads[block] = [heatmap.natives(block)[x] for x in mine]
            parts.append(one_layer_tested(design, layer, scores, heads, ids))
    result = tests.results(heatmap, design, LayerTests.joined(parts))
    for name, blocks in expected.arrays().items():
        for block, arrays in blocks.items():
            for key, array in arrays.items():
                np.testing.assert_allclose(result[name][block][key], array, rtol=1e-9, err_msg=f"{name} {block} {key}")


def test_numbers_that_are_not_finite_survive_json():
    arrays = {"ci_low": np.array([np.nan, 0.1]), "detectable": np.array([np.inf, 1e-310])}
    made = head_tests.HeadTests(arrays, np.array([-np.inf, np.nextafter(1, 2)]))
    back = head_tests.HeadTests.from_json(json.loads(json.dumps(made.to_json())))
    for key, array in arrays.items():
        np.testing.assert_array_equal(back.arrays[key], array)
    np.testing.assert_array_equal(back.threshold, made.threshold)


def corrected(scores, design, name="overlap"):
    """The corrected tests of these heads alone."""
    tests, max_z = head_tests.head_tests({"Q": torch.as_tensor(scores)}, design)
    return head_tests.correct(tests["Q"][name], max_z[name])


def test_chunks_change_nothing(monkeypatch):
    scores = torch.from_numpy(interference(np.random.default_rng(4), (5,), 9))
    design = QKOVStatistics(n_permutations=30).design(4, 5)
    whole = corrected(scores, design)
    monkeypatch.setattr(head_tests, "_CHUNK_BYTES", 3 * 8 * 31)  # three heads at a time, of which first two
    monkeypatch.setattr(pair_sums, "_CACHED_BYTES", 2 * 8 * 9 * 31)
    monkeypatch.setattr(pair_sums, "_ROWS", 2)
    for key, array in corrected(scores, design).items():
        np.testing.assert_allclose(array, whole[key], rtol=1e-10)


def test_the_number_of_threads_changes_no_bit_and_stays_as_it_was(monkeypatch):
    scores = torch.from_numpy(interference(np.random.default_rng(4), (7,), 9))
    design = QKOVStatistics(n_permutations=30).design(4, 5)
    monkeypatch.setattr(head_tests, "_CHUNK_BYTES", 2 * 8 * 31)  # two heads at a time
    one = corrected(scores, design)
    torch.set_num_threads(3)
    for key, array in corrected(scores, design).items():
        np.testing.assert_array_equal(array, one[key], err_msg=key)
    assert threads_of_new_threads() == 3
    with pytest.raises(RuntimeError, match="size of tensor"):
        head_tests.head_tests({"Q": scores[:, 1:, 1:]}, design)
    assert threads_of_new_threads() == 3


def threads_of_new_threads():
    """How many cores torch takes in a thread that starts now, as those of its backward passes do."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def conflict_heatmap(rng, n=12, **changes):
    """Two tasks of equal scale that press on each other more than on themselves in Q of layer 7, heads 1 and 5."""
    heatmap = heatmap_of(
        rng, samples_a=Samples(tuple(f"a{i}" for i in range(n))), samples_b=Samples(tuple(f"b{i}" for i in range(n)))
    )
    pooled = {block: interference(rng, (2, 2 if block in "KV" else 4), 2 * n) for block in BLOCKS}
    side = np.arange(2 * n) < n
    pooled["Q"][1, 1] *= np.where(side[:, None] != side, 3.0, 1.0)
    pooled["Q"][1, 2] *= np.where(side[:, None] != side, 2.0, 1.0)
    return replace(heatmap, pooled=pooled, **changes)


def test_records_name_the_heads_in_conflict_by_the_models_numbers():
    heatmap = conflict_heatmap(np.random.default_rng(0))
    result = QKOVStatistics(n_permutations=300).test_heatmap(heatmap)
    found = result["fdr_corrected"]
    assert [(r["block"], r["layer"], r["head"]) for r in found["Q"]] == [("Q", 7, 1), ("Q", 7, 5)]
    arrays = result["overlap"]["Q"]
    for record, head in zip(found["Q"], (1, 2), strict=True):
        assert record["statistic"] == "overlap"
        assert record["value"] == arrays["statistic"][1, head]
        for key in ("p_value", "q_value", "q_value_by", "p_max", "effect_size"):
            assert record[key] == arrays[key][1, head]
        assert record["q_value"] <= 0.05
        assert record["direction"] == "above"
    assert found["Q"][0]["effect_size"] > found["Q"][1]["effect_size"]  # equal q and p: the clearer one first
    assert found["K"] == found["V"] == found["O"] == []
    by_mean = QKOVStatistics(n_permutations=300, statistic="cross_mean").test_heatmap(heatmap)
    assert by_mean["fdr_corrected"]["Q"][0]["statistic"] == "cross_mean"


def test_heads_are_found_on_both_sides_of_their_null_and_the_direction_says_on_which():
    """Q of layer 7, head 5 is made to lie below: there the tasks press on each other half as much as on themselves."""
    heatmap = conflict_heatmap(np.random.default_rng(0))
    side = np.arange(24) < 12
    heatmap.pooled["Q"][1, 2] *= np.where(side[:, None] != side, 0.25, 1.0)  # was doubled
    found = QKOVStatistics(n_permutations=300).test_heatmap(heatmap)
    assert {r["head"]: r["direction"] for r in found["fdr_corrected"]["Q"]} == {1: "above", 5: "below"}
    for record in found["fdr_corrected"]["Q"]:
        place = (1, heatmap.heads.index(record["head"]))
        scores, labels = heatmap.pooled["Q"][place], permutation.draw_labels(0, 12, 12, 300)
        null = slow_null("overlap", scores, labels)
        assert record["direction"] == ("above" if null[0] > null[1:].mean() else "below")
        assert np.sign(record["effect_size"]) == (1 if record["direction"] == "above" else -1)
        small, large = ("p_greater", "p_less") if record["direction"] == "above" else ("p_less", "p_greater")
        arrays = found["overlap"]["Q"]
        assert arrays[small][place] == 1 / 301
        assert arrays[large][place] == 1.0
    for alternative, heads in (("greater", [1]), ("less", [5])):
        one_sided = QKOVStatistics(n_permutations=300, alternative=alternative).test_heatmap(heatmap)
        assert [r["head"] for r in one_sided["fdr_corrected"]["Q"]] == heads
        key = f"p_{alternative}"
        np.testing.assert_array_equal(one_sided["overlap"]["Q"]["p_value"], one_sided["overlap"]["Q"][key])
        np.testing.assert_array_equal(found["overlap"]["Q"][key], one_sided["overlap"]["Q"][key])


def signed_heatmap(rng, cosine):
    """Two tasks whose mean gradients in Q of layer 3, head 0 have this cosine; all other heads' are of pure noise."""
    heatmap = conflict_heatmap(rng)
    task_a, ortho = np.linalg.qr(rng.normal(size=(30, 2)))[0].T
    means = np.stack([task_a, cosine * task_a + math.sqrt(1 - cosine**2) * ortho]).repeat(12, axis=0)
    pooled = {}
    for block in BLOCKS:
        grad = rng.normal(size=(2, 2 if block in "KV" else 4, 24, 30))
        if block == "Q":
            grad[0, 0] += 4 * means
        pooled[block] = grad @ grad.swapaxes(-1, -2)
    return replace(heatmap, pooled=pooled, attributes=heatmap.attributes | {"score": "signed"})


@pytest.mark.parametrize("cosine", [-0.9, 0.5, 1.0])
def test_signed_scores_below_their_null_are_in_conflict_only_where_they_are_negative(cosine):
    result = QKOVStatistics(n_permutations=400).test_heatmap(signed_heatmap(np.random.default_rng(0), cosine))
    found = [(r["layer"], r["head"], r["direction"], np.sign(r["value"])) for r in result["fdr_corrected"]["Q"]]
    assert found == ([] if cosine == 1.0 else [(3, 0, "below", np.sign(cosine))])


def test_arrays_are_ready_to_be_stored():
    heatmap = conflict_heatmap(np.random.default_rng(0))
    result = QKOVStatistics(n_permutations=30).test_heatmap(heatmap)
    tree = result.arrays()
    assert set(tree) == set(STATISTICS)
    for name, block in itertools.product(STATISTICS, BLOCKS):
        assert set(tree[name][block]) == {
            *("statistic", "p_value", "p_greater", "p_less", "q_value", "q_value_by", "p_max", "effect_size"),
            *("null_mean", "null_low", "null_high", "ci_low", "ci_high", "effect_low", "effect_high"),
            *("detectable", "detectable_sd"),
        }
        for array in tree[name][block].values():
            assert array.shape == (2, 2 if block in "KV" else 4)
            assert array.dtype == np.float64


def test_all_but_the_arrays_can_be_stored_as_json():
    result = QKOVStatistics(n_permutations=300).test_heatmap(conflict_heatmap(np.random.default_rng(0)))
    others = {key: value for key, value in result.items() if key not in STATISTICS}
    assert json.loads(json.dumps(others, allow_nan=False))["fdr_corrected"] == result["fdr_corrected"]


def test_signed_scores_have_no_overlap():
    heatmap = heatmap_of(np.random.default_rng(0))
    pooled = {block: scores - np.nanmean(scores) for block, scores in heatmap.pooled.items()}
    heatmap = replace(heatmap, pooled=pooled, attributes=heatmap.attributes | {"score": "signed"})
    result = QKOVStatistics(n_permutations=40).test_heatmap(heatmap)
    assert set(result.arrays()) == {"cross_mean"}
    assert result["settings"]["statistic"] == "cross_mean"
    assert result["cross_mean"]["Q"]["statistic"][0, 0] == pytest.approx(pooled["Q"][0, 0, :5, 5:].mean(), rel=1e-5)
    with pytest.raises(QkovError, match="cross_mean for signed scores"):
        QKOVStatistics(statistic="overlap").test_heatmap(heatmap)


def test_settings_say_how_the_labels_were_tested():
    heatmap = heatmap_of(np.random.default_rng(0))
    drawn = QKOVStatistics(n_permutations=461, seed=9).test_heatmap(heatmap)["settings"]
    assert (drawn["method"], drawn["n_labellings"], drawn["seed"]) == ("monte-carlo", 462, 9)
    every = QKOVStatistics(n_permutations=462).test_heatmap(heatmap)["settings"]
    assert (every["method"], every["n_labellings"], every["smallest_p"]) == ("exhaustive", 462, 1 / 462)
    assert every["exactly_exchangeable"] is True


@pytest.mark.parametrize(
    ("estimator", "scope", "told"),
    [
        ("ema", "pooled", "nearly, not exactly"),
        ("mean", "a", r"With fisher.scope: a .* cross_mean are not valid: .*18 to 42% \(two-sided\)"),
        ("ema", "b", r"With fisher.scope: b .* cross_mean are not valid: .*23 to 24% \(greater\)"),
    ],
)
def test_labels_that_are_not_exactly_exchangeable_are_said_to_be_so(estimator, scope, told):
    heatmap = heatmap_of(np.random.default_rng(0))
    heatmap.attributes |= {"estimator": estimator, "scope": scope}
    result = QKOVStatistics(n_permutations=200).test_heatmap(heatmap)
    assert result["settings"]["exactly_exchangeable"] is False
    assert re.search(told, result["notes"][0])
    assert len(result["notes"]) == 2
    assert result["notes"][1].startswith("Intervals take the Fisher as given. That of the 11 samples")


def test_too_few_labellings_for_one_head_are_noted():
    heatmap = heatmap_of(np.random.default_rng(0))
    few = QKOVStatistics(n_permutations=100).test_heatmap(heatmap)
    assert "single head among 8" in few["notes"][0]
    assert "statistics.permutations: 160" in few["notes"][0]
    assert QKOVStatistics(n_permutations=160).test_heatmap(heatmap)["notes"] == few["notes"][1:]


# ---- heads without a test


def test_a_head_without_scores_is_present_but_never_significant():
    heatmap = heatmap_of(np.random.default_rng(0))
    heatmap.pooled["O"][0, 2] = 0.0  # an ablated head
    result = QKOVStatistics(n_permutations=60, alternative="two-sided").test_heatmap(heatmap)
    mean = {key: array[0, 2] for key, array in result["cross_mean"]["O"].items()}
    assert (mean["statistic"], mean["p_value"], mean["p_max"], mean["effect_size"]) == (0, 1, 1, 0)
    assert np.isnan(mean["detectable"])
    assert result["undefined"]["O"] == [(3, 5)]
    assert all(np.isnan(array[0, 2]) for array in result["overlap"]["O"].values())
    assert "1 heads have no overlap" in result["notes"][-2]


def test_an_overlap_is_left_out_by_a_rule_that_does_not_know_the_observed_labelling():
    """Three samples of nine have scores: some labellings leave a task none, though the observed one does not."""
    scores = interference(np.random.default_rng(0), (), 9)
    silent = [1, 2, 3, 6, 7, 8]
    scores[silent], scores[:, silent] = 0.0, 0.0
    scores[1, 2] = scores[6, 7] = 1.0
    labels = permutation.draw_labels(0, 4, 5, 126)
    assert np.isfinite(slow("overlap", scores, range(4), range(4, 9)))
    assert head_nulls(scores, labels)["overlap"].values.isnan().all()


def test_the_remainder_of_a_difference_is_not_taken_for_a_score():
    scores = interference(np.random.default_rng(0), (50,), 9)
    scores[:, 4:, 4:] = 0.0  # b'Mb is 0, but 1e-16 of the total when taken as a difference
    labels = permutation.draw_labels(0, 4, 5, 126)
    observed = replace(labels, a=labels.a[:, :1])
    assert head_nulls(scores, observed)["overlap"].values.isnan().all()


def test_a_head_that_no_relabelling_changes_has_p_one():
    flat = np.full((1, 9, 9), 0.1)
    labels = permutation.draw_labels(0, 4, 5, 50)
    for name, alternative in itertools.product(STATISTICS, ALTERNATIVES):
        assert p_values(flat, labels, alternative, name).tolist() == [1.0]


def test_two_samples_a_task_allow_a_test_but_no_interval():
    heatmap = conflict_heatmap(np.random.default_rng(0), n=2)
    result = QKOVStatistics().test_heatmap(heatmap)
    arrays = result["overlap"]["Q"]
    assert result["settings"]["n_labellings"] == 6
    assert np.isfinite(arrays["p_value"]).all()
    assert np.isnan(arrays["ci_low"]).all()
    assert np.isinf(arrays["detectable"]).all()  # the smallest p, 1/6, is above 0.05
    assert result["fdr_corrected"]["Q"] == []


# ---- errors


def test_scores_between_the_tasks_alone_are_refused():
    with pytest.raises(QkovError, match=r'pairs="all".*statistics\.enabled: true'):
        QKOVStatistics().test_heatmap(FakeHeatmap(None))


@pytest.mark.parametrize("task", ["a", "b"])
def test_one_sample_is_refused(task):
    heatmap = replace(heatmap_of(np.random.default_rng(0)), **{f"samples_{task}": Samples(("only",))})
    with pytest.raises(QkovError, match=f"task {task}: expected at least 2 samples, got 1"):
        QKOVStatistics().test_heatmap(heatmap)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_present_head_with_a_score_that_is_not_finite_is_refused(value):
    heatmap = heatmap_of(np.random.default_rng(0))
    heatmap.pooled["V"][1, 1, 2, 6] = value
    with pytest.raises(QkovError, match="layer 7, block V, head 2, samples 'a2' and 'b1': expected a finite score"):
        QKOVStatistics().test_heatmap(heatmap)


@pytest.mark.parametrize(
    "setting",
    [
        {"fdr_alpha": 0.0},
        {"n_permutations": 1},
        {"confidence": 1.0},
        {"seed": -1},
        {"alternative": "both"},
        {"statistic": "mean"},
    ],
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(QkovError, match=f"statistics.{next(iter(setting))}: expected"):
        QKOVStatistics(**setting)


def test_stored_and_read_only_scores_are_taken_as_they_are():
    heatmap = heatmap_of(np.random.default_rng(0))
    tests = QKOVStatistics(n_permutations=30)
    expected = tests.test_heatmap(heatmap)
    as_tensors = replace(heatmap, pooled={b: torch.from_numpy(s.copy()) for b, s in heatmap.pooled.items()})
    for scores in heatmap.pooled.values():
        scores.flags.writeable = False
    for same in (heatmap, as_tensors):
        np.testing.assert_array_equal(
            tests.test_heatmap(same)["overlap"]["Q"]["p_value"], expected["overlap"]["Q"]["p_value"]
        )


# ---- calibration: "heads" below are independent repetitions of an experiment


@pytest.mark.parametrize("alternative", ALTERNATIVES)
@pytest.mark.parametrize("name", STATISTICS)
def test_p_is_uniform_when_labels_are_exchangeable(name, alternative):
    rng = np.random.default_rng(12)
    scores = np.stack([interference(rng, (), 24) for _ in range(600)])
    p = p_values(scores, permutation.draw_labels(0, 10, 14, 199), alternative, name)
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert np.mean(p <= 0.05) == pytest.approx(0.05, abs=0.03)  # 3.4 standard errors


@pytest.mark.long
def test_family_wise_error_is_at_its_level_with_correlated_heads():
    rng = np.random.default_rng(3)
    design = QKOVStatistics(n_permutations=99).design(8, 8)
    wrong, uncorrected = 0, 0
    for _ in range(250):
        scores = torch.from_numpy(interference(rng, (12,), 16, scale=np.exp(0.5 * rng.normal(size=16))))
        arrays = corrected(scores, design)
        wrong += (arrays["p_max"] <= 0.05).any()
        uncorrected += (arrays["p_value"] <= 0.05).any()
    assert wrong / 250 < 0.05 + 3 * 0.0138
    assert wrong  # it does reject
    assert uncorrected / 250 > 0.25


@pytest.mark.long
def test_false_discoveries_are_at_their_level_and_true_ones_are_found():
    rng = np.random.default_rng(5)
    design = QKOVStatistics(n_permutations=999).design(12, 12)
    side = np.arange(24) < 12
    false_share, power = [], []
    for _ in range(40):
        scores = interference(rng, (30,), 24)
        scores[:10] *= np.where(side[:, None] != side, 1.3, 1.0)
        found = corrected(scores, design)["q_value"] <= 0.1
        false_share.append(found[10:].sum() / max(found.sum(), 1))
        power.append(found[:10].mean())
    assert np.mean(false_share) < 0.1
    assert np.mean(false_share) > 0  # a level, not a wall
    assert np.mean(power) > 0.8


def test_detectable_effect_is_found_with_the_stated_power():
    rng = np.random.default_rng(0)
    labels = permutation.draw_labels(0, 40, 40, 4000)
    normal = permutation.Null(torch.from_numpy(rng.normal(5.0, 2.0, size=(1, 4001))), torch.zeros(1))
    shift = permutation.detectable_shift(normal, permutation.in_order(normal, False), labels, "greater", 0.05, 0.8)
    assert shift.item() / 2 == pytest.approx(stats.norm.ppf(0.95) + stats.norm.ppf(0.8), abs=0.1)

    skew = rng.gamma(1.0, size=(1, 4001))
    for alternative, sign in (("greater", 1), ("less", -1)):
        null = permutation.Null(torch.from_numpy(skew), torch.zeros(1))
        ordered = permutation.in_order(null, exhaustive=False)
        shift = sign * permutation.detectable_shift(null, ordered, labels, alternative, 0.05, 0.8).item()
        observed = skew[0] + shift
        tail = [np.mean(sign * skew[0] >= sign * value) for value in observed]
        assert np.mean(np.array(tail) <= 0.05) == pytest.approx(0.8, abs=0.01)


# ---- what would be no test


def test_permuting_rows_before_averaging_over_all_pairs_changes_nothing():
    scores = interference(np.random.default_rng(0), (), 20)
    cross = scores[:8, 8:]
    rng = np.random.default_rng(1)
    row_permuted = [rng.permutation(cross, axis=0).mean() for _ in range(50)]
    assert np.ptp(row_permuted) < 1e-12 * cross.mean()
    relabelled = head_nulls(scores, permutation.draw_labels(0, 8, 12, 50))["cross_mean"]
    assert relabelled.values.std() > 1e-2 * cross.mean()


def test_a_z_test_of_scores_against_zero_rejects_what_is_exchangeable():
    scores = np.stack([interference(np.random.default_rng(i), (), 20) for i in range(30)])
    against_zero = stats.ttest_1samp(scores[:, :10, 10:].reshape(30, -1), 0.0, axis=1, alternative="greater").pvalue
    assert (against_zero < 1e-6).all()
    assert np.mean(p_values(scores, permutation.draw_labels(0, 10, 10, 199)) <= 0.05) < 0.2


def test_treating_pairs_as_independent_rejects_far_too_often():
    rng = np.random.default_rng(0)
    scores = np.stack([interference(rng, (), 20, scale=np.exp(0.5 * rng.normal(size=20))) for _ in range(100)])
    off = ~np.eye(10, dtype=bool)
    by_pairs = [stats.ttest_ind(M[:10, 10:].ravel(), M[:10, :10][off]).pvalue for M in scores]
    by_samples = p_values(scores, permutation.draw_labels(0, 10, 10, 199), "two-sided", "cross_mean")
    assert np.mean(np.array(by_pairs) <= 0.05) > 0.2
    assert np.mean(by_samples <= 0.05) < 0.13


def test_self_pairs_would_hide_a_conflict():
    """A sample presses on itself most; counted within a task, that passes for overlap within tasks."""
    rng = np.random.default_rng(0)
    M = interference(rng, (), 20)
    within = [np.mean(M[:10, :10]), np.mean(M[10:, 10:])]
    with_self = 0.5 * math.log(M[:10, 10:].mean() * M[10:, :10].mean() / (within[0] * within[1]))
    assert with_self < slow("overlap", M, range(10), range(10, 20)) - 0.02


def test_repeats_of_kv_heads_would_change_the_correction():
    p = np.array([0.01, 0.03, 0.2, 0.5])
    native = stats.false_discovery_control(p, method="by")
    repeated = stats.false_discovery_control(np.repeat(p, 4), method="by")[::4]
    assert abs(native - repeated).max() > 0.01
    np.testing.assert_allclose(head_tests.q_values(p, "by"), native)


def test_heads_of_large_scores_would_own_an_unstandardised_maximum():
    rng = np.random.default_rng(0)
    side = np.arange(24) < 12
    scores = interference(rng, (10,), 24)
    scores[0] *= 1e6
    scores[1] *= np.where(side[:, None] != side, 2.0, 1.0)
    design = QKOVStatistics(n_permutations=199, alternative="greater").design(12, 12)
    assert corrected(scores, design, "cross_mean")["p_max"][1] == 1 / 200
    values = head_nulls(scores, design.labels)["cross_mean"].values
    raw = (values - values.mean(-1, keepdim=True)).amax(0)
    assert (raw >= (values - values.mean(-1, keepdim=True))[1, 0]).double().mean() > 0.3


@pytest.mark.parametrize(("ratio", "rejects"), [(1.6, True), (3.0, False)])
def test_cross_mean_finds_gradient_scale_where_overlap_finds_nothing(ratio, rejects):
    """Between 1 and 1 + sqrt(2): the reason why overlap decides by default."""
    rng = np.random.default_rng(0)
    scale = np.where(np.arange(60) < 30, ratio, 1.0)
    scores = np.stack([interference(rng, (), 60, scale=scale) for _ in range(60)])
    labels = permutation.draw_labels(0, 30, 30, 199)
    assert bool(np.mean(p_values(scores, labels, name="cross_mean") <= 0.05) > 0.25) is rejects
    assert np.mean(p_values(scores, labels, name="overlap") <= 0.05) <= 0.05
