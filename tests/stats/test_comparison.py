"""Comparisons against what defines them: samples left out one by one, scipy, known changes, halves of one task."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from heatmaps import ATTRIBUTES, make_heatmap, make_table
from influences import heatmap_with_effects, with_made_effects
from samples import padded
from scipy.stats import spearmanr, ttest_rel
from zoo import TINY, VOCAB

from qkov_dist import FisherCollector, QKOVConfig, QkovError, QKOVInterferenceMetric, QKOVStatistics, compare_runs
from qkov_dist.data.samples import Sample
from qkov_dist.results.influences import Samples, changes
from qkov_dist.scoring.influence_records import OPTIMIZERS
from qkov_dist.stats.effect_tests import effect_tests
from qkov_dist.stats.head_moves import MOVE_KEYS, paired_moves, unpaired_moves
from qkov_dist.stats.rank_correlation import rank_correlation
from qkov_dist.stats.sample_values import SampleValues, quantities_of

NUM_A, NUM_B = 4, 3
IS_A = np.arange(NUM_A + NUM_B) < NUM_A


def known_samples(heatmap, tag: str = ""):
    """The same with contents, by which samples are known again."""
    a, b = (
        dataclasses.replace(table, contents=tuple(f"{tag}{task}{n}" for n in range(len(table))))
        for task, table in (("a", heatmap.samples_a), ("b", heatmap.samples_b))
    )
    return dataclasses.replace(heatmap, samples_a=a, samples_b=b)


@pytest.fixture(scope="module")
def first():
    return known_samples(heatmap_with_effects(attributes={**ATTRIBUTES, "estimator": "mean", "scope": "pooled"}))


@pytest.fixture(scope="module")
def second(first):
    """Another checkpoint on the same samples: other effects, other scores."""
    rng = np.random.default_rng(9)
    pooled = {block: scores * rng.gamma(4.0, size=scores.shape) for block, scores in first.pooled.items()}
    cross = {block: scores[..., :NUM_A, NUM_A:] for block, scores in pooled.items()}
    mean = {block: scores.mean((-2, -1)) for block, scores in cross.items()}
    tests = QKOVStatistics(n_permutations=30).test_heatmap(dataclasses.replace(first, pooled=pooled))
    made = dataclasses.replace(first, pooled=pooled, cross=cross, mean=mean).with_statistics(tests)
    return with_made_effects(made, seed=8)


def jackknife(of_subset) -> float:
    """The variance by leaving out each sample of either task."""
    variance = 0.0
    for places in (np.flatnonzero(IS_A), np.flatnonzero(~IS_A)):
        left = np.array([of_subset(np.delete(np.arange(NUM_A + NUM_B), n)) for n in places])
        variance += (len(left) - 1) / len(left) * ((left - left.mean()) ** 2).sum()
    return variance


def overlap_of(scores) -> float:
    def of(kept) -> float:
        part, is_a = scores[np.ix_(kept, kept)].astype(float), IS_A[kept]
        off = ~np.eye(len(kept), dtype=bool)
        mean = {(x, y): part[off & np.outer(is_a == x, is_a == y)].mean() for x in (True, False) for y in (True, False)}
        return 0.5 * np.log(mean[True, False] * mean[False, True] / (mean[True, True] * mean[False, False]))

    return of


def mean_of(scores):
    return lambda kept: scores[np.ix_(kept[IS_A[kept]], kept[~IS_A[kept]])].mean(dtype=float)


def relative_of(influences, at):
    """From influences [layer, head, N]: each sample's share of a change is left out, not the mean it is against."""

    def of(kept) -> float:
        task = IS_A if IS_A[kept].sum() < NUM_A else ~IS_A
        chosen = kept[task[kept]]
        change = influences[..., chosen].mean(-1)
        return change[at] / np.sqrt(np.nanmean(change**2))

    return of


def change_of(influences):
    """Without a sample of a task, the mean of that task's influences."""

    def of(kept) -> float:
        task = IS_A if IS_A[kept].sum() < NUM_A else ~IS_A
        return influences[kept[task[kept]]].mean()

    return of


