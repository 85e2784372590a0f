"""A run of more than two tasks: every pair against dense autograd under the Fisher of all, in its file."""

from __future__ import annotations

import json
import re
from itertools import combinations

import h5py
import numpy as np
import oracle
import pytest
import xarray
import yaml
from comparing import assert_identical
from influences import records_of
from running import interrupt_at, qkov, run_quietly
from samples import mixed_samples, write_task
from scipy.stats import false_discovery_control
from zoo import VOCAB

from qkov_dist import (
    FisherCollector,
    QKOVConfig,
    QKOVInterferenceMetric,
    QKOVStatistics,
    load_heatmap,
    load_matrix,
)
from qkov_dist.distributed.world import Alone
from qkov_dist.errors import QkovError
from qkov_dist.finish import combine_tasks
from qkov_dist.layout.heads import BLOCKS
from qkov_dist.layout.resolve import resolve
from qkov_dist.results.influences import Samples
from qkov_dist.results.matrix_data import MATRIX_KEYS
from qkov_dist.results.metadata import from_json
from qkov_dist.results.partials import list_partials, read_partial
from qkov_dist.results.reduce import add_layers
from qkov_dist.results.task_pairs import scores_of_pair
from qkov_dist.scoring.influence_records import OPTIMIZERS, SUMS
from qkov_dist.stats import pair_tests

SIZES = {"math": 5, "code": 3, "law": 4}
FIVE = {**SIZES, "chat": 2, "poems": 3}
RELATIVE = 1e-3


def many_config(config, tmp_path, sizes):
    """A configuration of the first tasks of SIZES, and their samples."""
    raw, samples = yaml.safe_load(config.read_text()), {}
    for seed, (name, num) in enumerate(sizes.items(), start=1):
        samples[name] = mixed_samples(num, VOCAB, seed=seed)
        write_task(tmp_path / f"{name}.jsonl", samples[name])
    raw["tasks"] = [{"name": name, "path": str(tmp_path / f"{name}.jsonl")} for name in sizes]
    raw["fisher"] = {"estimator": "mean"}
    config.write_text(yaml.safe_dump(raw))
    return samples


def expected(entry, samples):
    """layer -> block -> per head: gradients [N, p] of all samples, task after task, and R under the Fisher of all."""
    model, pooled = entry.build(), [s for of_task in samples.values() for s in of_task]
    gradients, _ = oracle.per_sample_gradients(model, [(s.input_ids, s.labels) for s in pooled])
    found = {}
    for layer in resolve(model).layers:
        heads = [oracle.heads_of_layer(model, entry.family, layer.module, g) for g in gradients]
        found[layer.index] = {}
        for block in BLOCKS:
            of_heads = [np.stack([h[block][n].numpy() for h in heads]) for n in range(len(heads[0][block]))]
            fishers = [(g**2).mean(0) for g in of_heads]
            ridge = RELATIVE * np.concatenate(fishers).mean()
            found[layer.index][block] = [(g, f + ridge) for g, f in zip(of_heads, fishers, strict=True)]
    return found


def close(found, wanted, rtol=1e-4):
    largest = np.nanmax(np.abs(wanted))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=rtol * largest)


def parts_of(samples):
    edges = np.cumsum([0, *map(len, samples.values())])
    return {name: slice(*edges[n : n + 2]) for n, name in enumerate(samples)}


