"""Short forms of the studies of scale: fewer ranks, fewer files."""

from __future__ import annotations

import argparse

import h5py
import pytest
from many_files import Files, merged
from scale import CUTS, planned, row

from qkov_dist.results.partials import partial_path


@pytest.mark.long
def test_a_plan_of_many_ranks_is_made_with_its_numbers(tmp_path):
    cut, ranks = "`ep: 32, tp: 4, shard: fsdp, replicate: 32`", 1024
    plan = planned(CUTS[cut], tmp_path, argparse.Namespace(ranks=ranks, samples=8, tokens=64))
    assert plan.is_sound, plan.message
    assert len(plan.numbers["ranks"]) == ranks
    name, *_, fits, sent, least, _ = row(cut, plan)
    assert (name, fits) == (cut, "fits")
    assert sent > 0
    assert 1 <= least < 1.001


@pytest.mark.long
def test_many_files_are_merged_with_few_of_them_open(tmp_path):
    files = Files(tmp_path, 3)
    folder = files.write(40)
    code, _, _ = merged(folder, 32)
    assert code == 0
    assert files.faults(folder) == []
    with h5py.File(partial_path(folder, 39), "r+") as file:
        for scores in file["partial/O"].values():
            scores[...] = 2 * scores[()]
    assert files.faults(folder) == ["O: the heatmap is not the sum of the files"]