@pytest.mark.parametrize("name", ["overlap", "score_mean", "relative_adam", "change_sgd"])
def test_errors_are_those_of_leaving_out_one_sample_after_the_other(second, name):
    found, at = quantities_of(second)[name], (1, 2)
    for block in "QO":
        scores = second.pooled[block][at]
        influences = second.influences[block]
        definition = {
            "overlap": overlap_of(scores),
            "score_mean": mean_of(scores),
            "relative_adam": relative_of(influences[:, :, OPTIMIZERS.index("adam")], at),
            "change_sgd": change_of(influences[(*at, OPTIMIZERS.index("sgd"))]),
        }[name]
        for task in (found.samples.a, found.samples.b):
            assert found.of_samples[block][at][task].mean() == pytest.approx(found.values[block][at], rel=1e-9)
        error = changes(found.of_samples[block], found.samples).standard_error[at]
        assert error**2 == pytest.approx(jackknife(definition), rel=1e-6)


def test_a_paired_test_is_that_of_the_difference_sample_by_sample(first, second):
    comparison = compare_runs([first, second], num_draws=50, seed=3)
    assert comparison.paired
    differences = {block: second.influences[block] - first.influences[block] for block in first}
    expected = effect_tests(differences, first.counted, num_draws=50, seed=3)
    for block in first:
        for optimizer in OPTIMIZERS:
            moves = comparison.quantities[f"change_{optimizer}"].moves[block]
            assert set(moves) == set(MOVE_KEYS)
            for key in set(MOVE_KEYS) - {"difference"}:
                np.testing.assert_array_equal(moves[key], expected[block][optimizer][key], err_msg=key)
            np.testing.assert_allclose(moves["difference"], expected[block][optimizer]["change"])


def in_order(table, order):
    texts = {key: tuple(getattr(table, key)[n] for n in order) for key in ("ids", "texts", "contents")}
    return dataclasses.replace(table, losses=table.losses[order], num_tokens=table.num_tokens[order], **texts)


def test_samples_in_another_order_are_paired_by_what_they_are(first, second):
    order_a, order_b = [2, 0, 3, 1], [1, 2, 0]
    order = np.array([*order_a, *(NUM_A + n for n in order_b)])
    tables = [in_order(*of) for of in ((second.samples_a, order_a), (second.samples_b, order_b))]
    turned = dataclasses.replace(
        second,
        samples_a=tables[0],
        samples_b=tables[1],
        influences={b: x[..., order] for b, x in second.influences.items()},
        pooled={b: x[..., order, :][..., order] for b, x in second.pooled.items()},
        cross={b: x[..., order_a, :][..., order_b] for b, x in second.cross.items()},
    )
    plain, other = (compare_runs([first, run], num_draws=20) for run in (second, turned))
    for name, quantity in plain.quantities.items():
        for block in first:
            np.testing.assert_allclose(other.quantities[name].low[block], quantity.low[block], atol=1e-6, err_msg=name)
            for key, values in (quantity.moves or {block: {}})[block].items():
                np.testing.assert_allclose(other.quantities[name].moves[block][key], values, rtol=1e-6, atol=1e-9)


def test_without_common_samples_errors_add_up(first, second):
    comparison = compare_runs([first, known_samples(second, tag="other")])
    assert not comparison.paired
    moves = comparison.quantities["change_adam"].moves["Q"]
    one, other = (run.effects["Q"]["adam"]["standard_error"] for run in (first, second))
    np.testing.assert_allclose(moves["standard_error"], np.hypot(one, other))
    num = comparison.num_heads
    np.testing.assert_allclose(moves["p_max"], np.minimum(num * moves["p_value"], 1))
    assert "0 in all runs, of 4, 4" in comparison.verdict[-1]
    assert "unpaired" in comparison.verdict[0]


def made_gradients(rng, means, num: int):
    """Gradients [head, 2 num, p] about means [head, task, p], of samples of unlike sizes."""
    size = np.exp(0.6 * rng.normal(size=(1, 2 * num, 1)))
    tasks = np.repeat(means, num, axis=1)
    return size * (rng.normal(size=(len(means), 2 * num, means.shape[-1])) + tasks)