def assert_every_pair_is_right(path, samples, dense):
    """Scores, changes, curvatures and influences of every pair, and the matrix."""
    matrix, parts = load_matrix(path), parts_of(samples)
    assert matrix.tasks == tuple(samples)
    scores = {block: scores_of(block, dense) for block in BLOCKS}
    means = {block: means_of(of_block, parts.values()) for block, of_block in scores.items()}
    for block in BLOCKS:
        close(matrix.values[block]["mean"], means[block])
    for (t, a), (u, b) in combinations(enumerate(parts), 2):
        heatmap = load_heatmap(path, (a, b))
        for block in BLOCKS:
            close(heatmap.cross[block], scores[block][..., parts[a], parts[b]])
            of_block = means[block]
            with np.errstate(divide="ignore", invalid="ignore"):  # samples of two tokens have no gradient of Q and K
                overlap = 0.5 * np.log(of_block[t, u] * of_block[u, t] / (of_block[t, t] * of_block[u, u]))
            overlap[~np.isfinite(overlap)] = np.nan
            np.testing.assert_allclose(matrix.values[block]["overlap"][t, u], overlap, rtol=0, atol=2e-4)
            if heatmap.statistics:
                tested = heatmap.statistics["overlap"][block]["statistic"]  # of none that some labelling lacks
                np.testing.assert_allclose(tested, np.where(np.isnan(tested), np.nan, overlap), rtol=0, atol=2e-4)
            assert_effects(matrix, heatmap, block, parts, (a, b), dense)


def scores_of(block, dense):
    """Among all pooled samples, NaN of a sample with itself: [layer, head, N, N]."""
    found = np.array([[(g**2 / r) @ np.abs(g).T for g, r in blocks[block]] for _, blocks in sorted(dense.items())])
    found[..., range(found.shape[-1]), range(found.shape[-1])] = np.nan
    return found


def means_of(scores, parts):
    """[task, task, layer, head]."""
    return np.array([[np.nanmean(scores[..., rows, cols], axis=(-2, -1)) for cols in parts] for rows in parts])


def assert_effects(matrix, heatmap, block, parts, pair, dense):
    both = [*range(*parts[pair[0]].indices(99)), *range(*parts[pair[1]].indices(99))]
    num_a = len(heatmap.samples_a)
    is_a = np.arange(len(both)) < num_a
    records = np.stack(
        [
            [records_of(g[both], r, Samples(is_a, ~is_a), num_a) for g, r in blocks[block]]
            for _, blocks in sorted(dense.items())
        ]
    )
    t, u = (matrix.tasks.index(name) for name in pair)
    for place, optimizer in enumerate(OPTIMIZERS):
        effects, of_optimizer = heatmap.effects[block][optimizer], records[:, :, place]
        close(heatmap.influences[block][:, :, place], of_optimizer[..., len(SUMS) :])
        close(effects["curvature_a"], of_optimizer[..., 0])
        close(effects["curvature_b"], of_optimizer[..., 1])
        for task, at, num in ((t, 2, num_a), (u, 3, len(both) - num_a)):
            own = (num * of_optimizer[..., at] + of_optimizer[..., at + 2]) / (num - 1)
            close(effects["own_a" if at == 2 else "own_b"], own, 1e-3)
            close(matrix.values[block][f"change_{optimizer}"][task, task], own, 1e-3)
        for other in ((t, u), (u, t)):
            np.testing.assert_array_equal(matrix.values[block][f"change_{optimizer}"][other], effects["change"])


@pytest.mark.parametrize("num", [3, pytest.param(11, marks=pytest.mark.long)])
def test_every_pair_of_many_tasks_equals_dense_autograd_under_the_fisher_of_all(config, entry, tmp_path, num):
    sizes = SIZES if num == 3 else {f"task {n}": 2 + n % 2 for n in range(num)}
    samples = many_config(config, tmp_path, sizes)
    tests = "statistics.permutations=10" if num == 3 else "statistics.enabled=false"
    assert qkov("run", config, "--quiet", tests) == 0
    assert_every_pair_is_right(tmp_path / "out" / "heatmap.h5", samples, expected(entry, samples))


@pytest.mark.long
@pytest.mark.parametrize("shard", ["ddp", "fsdp"])
def test_five_tasks_on_two_ranks_and_merged(config, entry, tmp_path, ranks, shard):
    samples, out = many_config(config, tmp_path, FIVE), tmp_path / "out"
    raw = yaml.safe_load(config.read_text())
    ranks(2).run(run_quietly, {**raw, "parallel": {"shard": shard}})
    dense = expected(entry, samples)
    assert_every_pair_is_right(out / "heatmap.h5", samples, dense)
    assert qkov("merge", out, "--quiet", "--output", tmp_path / "merged.h5") == 0
    assert_same_matrix(load_matrix(tmp_path / "merged.h5"), load_matrix(out / "heatmap.h5"))
    for rank in range(2):
        with pytest.raises(AssertionError):  # a replica counted twice
            assert_every_pair_is_right(summed(out, tmp_path / f"twice{rank}.h5", twice=rank), samples, dense)


