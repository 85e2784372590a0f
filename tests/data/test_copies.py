"""Samples that occur more than once: found by what the model sees of them, no pair with their copies, and said."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import yaml
from heatmaps import make_heatmap
from samples import mixed_samples, write_task
from zoo import TINY, VOCAB

from qkov_dist import FisherCollector, QKOVConfig, QKOVInterferenceMetric, QKOVStatistics, load_heatmap
from qkov_dist.cli import main
from qkov_dist.data.batches import content_of
from qkov_dist.data.copies import different, different_pairs, look_for_copies
from qkov_dist.data.samples import Sample
from qkov_dist.errors import QkovError
from qkov_dist.results.heatmap_data import mean_over_pairs


def sample(ids: list[int], labels: list[int] | None = None, name: str = "x", text: str = "") -> Sample:
    return Sample(name, np.array(ids, np.int64), np.array(ids if labels is None else labels, np.int64), text)


def test_a_samples_content_is_what_the_model_is_shown_and_has_to_predict():
    one = content_of(sample([1, 2, 3]), "causal")
    assert one == content_of(sample([1, 2, 3], name="other", text="else"), "causal")
    assert one == content_of(sample([1, 2, 3], [-100, 2, 3]), "causal")  # nothing predicts the first token
    assert one != content_of(sample([1, 2, 3], [1, -100, 3]), "causal")
    assert one != content_of(sample([1, 2, 4]), "causal")
    assert content_of(sample([1, 2, 3], [1, 2, -100]), "causal") == content_of(sample([1, 2]), "causal")
    assert content_of(sample([1, 2, 3], [1, 2, -100]), "masked") != content_of(sample([1, 2]), "masked")


def test_unknown_contents_differ_from_every_other_but_not_from_themselves():
    assert different(["a", "", "b"], ["b", "", "c"]).tolist() == [[True] * 3, [True] * 3, [False, True, True]]
    assert different_pairs(["a", "", "a", ""]).tolist() == [
        [False, True, False, True],
        [True, False, True, True],
        [False, True, False, True],
        [True, True, True, False],
    ]


def found(first: str, second: str, *, allowed: bool = False) -> list[str]:
    ids = [f"a{n}" for n in range(len(first))], [f"b{n}" for n in range(len(second))]
    return look_for_copies(("math", "code"), (list(first), list(second)), ids, allowed=allowed)


def test_shared_and_repeated_samples_are_warned_of():
    assert found("abcdefghij", "klmnopqrst") == []
    (shared,) = found("abcdefghij", "klmnopqrsa")  # a tenth of each
    assert "1 of 10 of 'math' and 1 of 10 of 'code'" in shared
    assert "'a0' is 'b9'" in shared
    (repeated,) = found("abcdefghij", "klmnopqrkk")
    assert "task 'code' holds 2 samples more than once (first: 'b8' is 'b0')" in repeated


def test_more_than_a_tenth_of_a_task_is_refused_unless_allowed_by_name():
    with pytest.raises(QkovError, match=r"task 'code': .*got 1 of 9.*statistics\.allow_shared_samples=true"):
        found("abcdefghij", "klmnopqra")
    (shared,) = found("abcd", "abcd", allowed=True)
    assert "4 of 4 of 'math' and 4 of 4 of 'code'" in shared


def test_a_mean_over_pairs_leaves_out_those_that_are_none():
    scores = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    pairs = np.ones((3, 4), bool)
    pairs[1, 2] = False
    (mean,) = mean_over_pairs({"Q": scores}, pairs).values()
    np.testing.assert_allclose(mean, [[np.delete(scores[0, head], 6).mean() for head in (0, 1)]])
    (nothing,) = mean_over_pairs({"Q": scores}, ~np.ones((3, 4), bool)).values()
    assert np.isnan(nothing).all()


@pytest.fixture(scope="module")
def llama():
    return TINY["llama"].build()


@pytest.fixture
def config(llama, tmp_path):
    """Two tasks of six samples of which one is in both, and loudest of all."""
    llama.save_pretrained(tmp_path / "model")
    first, second = (mixed_samples(6, VOCAB, seed=seed) for seed in (1, 2))
    second[5] = dataclasses.replace(first[3], id="a copy", text="another text")
    for name, samples in (("a", first), ("b", second)):
        write_task(tmp_path / f"{name}.jsonl", samples)
    plain = {
        "model": {"path": str(tmp_path / "model")},
        "tasks": [{"name": name, "path": str(tmp_path / f"{name}.jsonl")} for name in "ab"],
        "statistics": {"permutations": 30},
        "output": {"dir": str(tmp_path / "out"), "pairs": "all"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


def test_a_run_of_tasks_that_share_samples(config, tmp_path, capsys):
    assert main(["run", str(config), "--quiet"]) == 2
    assert "statistics.allow_shared_samples=true" in capsys.readouterr().err
    assert not (tmp_path / "out" / "heatmap.h5").exists()
    assert main(["run", str(config), "--quiet", "statistics.allow_shared_samples=true"]) == 0
    assert "warning: tasks share samples: 1 of 6 of 'a' and 1 of 6 of 'b'" in capsys.readouterr().err
    heatmap = load_heatmap(tmp_path / "out" / "heatmap.h5")
    assert any("tasks share samples" in warning for warning in heatmap.attributes["warnings"])
    assert "tasks share samples" in (tmp_path / "out" / "report.html").read_text()
    assert np.argwhere(~heatmap.different).tolist() == [[3, 5]]
    for block in heatmap.blocks:
        kept = np.delete(heatmap.cross[block].reshape(*heatmap.mean[block].shape, -1), 3 * 6 + 5, axis=-1)
        np.testing.assert_allclose(heatmap.mean[block], kept.mean(-1, dtype=np.float64), rtol=1e-6)
        np.testing.assert_allclose(heatmap.statistics["cross_mean"][block]["statistic"], heatmap.mean[block], rtol=1e-6)
        pairs = {(record["sample_i"], record["sample_j"]) for record in heatmap[block].top_conflicts(10**6)}
        assert (3, 5) not in pairs
        assert len(pairs) == 35
    (tmp_path / "out" / "heatmap.h5").rename(tmp_path / "run.h5")
    assert main(["merge", str(tmp_path / "out"), "--quiet"]) == 0  # contents are in the partial files
    merged = load_heatmap(tmp_path / "out" / "heatmap.h5")
    for block in heatmap.blocks:
        np.testing.assert_array_equal(merged.mean[block], heatmap.mean[block])
        for key, array in heatmap.statistics["overlap"][block].items():
            np.testing.assert_array_equal(merged.statistics["overlap"][block][key], array)


def test_tasks_that_share_samples_in_python(llama):
    first, second = (mixed_samples(6, VOCAB, seed=seed) for seed in (1, 2))
    second[5] = first[3]
    collector = FisherCollector()
    collector.collect_fisher(llama, first, "math")
    collector.collect_fisher(llama, second, "code")
    metric = QKOVInterferenceMetric(QKOVConfig.from_model(llama), collector)
    with pytest.raises(QkovError, match=r"allow_shared_samples=true"):
        metric.compute_heatmap("math", "code")
    heatmap = metric.compute_heatmap("math", "code", allow_shared_samples=True)
    assert [w for w in heatmap.attributes["warnings"] if "tasks share samples" in w]
    results = QKOVStatistics(n_permutations=50).test_heatmap(heatmap)
    np.testing.assert_allclose(results["cross_mean"]["Q"]["statistic"], heatmap.mean["Q"], rtol=1e-6)
    assert metric.compute_heatmap("math", "code", max_samples_per_task=3).attributes["warnings"] == []


def test_a_step_of_few_samples_under_a_moving_average_is_warned_of(llama):
    collector = FisherCollector()
    for task, seed in (("math", 1), ("code", 2)):
        collector.collect_fisher(llama, mixed_samples(4, VOCAB, seed=seed), task, mode="ema")
    metric = QKOVInterferenceMetric(QKOVConfig.from_model(llama), collector)
    assert metric.compute_heatmap("math", "code", layers=[0]).attributes["warnings"] == []
    collector.collect_fisher(llama, mixed_samples(1, VOCAB, seed=3), "math", mode="ema")
    (warning,) = metric.compute_heatmap("math", "code", layers=[0]).attributes["warnings"]
    assert "about 4 times the weight" in warning


@pytest.mark.parametrize(("second", "reason"), [("xde", "of copies alone"), ("cde", None)])
def test_heads_without_overlap_are_told_of_copies_where_these_leave_no_pair(second, reason):
    """Of 4 + 3 samples, three are one: where a labelling puts them together, that task has no pair."""
    heatmap = make_heatmap()
    first = dataclasses.replace(heatmap.samples_a, contents=tuple("xxyz"))
    other = dataclasses.replace(heatmap.samples_b, contents=tuple(second))
    settings = {**heatmap.attributes, "estimator": "mean", "scope": "pooled"}
    heatmap = dataclasses.replace(heatmap, samples_a=first, samples_b=other, attributes=settings)
    notes = [note for note in QKOVStatistics().test_heatmap(heatmap)["notes"] if "no overlap" in note]
    assert [reason in note for note in notes] == ([True] if reason else [])