def of_change(gradients) -> SampleValues:
    """Their influences by sgd, one layer of heads."""
    num = gradients.shape[1] // 2
    is_a = np.arange(2 * num) < num
    mean_a, mean_b = gradients[:, is_a].mean(1), gradients[:, ~is_a].mean(1)
    of_a = -np.einsum("hnp,hp->hn", gradients[:, is_a], mean_b)
    influences = {"Q": np.concatenate([of_a, -np.einsum("hnp,hp->hn", gradients[:, ~is_a], mean_a)], axis=1)[None]}
    samples = Samples(is_a, ~is_a)
    return SampleValues({"Q": changes(influences["Q"], samples).value}, influences, samples)


def test_the_level_holds_on_halves_of_one_task_pair_and_under_noise_of_the_same_samples():
    """200 draws of 40 heads: as many false finds as the level says, or fewer."""
    rates = {"unpaired": [], "paired": []}
    for draw in range(200):
        rng = np.random.default_rng(draw)
        means = 0.5 * rng.normal(size=(40, 2, 8))
        half, other = (of_change(made_gradients(rng, means, 12)) for _ in range(2))
        gradients = made_gradients(rng, means, 12)
        again = of_change(gradients + 0.5 * rng.normal(size=gradients.shape))
        found = {
            "unpaired": unpaired_moves(half, other)["Q"],
            "paired": paired_moves(of_change(gradients), again, num_draws=60)["Q"],
        }
        for name, moves in found.items():
            p, q, p_max = (moves[key] <= 0.05 for key in ("p_value", "q_value", "p_max"))
            rates[name].append((p.mean(), q.any(), p_max.any()))
    for name, of_draws in rates.items():
        p, q, p_max = np.mean(of_draws, axis=0)
        assert p <= 0.05, name  # conservative: a jackknife counts what samples do to each other once too often
        assert max(q, p_max) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200), name


def test_a_head_that_was_changed_is_found_by_pairing_alone():
    """A small move under large errors that both runs share."""
    rng = np.random.default_rng(5)
    one = of_change(made_gradients(rng, 0.5 * rng.normal(size=(40, 2, 8)), 16))
    usual = one.of_samples["Q"].std()
    moved = one.of_samples["Q"] + 0.05 * usual * rng.normal(size=one.of_samples["Q"].shape)
    moved[0, 7] += 0.3 * usual
    runs = one, SampleValues({"Q": changes(moved, one.samples).value}, {"Q": moved}, one.samples)
    paired, unpaired = paired_moves(*runs, num_draws=500)["Q"], unpaired_moves(*runs)["Q"]
    assert np.flatnonzero(paired["q_value"] <= 0.05).tolist() == [7]
    assert np.flatnonzero(paired["p_max"] <= 0.05).tolist() == [7]
    assert not (unpaired["q_value"] <= 0.05).any()


def test_a_paired_t_test_of_one_task_alone_is_scipys():
    """Where B's samples say nothing, what is left is the paired t test of A's."""
    rng = np.random.default_rng(6)
    samples = Samples(IS_A, ~IS_A)
    runs = []
    for _ in range(2):
        values = {"Q": np.where(IS_A, rng.normal(size=(1, 5, NUM_A + NUM_B)), 0.0)}
        runs.append(SampleValues({"Q": values["Q"][..., IS_A].mean(-1)}, values, samples))
    found = paired_moves(*runs, num_draws=5)["Q"]
    expected = ttest_rel(*(run.of_samples["Q"][0][:, IS_A] for run in reversed(runs)), axis=-1)
    np.testing.assert_allclose(found["p_value"][0], expected.pvalue)


def test_what_only_the_order_of_sums_moves_has_not_moved(first):
    """Every head is off by a little in all samples, which is far beyond the errors of such a difference."""
    shifted = dataclasses.replace(first, influences={b: x + 1e-9 for b, x in first.influences.items()})
    for name in ("change_adam", "change_sgd"):
        quantity = compare_runs([first, shifted]).quantities[name]
        for block, moves in quantity.moves.items():
            assert set(moves["p_value"][first.present[block]]) == {1.0}
            assert (moves["difference"][first.present[block]] != 0).all()