def summed(folder, path, twice):
    """The file that the partial files add up to, one rank's counted twice."""
    partials = [read_partial(path) for path in list_partials(folder)]
    counted = [*partials, partials[twice]]
    metadata = from_json(partials[0].header.extra, "test")
    matrix = combine_tasks(metadata, lambda x: add_layers([p.read_layer(x.layer) for p in counted]), Alone())
    matrix.save(path)
    return path


def assert_same_matrix(one, other):
    for block in BLOCKS:
        for name in MATRIX_KEYS:
            np.testing.assert_array_equal(one.values[block][name], other.values[block][name])
    for pair in other.pairs:
        assert_identical(one.heatmap(*pair), other.heatmap(*pair))


@pytest.mark.long
def test_a_run_of_many_tasks_goes_on_bit_for_bit_and_is_not_computed_again(config, tmp_path, monkeypatch, capsys):
    many_config(config, tmp_path, SIZES)
    assert qkov("run", config, "--quiet") == 0
    again = f"output.dir={tmp_path}/again"
    interrupt_at(1, monkeypatch)
    assert qkov("run", config, "--quiet", again) == 130
    monkeypatch.undo()
    assert qkov("run", config, "--quiet", again) == 0
    assert "1 of 2 layers are on disk" in capsys.readouterr().err
    assert_same_matrix(load_matrix(tmp_path / "again"), load_matrix(tmp_path / "out"))
    assert qkov("run", config, "--quiet", again) == 0
    assert "finished already" in capsys.readouterr().err


def test_pairs_of_tasks_tested_as_they_are_scored_are_the_same(config, tmp_path, monkeypatch):
    """As a GPU tests them: a pair's part is taken from the scores of all where these were formed."""
    many_config(config, tmp_path, SIZES)
    found, taken = [], []
    monkeypatch.setattr(pair_tests, "scores_of_pair", lambda *args: taken.append(args) or scores_of_pair(*args))
    for early in (False, True):
        monkeypatch.setattr("qkov_dist.finish.tests_at_once", lambda device, early=early: early)
        assert qkov("run", config, "output.resume=false") == 0
        found.append(load_matrix(tmp_path / "out" / "heatmap.h5"))
    assert len(taken) == len(found[0].pairs) * len(found[0].layers) * len(BLOCKS)
    for pair in found[0].pairs:
        assert_identical(found[1].heatmap(*pair), found[0].heatmap(*pair))


@pytest.mark.long
def test_pairs_none_keeps_the_matrix_and_all_keeps_every_score(config, tmp_path):
    many_config(config, tmp_path, SIZES)
    found, smaller = {}, ("statistics.permutations=10", "metric.layers=1")
    for pairs in ("none", "cross", "all"):
        out = f"output.dir={tmp_path / pairs}"
        assert qkov("run", config, "--quiet", f"output.pairs={pairs}", *smaller, out) == 0
        found[pairs] = load_matrix(tmp_path / pairs)
    none, cross, every = (found[pairs].heatmap("code", "law") for pairs in ("none", "cross", "all"))
    assert none.cross is cross.pooled is None
    assert every.pooled["K"].shape[-2:] == (7, 7)
    for block in BLOCKS:
        for name in MATRIX_KEYS:
            np.testing.assert_array_equal(found["none"].values[block][name], found["all"].values[block][name])
        np.testing.assert_allclose(none.mean[block], cross.mean[block], rtol=1e-14)
        np.testing.assert_array_equal(every.cross[block], cross.cross[block])
        np.testing.assert_array_equal(every.mean[block], cross.mean[block])
        for key, arrays in cross.statistics["overlap"][block].items():
            np.testing.assert_array_equal(none.statistics["overlap"][block][key], arrays)
    tested = QKOVStatistics(n_permutations=10).test_heatmap(every)
    np.testing.assert_array_equal(tested["overlap"]["Q"]["p_value"], every.statistics["overlap"]["Q"]["p_value"])


