"""Heads tested where their sums are: any number of ranks, partial files, and scores beyond memory, one result."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from comparing import assert_identical
from rounding import PASSES, assert_same_tests
from running import interrupt_at, run_quietly, settings
from samples import mixed_samples, write_task
from zoo import TINY, VOCAB

from qkov_dist import load_heatmap
from qkov_dist import memory as scratch
from qkov_dist.capture.collect import Collection
from qkov_dist.capture.store import FactorStore
from qkov_dist.commands.merge import merge_folder
from qkov_dist.config_file import from_dict
from qkov_dist.distributed.connect import current
from qkov_dist.finish import combine
from qkov_dist.layout.resolve import resolve
from qkov_dist.results.metadata import LayerAxes, make_metadata
from qkov_dist.results.reduce import deal_heads, layer_partial
from qkov_dist.run import run
from qkov_dist.scoring import engine
from qkov_dist.scoring.engine import score_layer
from qkov_dist.scoring.fisher import by_task, fisher_steps, fisher_weights
from qkov_dist.scoring.settings import Roles, ScoreSettings
from qkov_dist.scoring.tiles import Selection, make_tile_plan
from qkov_dist.stats import pair_tests
from qkov_dist.stats.head_tests import layer_tests
from qkov_dist.stats.pair_tests import PairTests
from qkov_dist.stats.statistics import QKOVStatistics

TESTED = {
    "statistics": {"permutations": 200},
    "compute": {"score_dtype": "float64"},
    "metric": {"include_bias": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("combine")
    for task, seed, num in (("a", 1, 6), ("b", 2, 5)):
        write_task(made / f"{task}.jsonl", mixed_samples(num, VOCAB, seed=seed))
    TINY["gpt2"].build().save_pretrained(made / "gpt2")
    return made


@pytest.fixture(scope="module")
def one_process(folder):
    run_quietly(settings(folder, "gpt2", "one", {}, **TESTED))
    return load_heatmap(folder / "out" / "one" / "heatmap.h5")


def assert_same_results(found, expected) -> None:
    for name in ("cross_mean", "overlap"):
        for block in expected.blocks:
            assert_same_tests(found.statistics[name][block], expected.statistics[name][block], name)
    for block in expected.blocks:
        np.testing.assert_allclose(found.fisher[block]["share_a"], expected.fisher[block]["share_a"], rtol=PASSES)
    bias = expected.shared["O_bias"]["cross"]
    np.testing.assert_allclose(found.shared["O_bias"]["cross"], bias, rtol=0, atol=PASSES * np.abs(bias).max())


def run_and_merge_again(raw: dict, merged: str) -> None:
    """A run of these ranks; then its partial files, added by the same ranks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = from_dict(raw)
        run(config)
    merge_folder(config.output.dir, merged, world=current())


@pytest.mark.parametrize(("world_size", "shard"), [(2, "ddp"), (3, "fsdp")])
@pytest.mark.long
def test_ranks_test_the_heads_they_hold(world_size, shard, ranks, folder, one_process):
    out = folder / "out" / f"{shard}{world_size}"
    raw = settings(folder, "gpt2", out.name, {"shard": shard}, **TESTED)
    ranks(world_size).run(run_and_merge_again, raw, str(out / "merged.h5"))
    found = load_heatmap(out / "heatmap.h5")
    assert_same_results(found, one_process)
    assert found.statistics["fdr_corrected"].keys() == one_process.statistics["fdr_corrected"].keys()
    alone = out / "alone.h5"
    merge_folder(out, alone)
    for again in (load_heatmap(alone), load_heatmap(out / "merged.h5")):
        for block in found.blocks:  # added in the order of ranks wherever that is done: bit for bit
            np.testing.assert_array_equal(again.cross[block], found.cross[block])
        assert_same_results(again, found)


def run_with_early_tests(raw: dict) -> list[tuple[int, bool]]:
    """A run that tests what is whole as it is scored, as on a GPU; returns what was tested here, and whether early."""
    taken, take = [], PairTests.take

    def seen(self, layer, part, sizes, there=None):
        taken.append((layer, there is not None))
        take(self, layer, part, sizes, there)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("qkov_dist.finish.tests_at_once", lambda device: True)
        patched.setattr(PairTests, "take", seen)
        run_quietly(raw)
    return taken


def test_layers_tested_as_they_are_scored_have_the_same_tests(folder, one_process, monkeypatch):
    """Bit for bit: also of a run that goes on from a layer on disk, and where a layer's scores are too many to stay."""
    num_threads = torch.get_num_threads()
    raw = settings(folder, "gpt2", "early", {}, **TESTED)
    last = one_process.layers[-1]
    with monkeypatch.context() as until:
        interrupt_at(last, until)
        with pytest.raises(KeyboardInterrupt):
            run_with_early_tests(raw)
    raw["output"]["resume"] = True
    assert run_with_early_tests(raw) == [(last, True), *((layer, False) for layer in one_process.layers[:-1])]
    assert_identical(load_heatmap(folder / "out" / "early" / "heatmap.h5"), one_process)
    monkeypatch.setattr("qkov_dist.scoring.settings.KEPT_BYTES", 1)
    raw["output"]["resume"] = False
    assert run_with_early_tests(raw) == [(layer, False) for layer in one_process.layers]
    assert torch.get_num_threads() == num_threads