def test_rank_correlations_are_scipys_with_the_jackknife_of_both_runs(first, second):
    paired = compare_runs([first, second]).quantities["change_adam"]
    runs = [run.influences["Q"][:, :, OPTIMIZERS.index("adam")][first.present["Q"]] for run in (first, second)]
    expected = spearmanr(*(x[:, IS_A].mean(-1) for x in runs)).statistic
    assert paired.correlation["Q"][0, 1] == pytest.approx(expected)
    assert paired.interval_by == "samples"
    variance = 0.0
    for task in (IS_A, ~IS_A):
        left = []
        for n in np.flatnonzero(task):
            kept = task & (np.arange(len(task)) != n)
            left.append(np.arcsin(spearmanr(*(x[:, kept].mean(-1) for x in runs)).statistic))
        variance += (len(left) - 1) / len(left) * ((np.array(left) - np.mean(left)) ** 2).sum()
    low, high = (np.arcsin(end["Q"][0, 1]) for end in (paired.low, paired.high))
    wide = rank_correlation(*(quantities_of(x)["change_adam"] for x in (first, second)), "Q", paired=False)
    assert (high - low) / 2 > 2 * np.sqrt(variance) or high == pytest.approx(np.pi / 2)  # t of few degrees of freedom
    assert wide.value == pytest.approx(expected)
    assert (wide.low, wide.high) != (paired.low["Q"][0, 1], paired.high["Q"][0, 1])


def test_a_run_ranks_its_own_heads_alike_and_has_not_moved(first):
    comparison = compare_runs([first, first], num_draws=20)
    assert comparison.verdict[0].startswith("None of 44 heads moved")
    for name, quantity in comparison.quantities.items():
        for block in first:
            ends = {float(of[block][0, 1]) for of in (quantity.correlation, quantity.low, quantity.high)}
            assert ends == {1.0} or name.startswith("relative"), (name, block, ends)
    assert comparison.differs == ()


def test_over_heads_where_a_file_keeps_no_samples(first, second):
    quantity = compare_runs([first, second]).quantities["cross_mean"]
    assert quantity.interval_by == "heads"
    assert quantity.moves is None
    assert quantity.low["Q"][0, 1] <= quantity.correlation["Q"][0, 1] <= quantity.high["Q"][0, 1]


def test_without_pooled_scores_overlap_is_tested_by_its_intervals(first, second):
    without = [dataclasses.replace(run, pooled=None) for run in (first, second)]
    comparison = compare_runs(without)
    quantity = comparison.quantities["overlap"]
    assert comparison.paired
    assert not quantity.paired
    widths = [run.statistics["overlap"]["Q"]["ci_high"] - run.statistics["overlap"]["Q"]["ci_low"] for run in without]
    np.testing.assert_allclose(quantity.moves["Q"]["standard_error"], np.hypot(*widths) / 2 / 1.959964, rtol=1e-6)
    assert any("output.pairs: all" in note for note in comparison.notes)


def test_more_runs_make_a_trajectory(first, second):
    third = known_samples(with_made_effects(second, seed=12))
    comparison = compare_runs([first, second, third], names=["a", "b", "c"])
    quantity = comparison.quantities["change_adam"]
    values = np.stack([run.effects["Q"]["adam"]["change"] for run in (first, second, third)])
    np.testing.assert_allclose(quantity.values["Q"], values)
    step, to = quantity.largest_step("Q")
    both = np.stack([values[1] - values[0], values[2] - values[1]])
    there = first.present["Q"]
    np.testing.assert_allclose(np.abs(step[there]), np.abs(both).max(0)[there])
    np.testing.assert_allclose(both[to[there] - 1, *np.nonzero(there)], step[there])
    np.testing.assert_array_equal(quantity.correlation["Q"], quantity.correlation["Q"].T)
    np.testing.assert_allclose(quantity.moves["Q"]["difference"], values[2] - values[0])
    table = comparison.to_pandas()
    assert len(table) == comparison.num_heads
    assert {"change_adam_3", "change_adam_q_value", "change_adam_largest_step_to"} <= set(table)
    assert len(comparison.correlations()) == 3 * 4 * 5  # pairs of runs, blocks, quantities that have ranks of their own