def test_a_pair_lies_in_the_file_as_a_file_of_two_tasks_does(config, tmp_path):
    many_config(config, tmp_path, SIZES)
    assert qkov("run", config, "--quiet", "statistics.permutations=10") == 0
    path = tmp_path / "out" / "heatmap.h5"
    with h5py.File(path) as file:
        pair = file["pairs/math__law"]
        assert {"scores", "heatmap", "statistics", "effects", "influences", "samples", "layer"} <= {*pair}
        assert pair["samples/b/text"] == file["samples/law/text"]  # once in the file
        assert pair["scores/Q"].dims[1][0] == file["head"]
        assert file["matrix/K/change_adam"].shape == (3, 3, 2, 2)
    with xarray.open_dataset(path, engine="h5netcdf", group="matrix/V") as opened:
        assert opened["overlap"].dims == ("task", "task_right", "layer", "kv_head")
    with xarray.open_dataset(path, engine="h5netcdf", group="pairs/math__law/scores") as opened:
        assert opened["Q"].sizes == {"layer": 2, "head": 4, "sample_a": 5, "sample_b": 4}


def test_pairs_that_are_not_there_are_refused_with_those_that_are(config, tmp_path):
    many_config(config, tmp_path, SIZES)
    assert qkov("run", config, "--quiet", "statistics.enabled=false", "metric.layers=0") == 0
    for pair, what in (
        (None, "Name two of math, code, law"),
        (("law", "math"), "Ask for ('math', 'law')"),
        (("math", "mth"), "one of math, code, law"),
        (("math",), "Name two of"),
    ):
        with pytest.raises(QkovError, match=re.escape(what)):
            load_heatmap(tmp_path / "out", pair)


@pytest.mark.long
def test_from_python_every_pair_is_the_same_and_is_tested(entry, tmp_path):
    samples = {name: mixed_samples(num, VOCAB, seed=seed) for seed, (name, num) in enumerate(SIZES.items(), start=1)}
    model, collector = entry.build(), FisherCollector(batch_tokens=24)
    for task, of_task in samples.items():
        collector.collect_fisher(model, of_task, task=task)
    metric = QKOVInterferenceMetric(QKOVConfig.from_model(model), collector)
    matrix = QKOVStatistics(n_permutations=20).test_matrix(metric.compute_matrix(["math", "code", "law"]))
    assert matrix.heatmap("math", "law").tests["Q"]["p_value"].shape == (2, 4)
    matrix.save(tmp_path / "heatmap.h5")
    assert_every_pair_is_right(tmp_path / "heatmap.h5", samples, expected(entry, samples))
    for tasks, what in ((["math", "code"], "3 to 64 different names"), (["math", "code", "math"], "different names")):
        with pytest.raises(QkovError, match=what):
            metric.compute_matrix(tasks)


@pytest.mark.long
@pytest.mark.parametrize("pairs", ["cross", "all"])
def test_all_pairs_are_tested_again_and_corrected_together_on_request(config, tmp_path, pairs, capsys):
    many_config(config, tmp_path, SIZES)
    run = ("run", config, "--quiet", f"output.pairs={pairs}", "metric.layers=0", "statistics.permutations=20")
    assert qkov(*run) == 0
    before, out = load_matrix(tmp_path / "out"), tmp_path / "out"
    assert qkov("stats", out, "--permutations", 30, "--family", "all", "--output", tmp_path / "again.h5") == 0
    assert "writing tests into" in capsys.readouterr().err
    again = load_matrix(tmp_path / "again.h5")
    assert "made again, those of effects not: q-values are over" in again.attributes["notes"][-1]
    for block in BLOCKS:
        tests = [again.heatmaps[pair].statistics["overlap"][block] for pair in again.pairs]
        assert_corrected_together(tests, "q_value")
    for pair in before.pairs:
        one, other = before.heatmap(*pair), again.heatmap(*pair)
        within = QKOVStatistics(n_permutations=30).test_heatmap(one) if pairs == "all" else None
        for block in BLOCKS:
            np.testing.assert_array_equal(one.cross[block], other.cross[block])
            np.testing.assert_array_equal(one.effects[block]["sgd"]["q_value"], other.effects[block]["sgd"]["q_value"])
            if within is not None:
                p_max = np.minimum(3 * within["overlap"][block]["p_max"], 1)
                np.testing.assert_array_equal(other.statistics["overlap"][block]["p_max"], p_max)


