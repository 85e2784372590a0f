"""``metric.sample_scale: unit`` through whole runs: sweeps, ranks, resuming, files, and the Python API."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from collecting import collected
from comparing import as_blocks, assert_close, assert_identical
from expected import expected_influences, expected_norms, expected_scores
from jobs import job_for
from rounding import PASSES
from running import interrupt_at, qkov, run_quietly, settings, write_inputs
from samples import padded

import qkov_dist.planning.run_plan
import qkov_dist.run
from qkov_dist import FisherCollector, QKOVConfig, QkovError, QKOVInterferenceMetric, load_heatmap
from qkov_dist.scoring.influence_records import of_samples

UNIT = "metric.sample_scale=unit"


@contextmanager
def one_layer_a_sweep():
    """As where factors of one round of layers fit, and no more."""
    kept = qkov_dist.planning.run_plan.make_sweeps
    qkov_dist.planning.run_plan.make_sweeps = lambda rounds, *_: [[turn] for turn in rounds]
    try:
        yield
    finally:
        qkov_dist.planning.run_plan.make_sweeps = kept


@pytest.fixture
def sweeps():
    with one_layer_a_sweep():
        yield


def norms_of(heatmap) -> np.ndarray:
    return np.concatenate([heatmap.samples_a.gradient_norms, heatmap.samples_b.gradient_norms])


def test_a_run_equals_the_oracle_and_stores_the_norms_that_it_divided_by(config, entry, tmp_path):
    xarray = pytest.importorskip("xarray")
    assert qkov("run", config, "--quiet", UNIT) == 0
    heatmap = load_heatmap(tmp_path / "out" / "heatmap.h5")
    job, model = job_for(entry, sample_scale="unit"), entry.build()
    assert_close(as_blocks(heatmap), expected_scores(entry, model, job))
    np.testing.assert_allclose(norms_of(heatmap), expected_norms(entry, model, job), rtol=1e-5)
    for layer, blocks in expected_influences(entry, model, job).items():
        for block, records in blocks.items():
            expected = of_samples(records)
            got = heatmap.influences[block][heatmap.layers.index(layer)]
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    with xarray.open_dataset(tmp_path / "out" / "heatmap.h5", engine="h5netcdf", group="samples/b") as samples:
        np.testing.assert_array_equal(samples["gradient_norm"], heatmap.samples_b.gradient_norms)
    assert "gradient_norm_a" in heatmap.to_xarray().coords
    assert any("effects are of scaled gradients" in note for note in heatmap.attributes["notes"])
    assert "of a loss in which every sample weighs the same" in (tmp_path / "out" / "report.html").read_text()
    assert qkov("run", config, "--quiet", f"output.dir={tmp_path}/none") == 0
    plain = load_heatmap(tmp_path / "none" / "heatmap.h5")
    assert plain.samples_a.gradient_norms is None
    assert plain.run_id != heatmap.run_id


@pytest.mark.long
def test_several_sweeps_capture_twice_and_say_so(config, tmp_path, capsys, sweeps):
    assert qkov("run", config, "--quiet", UNIT) == 0
    said = capsys.readouterr().err
    assert "run 2 times, for a part of the layers each, each of these once before, for the norms of samples" in said
    assert "norms of samples' gradients, sweep 2 of 2: layers 1; every layer is captured again to be scored" in said
    assert said.index("norms of samples' gradients, sweep 2") < said.index("sweep 1 of 2: layers 0\n")
    swept = load_heatmap(tmp_path / "out" / "heatmap.h5")
    assert qkov("run", config, "--quiet", f"output.dir={tmp_path}/none") == 0
    assert "norms of samples" not in capsys.readouterr().err
    qkov_dist.planning.run_plan.make_sweeps = lambda rounds, *_: [list(rounds)]
    assert qkov("run", config, "--quiet", UNIT, f"output.dir={tmp_path}/once") == 0
    assert_identical(swept, load_heatmap(tmp_path / "once" / "heatmap.h5"))


def test_a_run_goes_on_with_the_norms_of_its_layers_on_disk(config, tmp_path, capsys, monkeypatch, sweeps):
    assert qkov("run", config, "--quiet", UNIT) == 0
    interrupt_at(1, monkeypatch)
    assert qkov("run", config, "--quiet", UNIT, f"output.dir={tmp_path}/again") == 130
    monkeypatch.undo()
    monkeypatch.setattr(qkov_dist.run, "summed_squares", None)  # layer 0 alone would give other norms
    capsys.readouterr()
    assert qkov("run", config, "--quiet", UNIT, f"output.dir={tmp_path}/again") == 0
    assert "1 of 2 layers are on disk" in capsys.readouterr().err
    assert_identical(*(load_heatmap(tmp_path / name / "heatmap.h5") for name in ("again", "out")))


def run_swept(raw: dict, swept: bool) -> list[str]:
    """Run on this rank, in sweeps of one layer where asked."""
    if not swept:
        return run_quietly(raw)
    with one_layer_a_sweep():
        return run_quietly(raw)


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "cut", "swept"),
    [("gpt2", {"shard": "ddp"}, True), ("gpt2", {"shard": "fsdp"}, False), ("llama", {"tp": 2}, False)],
    ids=["ddp in sweeps", "fsdp", "tp"],
)
def test_ranks_divide_by_the_same_norms_as_one_process(model, cut, swept, ranks, tmp_path):
    write_inputs(tmp_path, model)
    sections = {"metric": {"sample_scale": "unit", "include_bias": True, "heads": [0, 2, 3]}}
    alone, together = (
        settings(tmp_path, model, out, how, **sections) for out, how in (("alone", {}), ("together", cut))
    )
    run_quietly(alone)
    ranks(2).run(run_swept, together, swept)
    one, two = (load_heatmap(tmp_path / "out" / out / "heatmap.h5") for out in ("alone", "together"))
    np.testing.assert_allclose(norms_of(two), norms_of(one), rtol=1e-6)
    for block in one.blocks:
        largest = np.abs(one.cross[block]).max()
        np.testing.assert_allclose(two.cross[block], one.cross[block], rtol=0, atol=PASSES * largest)


def collected_with(model, job, factor: float) -> FisherCollector:
    """The job's samples, of which the first of code has so many times the loss."""
    collector = FisherCollector(batch_tokens=24)
    for task, samples in (("math", job.a), ("code", job.b)):
        for place, sample in enumerate(samples):
            if task == "code":
                collector.collection.loss_factor = 1.0 if place else factor
            collector.collect_fisher(model, padded([sample], "right"), task=task, mode="mean")
    return collector