OF_ADAM, OF_SCORES = {"change_adam", "relative_adam"}, {"overlap"}
TESTED = {"change_sgd", "relative_sgd"} | OF_ADAM | OF_SCORES


@pytest.mark.parametrize(
    ("changed", "told", "ranked_only"),
    [
        ({"score": "symmetric"}, "metric.score (interference, symmetric)", OF_SCORES),
        ({"ridge_relative": 0.5}, "ridge.relative (not said, 0.5)", OF_ADAM | OF_SCORES),
        ({"scope": "a"}, "fisher.scope (pooled, a)", OF_ADAM | OF_SCORES),
        ({"sample_scale": "unit"}, "metric.sample_scale (not said, unit)", TESTED),
    ],
)
def test_values_of_another_kind_are_compared_by_ranks_alone(first, second, changed, told, ranked_only):
    other = dataclasses.replace(second, attributes={**second.attributes, **changed})
    comparison = compare_runs([first, other], num_draws=10)
    assert told in comparison.differs
    assert {name for name, of in comparison.quantities.items() if of.moves is not None} == TESTED - ranked_only
    assert comparison.quantities["change_adam"].correlation["Q"][0, 1] < 1
    assert any("only ranks are compared" in note for note in comparison.notes)


def test_other_weights_are_told_by_losses_of_the_same_samples(first):
    table = dataclasses.replace(first.samples_a, losses=first.samples_a.losses * np.array([1, 1.2, 1, 1]))
    differs = compare_runs([first, dataclasses.replace(first, samples_a=table)], num_draws=5).differs
    assert differs == ("model weights (losses of the same samples differ by up to 0.17 of themselves)",)


def test_where_files_know_fingerprints_these_tell_whether_weights_differ(first):
    runs = [
        dataclasses.replace(first, attributes={**first.attributes, "model_fingerprint": mark * 64}) for mark in "abb"
    ]
    assert compare_runs(runs[1:], num_draws=5).differs == ()
    assert compare_runs(runs, num_draws=5).differs == ("model weights (fingerprints aaaaaaaa, bbbbbbbb)",)


def test_unequal_numbers_of_samples_leave_what_is_no_mean_to_ranks(first):
    more = with_made_effects(
        make_heatmap(samples_a=make_table("a", 9), pooled=None, cross=None, attributes=first.attributes), seed=1
    )
    comparison = compare_runs([first, more])
    tested = {name for name, of in comparison.quantities.items() if of.moves is not None}
    assert tested == {"change_adam", "change_sgd"}
    assert any("different numbers of samples" in note for note in comparison.notes)


def test_a_configuration_that_is_none_of_ours_is_told_not_believed(first):
    config = {"model": {"path": ["x"]}, "tasks": "a", "metric": 3, "fisher": {"estimator": {}}}
    attributes = {"run_id": "x", "score": "interference", "config": config}
    comparison = compare_runs([first, dataclasses.replace(first, attributes=attributes)], num_draws=5)
    assert "model.path (not said, ['x'])" in comparison.differs
    assert "fisher.estimator (mean, {})" in comparison.differs


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task_a": "cøde", "task_b": "math"}, "same order"),
        ({"task_b": "law"}, "expected tasks 'math', 'cøde', got 'math', 'law'"),
        ({"layers": (2, 5, 8)}, "expected layers 2, 5, 7, got 2, 5, 8"),
        ({"kv_heads": (0, 1, 3)}, "expected K heads 0-2, got 0-1, 3"),
        ({"attributes": {"model_type": "gpt2"}}, "expected a model of type llama, got gpt2"),
    ],
)
def test_what_has_other_heads_or_tasks_is_refused(first, changes, says):
    plain = dataclasses.replace(first, attributes={**first.attributes, "model_type": "llama"})
    with pytest.raises(QkovError, match=says) as caught:
        compare_runs([plain, dataclasses.replace(plain, **changes)], names=["one", "two"])
    assert str(caught.value).startswith("compare two with one: ")