def assert_corrected_together(tests, name):
    p_values = np.stack([arrays["p_value"] for arrays in tests])
    found, there = np.full_like(p_values, np.nan), ~np.isnan(p_values)
    found[there] = false_discovery_control(p_values[there])
    np.testing.assert_allclose(np.stack([arrays[name] for arrays in tests]), found, rtol=1e-12)


@pytest.mark.long
def test_a_run_corrects_effects_over_all_pairs_where_asked(config, tmp_path):
    many_config(config, tmp_path, SIZES)
    run = ("run", config, "--quiet", "statistics.permutations=20", "metric.layers=0")
    assert qkov(*run) == 0
    assert qkov(*run, "statistics.family=all", f"output.dir={tmp_path / 'all'}") == 0
    within, over = load_matrix(tmp_path / "out"), load_matrix(tmp_path / "all")
    assert any("within each of 3 pairs" in note for note in within.attributes["notes"])
    assert any("all 3 pairs together" in note for note in over.attributes["notes"])
    for block in BLOCKS:
        one, other = ([found.heatmaps[pair].effects[block]["adam"] for pair in found.pairs] for found in (within, over))
        assert_corrected_together(other, "q_value")
        p_max = np.minimum(3 * np.stack([arrays["p_max"] for arrays in one]), 1)
        np.testing.assert_array_equal(np.stack([arrays["p_max"] for arrays in other]), p_max)


def test_heads_of_a_pair_and_what_to_do_name_the_pair(config, tmp_path, capsys):
    many_config(config, tmp_path, SIZES)
    assert qkov("run", config, "--quiet", "statistics.permutations=10", "metric.layers=0") == 0
    out = tmp_path / "out"
    capsys.readouterr()
    assert qkov("heads", out) == 2
    assert "Name two of math, code, law" in capsys.readouterr().err
    assert qkov("heads", out, "--pair", "math", "law", "--top", 3, "--format", "json") == 0
    heads = json.loads(capsys.readouterr().out)["heads"]
    heatmap = load_heatmap(out, ("math", "law"))
    largest = max(np.nanmax(arrays["adam"]["change"]) for arrays in heatmap.effects.values())
    assert heads[0]["value"] == pytest.approx(largest, rel=1e-9)
    commands = [action.command for action in heatmap.verdict.actions]
    assert all("--pair math law" in command for command in commands if command.startswith("qkov heads"))
    assert any("tasks.0.max_samples" in command and "tasks.2.max_samples" in command for command in commands)


def test_samples_that_a_third_task_has_count_in_no_effect(config, tmp_path):
    samples = many_config(config, tmp_path, SIZES)
    write_task(tmp_path / "law.jsonl", [samples["math"][0], *samples["law"]])
    assert qkov("run", config, "--quiet", "statistics.allow_shared_samples=true", "metric.layers=0") == 0
    heatmap = load_heatmap(tmp_path / "out", ("math", "code"))
    assert heatmap.samples_a.elsewhere.tolist() == [True, False, False, False, False]
    assert heatmap.counted.sizes == (4, 3)
    for block, influences in heatmap.influences.items():
        change = influences[..., 0, 1:5].mean(-1)  # of A's samples, and of B's, as neither mean has the copy
        np.testing.assert_allclose(change, influences[..., 0, 5:].mean(-1), rtol=1e-3, atol=1e-6 * abs(change).max())
        np.testing.assert_allclose(heatmap.effects[block]["sgd"]["change"], change, rtol=1e-12)
