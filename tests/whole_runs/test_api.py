"""The Python API: padded batches in, heatmaps out, and the errors on the way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from collecting import collected
from comparing import TOLERANCE, as_blocks, assert_close
from expected import expected_scores
from jobs import job_for
from rounding import BLOCKS, PASSES
from samples import mixed_samples
from zoo import TINY, VOCAB

from qkov_dist import FisherCollector, QKOVConfig, QkovError, QKOVInterferenceMetric, QKOVStatistics, load_heatmap


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "opt", "gemma2"])
def test_heatmaps_of_padded_batches_equal_the_oracle(name, side):
    entry = TINY[name]
    model = entry.build()
    job = job_for(entry)
    metric = QKOVInterferenceMetric(QKOVConfig.from_model(model), collected(model, job, side))
    heatmap = metric.compute_heatmap("math", "code")
    assert_close(as_blocks(heatmap), expected_scores(entry, model, job))


@pytest.fixture(scope="module")
def llama():
    entry = TINY["llama"]
    model = entry.build()
    job = job_for(entry)
    config = QKOVConfig.from_model(model)
    collector = collected(model, job)
    return entry, model, job, config, collector


def test_views_repeat_kv_heads_and_pairs_agree_with_the_heatmap(llama):
    _, _, job, config, collector = llama
    metric = QKOVInterferenceMetric(config, collector)
    heatmap = metric.compute_heatmap("math", "code", layers=[1], heads=range(2, 4))
    assert heatmap["Q"]["scores"].shape == (len(job.a), len(job.b), 1, 2)
    assert heatmap["K"]["scores"].shape == (len(job.a), len(job.b), 1, 2)
    assert heatmap.kv_heads == (1,)
    np.testing.assert_array_equal(heatmap["K"]["scores"][..., 0], heatmap["K"]["scores"][..., 1])
    pair = metric.compute_sample_pair(task_a="math", sample_i=3, task_b="code", sample_j=1, layer=1, head=3)
    assert list(pair) == ["Q", "K", "V", "O"]
    for block, score in pair.items():
        scores = heatmap[block]["scores"]
        assert score == pytest.approx(float(scores[3, 1, 0, 1]), abs=PASSES * float(scores.max()))
    np.testing.assert_allclose(
        heatmap["Q"]["layer_head_avg"], heatmap["Q"]["scores"].mean(axis=(0, 1), dtype=float), rtol=1e-6
    )


def test_a_limit_on_samples_scores_fewer_pairs_under_the_same_fisher(llama):
    _, _, _, config, collector = llama
    metric = QKOVInterferenceMetric(config, collector)
    whole, part = (metric.compute_heatmap("math", "code", max_samples_per_task=n) for n in (None, 2))
    for block in whole.blocks:
        assert part.cross[block].shape[2:] == (2, 2)
        of_part = whole.cross[block][:, :, :2, :2]
        np.testing.assert_allclose(part.cross[block], of_part, rtol=0, atol=PASSES * of_part.max())
        np.testing.assert_allclose(part.fisher[block]["mean"], whole.fisher[block]["mean"], rtol=BLOCKS)


def test_turned_around_the_symmetric_score_is_transposed(llama):
    _, _, _, config, collector = llama
    metric = QKOVInterferenceMetric(config, collector, score="symmetric")
    there, back = metric.compute_heatmap("math", "code"), metric.compute_heatmap("code", "math")
    for block in there.blocks:
        turned = np.swapaxes(back.cross[block], 2, 3)
        np.testing.assert_allclose(there.cross[block], turned, rtol=0, atol=PASSES * turned.max())


def test_tests_saving_and_loading(llama, tmp_path):
    _, _, _, config, collector = llama
    heatmap = QKOVInterferenceMetric(config, collector).compute_heatmap("math", "code")
    results = QKOVStatistics(fdr_alpha=0.05, n_permutations=50).test_heatmap(heatmap)
    assert set(results["fdr_corrected"]) == {"Q", "K", "V", "O"}
    heatmap.with_statistics(results).save(tmp_path / "heatmap.h5")
    loaded = load_heatmap(tmp_path / "heatmap.h5")
    for block in heatmap.blocks:
        np.testing.assert_array_equal(loaded.cross[block], heatmap.cross[block])
        np.testing.assert_array_equal(loaded.mean[block], heatmap.mean[block])


def test_factors_beyond_the_memory_change_nothing(llama, tmp_path):
    _, model, job, config, collector = llama
    spilled = collected(model, job, gradient_memory_mb=0, spill_dir=tmp_path)
    assert spilled.collection.store.bytes_on_disk > 0
    one, other = (QKOVInterferenceMetric(config, c).compute_heatmap("math", "code") for c in (collector, spilled))
    for block in one.blocks:
        np.testing.assert_array_equal(one.cross[block], other.cross[block])
    spilled.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scope", ["pooled", "a", "b"])
def test_the_fisher_takes_the_scope_asked_for(llama, scope):
    entry, model, _, config, collector = llama
    metric = QKOVInterferenceMetric(config, collector, scope=scope)
    heatmap = metric.compute_heatmap("math", "code", pairs="cross")
    assert_close(as_blocks(heatmap), expected_scores(entry, model, job_for(entry, scope=scope)), TOLERANCE)
    assert heatmap.pooled is None


def test_encoders_with_masked_tokens_equal_the_oracle():
    entry = TINY["bert_masked"]
    model = entry.build()
    job = job_for(entry)
    config = QKOVConfig.from_model(model)
    assert config.objective == "masked"
    heatmap = QKOVInterferenceMetric(config, collected(model, job)).compute_heatmap("math", "code")
    assert_close(as_blocks(heatmap), expected_scores(entry, model, job))


def refused(match: str):
    return pytest.raises(QkovError, match=match)


def test_arguments_out_of_range_are_named(llama):
    _, model, _, config, collector = llama
    metric = QKOVInterferenceMetric(config, collector)
    with refused(r"task 'art': expected captured samples, got none \(collected: code, math\).*collect_fisher"):
        metric.compute_heatmap("math", "art")
    with refused("task_b: expected another task"):
        metric.compute_heatmap("math", "math")
    with refused(r"metric.layers: expected .* 0 to 1, got 2"):
        metric.compute_heatmap("math", "code", layers=[2])
    with refused(r"metric.heads: expected query heads 0 to 3 .*got 4"):
        metric.compute_heatmap("math", "code", heads=[4])
    with refused("sample_j: expected a sample of task 'code', 0 to 2, got 3"):
        metric.compute_sample_pair("math", 0, "code", 3, 0, 0)
    with refused("max_samples_per_task: expected a whole number of at least 1"):
        metric.compute_heatmap("math", "code", max_samples_per_task=0)
    with refused("pairs: expected one of cross, all"):
        metric.compute_heatmap("math", "code", pairs="some")
    with refused("score: expected one of interference, signed, symmetric, curvature"):
        QKOVInterferenceMetric(config, collector, score="loud")
    with refused("epsilon: expected one of epsilon, ridge_lambda and ridge_relative above 0"):
        QKOVInterferenceMetric(config, collector, ridge_relative=0)
    with refused("device: expected cpu, cuda or cuda:N, got 'mps'"):
        QKOVInterferenceMetric(config, collector, device="mps")
    if not torch.cuda.is_available():
        with refused("device: expected cpu, where torch finds no CUDA device, got 'cuda:1'"):
            QKOVInterferenceMetric(config, collector, device="cuda:1")
    with refused("reduction: expected one of param"):
        FisherCollector(reduction="group")
    with refused("mode: expected one of ema, mean"):
        FisherCollector().collect_fisher(model, {"input_ids": [[1, 2]]}, "math", mode="sum")


def test_a_disabled_capture_says_which_setting_to_change(llama):
    _, model, _, config, _ = llama
    collector = FisherCollector(enable_cross_task_analysis=False)
    collector.collect_fisher(model, {"input_ids": [[1, 2, 3]]}, "math")
    with refused("enable_cross_task_analysis=True"):
        QKOVInterferenceMetric(config, collector).compute_heatmap("math", "code")


def test_a_layer_that_was_not_captured_is_an_error_not_a_zero(llama):
    _, model, job, config, _ = llama
    collector = collected(model, job, layers=[0])
    metric = QKOVInterferenceMetric(config, collector)
    assert metric.compute_heatmap("math", "code").layers == (0,)
    with refused(r"layer 1 .*expected captured factors, got none"):
        metric.compute_heatmap("math", "code", layers=[1])


def test_modes_cannot_be_mixed(llama):
    _, model, _, config, _ = llama
    collector = FisherCollector()
    collector.collect_fisher(model, mixed_samples(2, VOCAB, seed=1), "math", mode="ema")
    collector.collect_fisher(model, mixed_samples(2, VOCAB, seed=2), "code", mode="mean")
    with refused("one mode for all calls"):
        QKOVInterferenceMetric(config, collector).compute_heatmap("math", "code")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"text": ["a"]}, "expected input_ids"),
        ({"input_ids": [[1, 2]], "cache_position": [[0, 1]]}, "expected input_ids, and optionally"),
        ({"input_ids": [[1, 2], [3]]}, "equally long rows"),
        ({"input_ids": [1, 2]}, r"of one shape \[samples, tokens\]"),
        ({"input_ids": [[1.0, 2.0]]}, "integer input_ids"),
        ({"input_ids": [[1, 2]], "labels": [[1, 2, 3]]}, "of one shape"),
        ({"input_ids": [[1, VOCAB]]}, f"sample 0: input_ids: expected token ids from 0 to {VOCAB - 1}"),
        ({"input_ids": [[1, 2]], "labels": [[1, -1]]}, "sample 0: labels: expected token ids"),
        ({"input_ids": [[1, 2], [1, 2]], "labels": [[1, 2], [1, -100]]}, "sample 1: expected at least one labelled"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 0]]}, "sample 0: expected at least one labelled"),
    ],
)
def test_malformed_batches_are_refused(llama, batch, message):
    _, model, _, _, _ = llama
    with refused(message):
        FisherCollector().collect_fisher(model, batch, "math")


def test_a_failed_batch_leaves_the_collector_as_it_was(llama):
    _, _, job, _, _ = llama
    model = TINY["llama"].build()
    collector = collected(model, job)
    before = len(collector.records), len(collector.steps), dict(collector.collection.store.spans)
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = float("nan")
    with refused("finite loss"):
        collector.collect_fisher(model, {"input_ids": [[5, 6, 7]]}, "math")
    assert (len(collector.records), len(collector.steps), dict(collector.collection.store.spans)) == before


def test_an_empty_batch_is_no_step(llama):
    _, model, _, _, _ = llama
    for batch in ([], {"input_ids": torch.zeros(0, 5, dtype=torch.int64)}):
        with refused("expected at least one sample, got none"):
            FisherCollector().collect_fisher(model, batch, "math")


def test_one_collector_takes_one_model(llama):
    _, model, _, config, _ = llama
    collector = FisherCollector()
    collector.collect_fisher(model, mixed_samples(2, VOCAB, seed=1), "math")
    with refused("the model of the first call"):
        collector.collect_fisher(TINY["llama"].build(seed=5), mixed_samples(2, VOCAB, seed=2), "code")
    collector.collect_fisher(model, mixed_samples(2, VOCAB, seed=2), "code")
    other = QKOVConfig.from_model(TINY["gpt2"].build())
    with refused("config: expected the configuration of the model that was collected"):
        QKOVInterferenceMetric(other, collector).compute_heatmap("math", "code")
    collector.close()
    with refused("expected captured samples"):
        QKOVInterferenceMetric(config, collector).compute_heatmap("math", "code")


@pytest.mark.parametrize("name", ["layers", "heads"])
@pytest.mark.parametrize("numbers", [[1, 0], [1, 1], [], [1.0], [-1], "01"])
def test_selections_are_ascending_so_that_an_axis_is_what_was_asked_for(llama, name, numbers):
    _, _, _, config, collector = llama
    with refused(f"{name}: expected ascending whole numbers from 0, each once"):
        QKOVInterferenceMetric(config, collector).compute_heatmap("math", "code", **{name: numbers})


@pytest.mark.parametrize("mask", [[1, 0, 1, 1], [0.5, 1, 1, 1], [1, 2, 1, 1]])
def test_masks_with_holes_or_other_values_are_refused(llama, mask):
    _, model, _, _, _ = llama
    with refused("attention_mask: expected ones on a sample's tokens"):
        FisherCollector().collect_fisher(model, {"input_ids": [[3, 4, 5, 6]], "attention_mask": [mask]}, "math")


def test_no_grad_does_no_harm_and_inference_mode_is_named(llama):
    entry, model, job, config, collector = llama
    with torch.no_grad():
        again = collected(model, job)
    one, other = (QKOVInterferenceMetric(config, c).compute_heatmap("math", "code") for c in (collector, again))
    np.testing.assert_array_equal(one.cross["Q"], other.cross["Q"])
    with torch.inference_mode(), refused("torch.inference_mode"):
        FisherCollector().collect_fisher(entry.build(), mixed_samples(2, VOCAB, seed=1), "math")