def test_a_sample_without_any_gradient_stays_at_0_and_is_named(entry):
    model, job = entry.build(), job_for(entry)
    metric = QKOVInterferenceMetric(QKOVConfig.from_model(model), collected_with(model, job, 0.0), sample_scale="unit")
    heatmap = metric.compute_heatmap("math", "code")
    assert heatmap.samples_b.gradient_norms[0] == 0
    for scores in heatmap.cross.values():
        assert (scores[..., 0] == 0).all()
        assert (scores[..., 1:] > 0).all()
    (warning,) = (text for text in heatmap.attributes["warnings"] if "sample_scale leaves them at 0" in text)
    assert warning.endswith(f": task 'code', sample {heatmap.samples_b.ids[0]!r}.")


def test_a_loud_sample_fills_the_top_conflicts_unless_samples_are_of_unit_norm(entry):
    model, job, shares = entry.build(), job_for(entry), {}
    config = QKOVConfig.from_model(model)
    for scale in ("none", "unit"):
        for loudness in (1.0, 100.0):
            metric = QKOVInterferenceMetric(config, collected_with(model, job, loudness), sample_scale=scale)
            top = metric.compute_heatmap("math", "code")["V"]["top_conflicts"]
            shares[scale, loudness] = np.mean([conflict["sample_j"] == 0 for conflict in top])
    assert shares["none", 100.0] > 0.8
    assert shares["unit", 100.0] == shares["unit", 1.0] < 0.7


def test_a_pair_is_scaled_as_in_a_heatmap_of_all_layers(entry):
    model, job = entry.build(), job_for(entry)
    collector = collected(model, job)
    metric = QKOVInterferenceMetric(QKOVConfig.from_model(model), collector, sample_scale="unit")
    heatmap = metric.compute_heatmap("math", "code")
    np.testing.assert_allclose(norms_of(heatmap), expected_norms(entry, model, job), rtol=1e-5)
    pair = metric.compute_sample_pair("math", 3, "code", 1, layer=1, head=3)
    for block, score in pair.items():
        scores = heatmap[block]["scores"]
        assert score == pytest.approx(float(scores[3, 1, 1, 3]), abs=PASSES * float(scores.max()))
    fewer = metric.compute_heatmap("math", "code", layers=[1], heads=[0])
    assert (norms_of(fewer) < 0.99 * norms_of(heatmap)).all()
    with pytest.raises(QkovError, match="sample_scale: expected one of none, unit"):
        replace(metric, sample_scale="norm")