class ShortOfMemory:
    """torch, in which there is no room to put scores together."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def stack(self, *_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("where", ["where they were formed", "where they are tested"])
def test_without_room_for_early_tests_they_come_from_the_host(where, folder, one_process, monkeypatch):
    """Scores that cannot be kept, and those that cannot be tested where they are, are the host's anyway."""
    early = where == "where they are tested"

    def short(*arguments):
        if arguments[-1] is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return layer_tests(*arguments)

    if early:
        monkeypatch.setattr(pair_tests, "layer_tests", short)
    else:
        monkeypatch.setattr(engine, "torch", ShortOfMemory())
    raw = settings(folder, "gpt2", "short", {}, **TESTED)
    assert run_with_early_tests(raw) == [(layer, early) for layer in one_process.layers]
    assert_identical(load_heatmap(folder / "out" / "short" / "heatmap.h5"), one_process)


@pytest.mark.parametrize(("world_size", "shard", "early"), [(2, "ddp", True), (3, "fsdp", False)])
@pytest.mark.long
def test_ranks_test_early_what_they_score_whole(world_size, shard, early, ranks, folder, one_process):
    raw = settings(folder, "gpt2", f"early-{shard}", {"shard": shard}, **TESTED)
    by_rank = ranks(world_size).run(run_with_early_tests, raw)
    if early:
        assert sorted(layer for taken in by_rank for layer in taken) == [(layer, True) for layer in one_process.layers]
    else:
        assert by_rank == [[(layer, False) for layer in one_process.layers]] * world_size
    assert_same_results(load_heatmap(folder / "out" / f"early-{shard}" / "heatmap.h5"), one_process)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 40])
def test_every_head_is_dealt_to_one_rank(num_ranks):
    layer = LayerAxes(3, 2, (0, 1, 2, 3), {"Q": (0, 1, 2, 3), "K": (0, 1), "V": (0, 1), "O": (0, 1, 2, 3)})
    dealt = deal_heads(layer, num_ranks)
    for block, heads in layer.heads.items():
        assert [head for share in dealt for head in share[block]] == list(heads)
    sizes = [sum(map(len, share.values())) for share in dealt]
    assert max(sizes) - min(sizes) <= 1


def test_scores_beyond_memory_wait_in_a_file(folder, one_process, monkeypatch):
    monkeypatch.setattr(scratch, "IN_MEMORY_BYTES", 100)
    raw = settings(folder, "gpt2", "scratch", {}, **TESTED)
    raw["output"]["pairs"] = "all"
    run_quietly(raw)
    found = load_heatmap(folder / "out" / "scratch" / "heatmap.h5")
    for block in found.blocks:
        np.testing.assert_array_equal(found.cross[block], one_process.cross[block])
    assert not list((folder / "out" / "scratch").glob("qkov-scratch-*"))


def scored(scope: str, factor: float):
    """Two tasks of one model, B's loss multiplied by a factor; ridge 0."""
    model, num_a, num = TINY["llama"].build().double(), 7, 13
    layout = resolve(model)
    tile_plan = make_tile_plan(layout, Selection(), include_bias=False, num_samples=num)
    store = FactorStore(2**28)
    collection = Collection(store, tile_plan.sites)
    collection.run(model, "a", mixed_samples(num_a, VOCAB, seed=1))
    collection.loss_factor = factor
    collection.run(model, "b", mixed_samples(num - num_a, VOCAB, seed=2))
    steps = fisher_steps((num_a, num - num_a), batch_size=2, scope=scope)
    weights = by_task(fisher_weights(steps, num, estimator="mean", decay=0.9), np.arange(num) >= num_a)
    roles = Roles(tuple(range(num)), weights, slice(0, num), slice(0, num))
    numbers = ScoreSettings(epsilon=1e-300, ridge_absolute=0.0, dtype=torch.float64)
    records = (collection.records[:num_a], collection.records[num_a:])
    attributes = {"score": "interference", "scope": scope, "estimator": "mean"}
    metadata = make_metadata(tile_plan, layout, ("a", "b"), records, pooled=True, attributes=attributes)
    parts = {layer.layer: layer_partial(score_layer(layer, store, roles, numbers)) for layer in tile_plan.layers}
    tests = QKOVStatistics(n_permutations=50)
    return combine(metadata, lambda layer: parts[layer.layer], current(), statistics=tests, pairs="all")


def test_overlap_does_not_move_with_the_loudness_of_a_task_and_cross_mean_does():
    quiet, loud = scored("a", 1.0), scored("a", 10.0)
    for block in quiet.blocks:
        before, after = (x.statistics["overlap"][block]["statistic"] for x in (quiet, loud))
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)
        before, after = (x.statistics["cross_mean"][block]["statistic"] for x in (quiet, loud))
        np.testing.assert_allclose(after, 10 * before, rtol=1e-5)
        np.testing.assert_array_equal(loud.fisher[block]["share_a"], 1.0)
    assert not loud.attributes["warnings"]


def test_a_loud_task_is_seen_in_a_pooled_fisher():
    quiet, loud = scored("pooled", 1.0), scored("pooled", 10.0)
    for block in quiet.blocks:
        of_a = quiet.fisher[block]["share_a"]
        np.testing.assert_allclose(loud.fisher[block]["share_a"], of_a / (of_a + 100 * (1 - of_a)), rtol=1e-5)
        moved = np.abs(loud.statistics["overlap"][block]["statistic"] - quiet.statistics["overlap"][block]["statistic"])
        assert np.nanmax(moved) > 0.01  # not free of scale: the Fisher itself has changed
    assert not quiet.attributes["warnings"]
    (warning,) = loud.attributes["warnings"]
    assert warning.startswith("task 'b' is loud")
