"""`qkov stats`: the tests of a finished run are replaced, and nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from heatmaps import make_heatmap
from samples import mixed_samples, write_task
from zoo import TINY, VOCAB

from qkov_dist import load_heatmap
from qkov_dist.cli import main
from qkov_dist.config import ModelConfig, OutputConfig, RunConfig, StatisticsConfig, TaskConfig
from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.heatmap_data import cross_of_pooled
from qkov_dist.results.metadata import HeatmapMetadata, LayerAxes, to_json
from qkov_dist.results.partial_schema import BlockPartial, PartialHeader
from qkov_dist.results.partials import PartialWriter, partial_path
from qkov_dist.run import run
from qkov_dist.scoring.influence_records import no_influences
from qkov_dist.scoring.own_share_records import no_shares
from qkov_dist.stats.statistics import QKOVStatistics

CONFIG = {"statistics": {"permutations": 30, "fdr_alpha": 0.1, "seed": 4}}


def heatmap(score: str = "interference") -> Heatmap:
    made = make_heatmap()
    attributes = {**made.attributes, "config": CONFIG, "score": score, "estimator": "mean", "scope": "pooled"}
    return dataclasses.replace(made, attributes=attributes)


def metadata_of(made: Heatmap) -> HeatmapMetadata:
    def heads(place: int, block: str) -> tuple[int, ...]:
        return tuple(int(made.natives(block)[at]) for at in np.flatnonzero(made.present[block][place]))

    layers = tuple(
        LayerAxes(
            layer, int(made.groups[place]), heads(place, "Q"), {b: heads(place, b) for b in made if heads(place, b)}
        )
        for place, layer in enumerate(made.layers)
    )
    tables = (made.samples_a, made.samples_b)
    return HeatmapMetadata((made.task_a, made.task_b), layers, tables, made.pooled is not None, made.attributes)


def write_partials(folder: Path, made: Heatmap, *, world_size: int = 2, run_id: str = "run-1") -> None:
    """Each rank holds a share of every head: a multiple of a power of two, so that the sum is exact."""
    metadata = metadata_of(made)
    stored = made.pooled if made.pooled is not None else made.cross
    n_left, n_right = next(iter(stored.values())).shape[-2:]
    for rank in range(world_size):
        header = PartialHeader(
            run_id,
            rank,
            world_size,
            n_left,
            n_right,
            made.layers,
            metadata.pooled,
            to_json(metadata) if rank == 0 else {},
        )
        share = {1: (1.0,), 2: (0.25, 0.75)}[world_size][rank]
        with PartialWriter(partial_path(folder, rank), header) as writer:
            for place, layer in enumerate(metadata.layers):
                blocks = {}
                for block, owned in layer.heads.items():
                    at = [made.natives(block).index(head) for head in owned]
                    sums = np.tile([1.0, 2.0, 0.1, 0.0, 0.5], (len(at), 1))
                    scores = stored[block][place, at] * np.float32(share)
                    blocks[block] = BlockPartial(
                        np.array(owned), scores, sums, no_influences(len(at)), no_shares(len(at))
                    )
                writer.write_layer(layer.layer, blocks)


def qkov(*arguments: object) -> int:
    return main(["stats", *map(str, arguments)])


def assert_same_tests(found: Heatmap, expected: dict) -> None:
    for statistic in ("cross_mean", "overlap"):
        for block, arrays in expected[statistic].items():
            for name, array in arrays.items():
                np.testing.assert_allclose(found.statistics[statistic][block][name], array, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("pairs", ["none", "cross", "all"])
def test_the_tests_are_replaced_and_nothing_else(pairs, tmp_path, capsys):
    made = heatmap()
    made.save(tmp_path / "heatmap.h5", pairs)
    if pairs != "all":
        write_partials(tmp_path, made)
    before = load_heatmap(tmp_path / "heatmap.h5")
    assert qkov(tmp_path, "--permutations", 20, "--seed", 7, "--alternative", "two-sided") == 0
    assert "strongest heads" in capsys.readouterr().out
    after = load_heatmap(tmp_path / "heatmap.h5")
    tests = QKOVStatistics(
        fdr_alpha=0.1, n_permutations=20, seed=7, alternative="two-sided"
    )  # the configuration's, where nothing was given
    assert_same_tests(after, tests.test_heatmap(made))
    assert after.run_id == before.run_id
    assert after.attributes["seeds"] == {"statistics": 7}
    assert {**after.attributes, "seeds": None} == {**before.attributes, "seeds": None}
    for group in ("mean", "present", "cross", "pooled"):
        old, new = getattr(before, group), getattr(after, group)
        assert (old is None) == (new is None), group
        for block in old or ():
            np.testing.assert_array_equal(old[block], new[block])
    assert (after.pooled is not None) == (pairs == "all")
    assert (after.cross is not None) == (pairs != "none")


def test_a_run_tested_again_as_it_was_gives_what_it_had(tmp_path, capsys):
    model = tmp_path / "model"
    TINY["llama"].build().save_pretrained(model)
    for task, seed in (("a", 1), ("b", 2)):
        write_task(tmp_path / f"{task}.jsonl", mixed_samples(6, VOCAB, seed=seed))
    first, second = (TaskConfig(name=task, path=str(tmp_path / f"{task}.jsonl")) for task in ("a", "b"))
    run(
        RunConfig(
            model=ModelConfig(path=str(model)),
            tasks=(first, second),
            statistics=StatisticsConfig(permutations=40, seed=5),
            output=OutputConfig(dir=str(tmp_path / "out")),
        ),
    )
    before = load_heatmap(tmp_path / "out" / "heatmap.h5")
    assert qkov(tmp_path / "out") == 0
    after = load_heatmap(tmp_path / "out" / "heatmap.h5")
    for name in ("settings", "fdr_corrected", "undefined"):
        assert after.statistics[name] == before.statistics[name]
    np.testing.assert_array_equal(after.tests["K"]["p_value"], before.tests["K"]["p_value"])
    assert qkov(tmp_path / "out", "--permutations", 900, "--statistic", "cross_mean") == 0
    again = load_heatmap(tmp_path / "out" / "heatmap.h5")
    assert again.statistics["settings"]["n_labellings"] == 900 + 1
    assert again.attributes["config"] == before.attributes["config"]


def test_settings_that_are_not_given_are_those_of_the_last_test(tmp_path):
    tests = QKOVStatistics(n_permutations=20, seed=3, statistic="cross_mean", confidence=0.8)
    made = heatmap()
    made.with_statistics(tests.test_heatmap(made)).save(tmp_path / "heatmap.h5")
    assert qkov(tmp_path, "--alpha", 0.5) == 0
    after = load_heatmap(tmp_path / "heatmap.h5")
    assert_same_tests(after, dataclasses.replace(tests, fdr_alpha=0.5).test_heatmap(made))
    assert after.statistics["settings"]["statistic"] == "cross_mean"
    assert qkov(tmp_path, "--statistic", "overlap") == 0
    assert load_heatmap(tmp_path / "heatmap.h5").deciding == "overlap"


def test_signed_scores_are_tested_by_their_mean(tmp_path, capsys):
    heatmap("signed").save(tmp_path / "heatmap.h5")
    assert qkov(tmp_path) == 0
    settings = load_heatmap(tmp_path / "heatmap.h5").statistics["settings"]
    assert (settings["statistic"], settings["alternative"]) == ("cross_mean", "two-sided")
    assert qkov(tmp_path, "--statistic", "overlap") == 2
    assert "cross_mean for signed" in capsys.readouterr().err


def test_without_a_finished_run(tmp_path, capsys):
    assert qkov(tmp_path) == 2
    assert "finished run" in capsys.readouterr().err


def test_without_pooled_scores_anywhere_the_settings_that_keep_them_are_named(tmp_path, capsys):
    made = heatmap()
    made.save(tmp_path / "heatmap.h5", "cross")
    content = (tmp_path / "heatmap.h5").read_bytes()
    assert qkov(tmp_path) == 2
    told = capsys.readouterr().err
    assert "output.pairs=all" in told
    assert "statistics.enabled=true and output.partials=true" in told
    write_partials(tmp_path, dataclasses.replace(made, pooled=None, cross=cross_of_pooled(made.pooled, 4)))
    assert qkov(tmp_path) == 2
    assert "between the two tasks only" in capsys.readouterr().err
    assert (tmp_path / "heatmap.h5").read_bytes() == content


def _other_run(folder: Path) -> None:
    for path in folder.glob("partial*"):
        path.unlink()
    write_partials(folder, heatmap(), run_id="run-2")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: partial_path(folder, 1).unlink(), "none of ranks [1]"),
        (lambda folder: [path.unlink() for path in folder.glob("partial*")], "no partial files"),
        (_other_run, "run run-2"),
    ],
)
def test_partial_files_of_less_or_another_run_are_refused(damage, told, tmp_path, capsys):
    made = heatmap()
    made.save(tmp_path / "heatmap.h5", "cross")
    write_partials(tmp_path, made)
    damage(tmp_path)
    assert qkov(tmp_path) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("setting", [("--permutations", "1"), ("--alpha", "1.5"), ("--seed", "-1")])
def test_settings_out_of_range_are_refused(setting, tmp_path, capsys):
    heatmap().save(tmp_path / "heatmap.h5")
    assert qkov(tmp_path, *setting) == 2
    assert "statistics." in capsys.readouterr().err


def test_another_file_is_written_where_one_is_named_and_what_is_replaced_is_said(tmp_path, capsys):
    made = heatmap()
    made.save(tmp_path / "heatmap.h5", "all")
    assert qkov(tmp_path, "--permutations", 20) == 0
    assert f"writing tests into {tmp_path / 'heatmap.h5'}" in capsys.readouterr().err
    content = (tmp_path / "heatmap.h5").read_bytes()
    other = tmp_path / "other.h5"
    assert qkov(tmp_path, "--permutations", 25, "--alternative", "less", "--output", other) == 0
    printed = capsys.readouterr()
    assert f"writing tests into {other}" in printed.err
    assert str(other) in printed.out
    assert (tmp_path / "heatmap.h5").read_bytes() == content
    assert load_heatmap(other).statistics["settings"]["n_permutations"] == 25
    np.testing.assert_array_equal(load_heatmap(other).pooled["Q"], load_heatmap(tmp_path / "heatmap.h5").pooled["Q"])
    assert qkov(tmp_path, "--seed", 9) == 0
    assert f"replacing the tests in {tmp_path / 'heatmap.h5'} (seed 4 -> 9)" in capsys.readouterr().err


def test_another_runs_file_is_not_written_over(tmp_path, capsys):
    heatmap().save(tmp_path / "heatmap.h5")
    other = tmp_path / "other.h5"
    dataclasses.replace(heatmap(), attributes={**heatmap().attributes, "run_id": "run-9"}).save(other)
    content = other.read_bytes()
    assert qkov(tmp_path, "--output", other) == 2
    assert "run-9" in capsys.readouterr().err
    assert other.read_bytes() == content


def test_the_option_that_was_given_up_says_what_took_its_place(tmp_path, capsys):
    assert qkov(tmp_path, "--bootstrap", 100) == 2
    assert "--confidence" in capsys.readouterr().err