def test_heads_that_one_run_lacks_and_slices_of_other_shapes_are_refused(first):
    mask = {**first.present, "Q": first.present["Q"].copy()}
    mask["Q"][2, 4] = True
    with pytest.raises(QkovError, match=r"expected one without Q 7\.4, got a layer with"):
        compare_runs([first, dataclasses.replace(first, present=mask)])
    shapes = [[{"layer": 2, "parameter": "q", "shape": [n, 8], "heads": {}}] for n in (8, 16)]
    runs = [dataclasses.replace(first, attributes={**first.attributes, "slices": shape}) for shape in shapes]
    with pytest.raises(QkovError, match=r"expected q of shape \[8, 8\], got \[16, 8\]"):
        compare_runs(runs)


WRONG = {"alpha": 0, "confidence": 1.0, "names": ["a"], "num_draws": 0, "pair": ("a", "b")}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_out_of_range_are_refused(first, name):
    with pytest.raises(QkovError, match=f"^{name}"):
        compare_runs([first, first], **{name: WRONG[name]})


def test_one_run_is_no_comparison(first):
    for runs in ([first], first, "runs/one"):
        with pytest.raises(QkovError, match="two runs or more"):
            compare_runs(runs)


# Real gradients of a tiny model


def alike(seed: int, num: int) -> list[Sample]:
    """Prompts that differ in few tokens: tasks with a direction in common."""
    rng = np.random.default_rng(seed)
    samples = []
    for n in range(num):
        ids = np.array([5, 9, 14, 3, 20, 33, 8, 41])
        ids[rng.integers(3, 8)] = rng.integers(3, VOCAB)
        labels = ids.copy()
        labels[:3] = -100
        samples.append(Sample(f"{seed}-{n}", ids, labels, ""))
    return samples


def scored(model, samples_a, samples_b):
    """Under a ridge of no head's scale: a relative one is of the whole block, so that one head moves all others' R."""
    collector = FisherCollector()
    for task, samples in (("math", samples_a), ("code", samples_b)):
        collector.collect_fisher(model, padded(samples, "right"), task=task, mode="mean")
    metric = QKOVInterferenceMetric(QKOVConfig.from_model(model), collector, ridge_relative=0.0, ridge_lambda=1e-20)
    heatmap = metric.compute_heatmap("math", "code", pairs="all")
    return heatmap.with_statistics(QKOVStatistics(n_permutations=100).test_heatmap(heatmap))


@pytest.fixture(scope="module")
def tasks():
    return alike(1, 16), alike(2, 16)


@pytest.mark.long
def test_a_kv_group_that_was_rescaled_between_two_checkpoints_is_found_and_nothing_else(tasks):
    """V <- 3V, O <- O/3 of one kv group leaves the model's function: only these gradients change, by 1/3 and 3."""
    model = TINY["llama"].build()
    changed = copy.deepcopy(model)
    attention, group = changed.model.layers[1].self_attn, slice(16, 32)
    with torch.no_grad():
        attention.v_proj.weight[group] *= 3
        attention.o_proj.weight[:, 32:64] /= 3
    comparison = compare_runs([scored(model, *tasks), scored(changed, *tasks)], names=["before", "after"])
    assert comparison.paired
    for name in ("change_adam", "change_sgd"):
        moves = comparison.quantities[name].moves
        for key in ("q_value", "p_max"):
            found = {comparison.name_of(*at) for at in comparison.heads() if moves[at[0]][key][at[1:]] <= 0.05}
            assert found == {"V 1.1", "O 1.2", "O 1.3"}, (name, key)
    assert comparison.num_moved("overlap") == 0  # free of each task's scale
    assert comparison.verdict[0].startswith("3 of 24 heads moved from before to after")


def test_no_head_moves_between_halves_of_the_samples(tasks):
    model = TINY["llama"].build()
    halves = [scored(model, *(task[n::2] for task in tasks)) for n in (0, 1)]
    comparison = compare_runs(halves)
    assert not comparison.paired
    for name in ("change_adam", "change_sgd", "relative_adam", "relative_sgd", "overlap"):
        assert comparison.num_moved(name) == 0, name
        p_values = np.concatenate([of["p_value"].ravel() for of in comparison.quantities[name].moves.values()])
        assert (p_values <= 0.05).mean() <= 0.1, name
