"""Intervals of overlap freed of samples' own shares of the Fisher: the same of every way to the same scores."""

from __future__ import annotations

import dataclasses
import json

import h5py
import numpy as np
import pytest
from rounding import PASSES, assert_same_tests
from running import qkov, run_quietly, settings
from samples import mixed_samples, write_task
from zoo import TINY, VOCAB

from qkov_dist import FisherCollector, QKOVConfig, QKOVInterferenceMetric, load_heatmap, load_matrix
from qkov_dist.commands.merge import merge_folder
from qkov_dist.config_file import from_dict
from qkov_dist.run import run
from qkov_dist.scoring.own_share_records import KNOWN
from qkov_dist.stats.statistics import QKOVStatistics

SIZES = {"a": 6, "b": 5, "c": 4}
TESTED = {"statistics": {"permutations": 30}, "compute": {"score_dtype": "float64"}, "fisher": {"estimator": "mean"}}
ENDS = ("ci_low", "ci_high")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("freed")
    for seed, (task, num) in enumerate(SIZES.items(), start=1):
        write_task(made / f"{task}.jsonl", mixed_samples(num, VOCAB, seed=seed))
    TINY["llama"].build().save_pretrained(made / "llama")
    return made


def raw_settings(folder, out: str, parallel: dict | None = None) -> dict:
    raw = settings(folder, "llama", out, parallel or {}, **TESTED)
    raw["output"]["pairs"] = "all"
    return raw


@pytest.fixture(scope="module")
def finished(folder):
    run_quietly(raw_settings(folder, "one"))
    return folder / "out" / "one" / "heatmap.h5"


def ends(tests) -> dict[str, np.ndarray]:
    return {f"{block} {end}": arrays[end] for block, arrays in tests["overlap"].items() for end in ENDS}


def test_a_run_frees_intervals_and_says_so_and_a_test_of_its_file_gives_the_same(finished, tmp_path):
    heatmap = load_heatmap(finished)
    assert heatmap.own_shares["K"].shape == (*heatmap.mean["K"].shape, len(KNOWN), 11)
    assert "own share of the Fisher does" in heatmap.statistics["notes"][-1]
    assert qkov("stats", finished.parent, "--output", tmp_path / "again.h5") == 0
    again = load_heatmap(tmp_path / "again.h5")
    for name, values in ends(heatmap.statistics).items():
        np.testing.assert_array_equal(ends(again.statistics)[name], values)
    for block, values in heatmap.own_shares.items():
        np.testing.assert_array_equal(again.own_shares[block], values)


def test_a_file_of_before_is_tested_as_it_was_and_says_so(finished, tmp_path):
    heatmap = load_heatmap(finished)
    dataclasses.replace(heatmap, own_shares=None).save(tmp_path / "before.h5")
    with h5py.File(tmp_path / "before.h5") as file:
        assert "own_shares" not in file
    tested = QKOVStatistics(n_permutations=30).test_heatmap(load_heatmap(tmp_path / "before.h5"))
    assert "Intervals take the Fisher as given" in tested["notes"][-1]
    for block, arrays in tested["overlap"].items():
        freed = heatmap.statistics["overlap"][block]
        for key in arrays.keys() - {*ENDS}:
            np.testing.assert_array_equal(arrays[key], freed[key], err_msg=key)
        there = np.isfinite(freed["ci_low"])
        assert there.any()
        assert (np.abs(arrays["ci_high"] - freed["ci_high"])[there] > 1e-4).any()


def test_from_python_they_are_those_of_a_run(finished):
    heatmap, model, collector = load_heatmap(finished), TINY["llama"].build(), FisherCollector()
    for seed, task in enumerate(("a", "b"), start=1):
        collector.collect_fisher(model, mixed_samples(SIZES[task], VOCAB, seed=seed), task=task, mode="mean")
    metric = QKOVInterferenceMetric(QKOVConfig.from_model(model), collector, dtype="float64")
    found = metric.compute_heatmap("a", "b")
    for block, values in heatmap.own_shares.items():
        np.testing.assert_allclose(found.own_shares[block], values, rtol=PASSES, atol=PASSES)
    assert metric.compute_heatmap("a", "b", pairs="cross").own_shares is None
    signed = QKOVInterferenceMetric(QKOVConfig.from_model(model), collector, score="signed")
    assert signed.compute_heatmap("a", "b").own_shares is None


def run_here(raw: dict) -> None:
    run(from_dict(raw))


@pytest.mark.long
@pytest.mark.parametrize("shard", ["ddp", "fsdp"])
def test_ranks_and_merged_files_give_what_one_process_does(finished, folder, ranks, shard, tmp_path):
    raw, one = raw_settings(folder, shard, {"shard": shard}), load_heatmap(finished)
    ranks(2).run(run_here, raw)
    merge_folder(folder / "out" / shard, tmp_path / "merged.h5")
    for path in (folder / "out" / shard / "heatmap.h5", tmp_path / "merged.h5"):
        found = load_heatmap(path)
        for block, values in one.own_shares.items():
            np.testing.assert_allclose(found.own_shares[block], values, rtol=PASSES, atol=PASSES)
            assert_same_tests(found.statistics["overlap"][block], one.statistics["overlap"][block], "overlap")


@pytest.mark.long
def test_a_pair_of_many_tasks_has_its_part_and_its_file_is_tested_alike(folder, tmp_path):
    raw = raw_settings(folder, "many")
    raw["tasks"] = [{"name": task, "path": str(folder / f"{task}.jsonl")} for task in SIZES]
    run_quietly(raw)
    path = folder / "out" / "many" / "heatmap.h5"
    for pair in load_matrix(path).pairs:
        heatmap = load_heatmap(path, pair)
        num = sum(SIZES[task] for task in pair)
        assert heatmap.own_shares["Q"].shape[-2:] == (len(KNOWN), num)
        again = ends(QKOVStatistics(n_permutations=30).test_heatmap(heatmap))
        for name, values in ends(heatmap.statistics).items():
            np.testing.assert_array_equal(again[name], values)


def test_nothing_is_freed_where_samples_have_copies(folder):
    raw = raw_settings(folder, "copies")
    lines = (folder / "a.jsonl").read_text().splitlines()
    copy = json.dumps(json.loads(lines[-1]) | {"id": "copy"})
    (folder / "twice.jsonl").write_text("\n".join([*lines, copy]) + "\n")
    raw["tasks"][0]["path"] = str(folder / "twice.jsonl")
    run_quietly(raw)
    heatmap = load_heatmap(folder / "out" / "copies" / "heatmap.h5")
    assert "Intervals take the Fisher as given" in heatmap.statistics["notes"][-1]
    given = QKOVStatistics(n_permutations=30).test_heatmap(dataclasses.replace(heatmap, own_shares=None))
    for name, values in ends(heatmap.statistics).items():
        np.testing.assert_array_equal(ends(given)[name], values)
