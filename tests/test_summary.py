"""What a finished run prints."""

from __future__ import annotations

import numpy as np
import pytest
from heatmaps import HEADS, LAYERS, make_heatmap, make_statistics

from qkov_dist.summary import NUM_SHOWN, print_summary


@pytest.mark.parametrize("deciding", ["cross_mean", "overlap"])
def test_the_strongest_heads_come_with_the_statistic_that_decides(deciding: str, capsys, tmp_path) -> None:
    tests = make_statistics() | {"settings": {"statistic": deciding}}
    heatmap = make_heatmap().with_statistics(tests)
    print_summary(heatmap, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if line.startswith("block"))
    assert header.split() == ["block", "layer", "head", "mean", "interference", deciding, "q"]
    rows = [line.split() for line in lines if line.startswith("Q ")]
    assert len(rows) == NUM_SHOWN
    layer, head = np.unravel_index(np.nanargmax(heatmap.mean["Q"]), heatmap.mean["Q"].shape)
    arrays = tests[deciding]["Q"]
    expected = [heatmap.mean["Q"], arrays["statistic"], arrays["q_value"]]
    assert [int(number) for number in rows[0][1:3]] == [LAYERS[layer], HEADS[head]]
    assert [float(number) for number in rows[0][3:]] == pytest.approx([a[layer, head] for a in expected], rel=1e-3)
    assert str(tmp_path / "heatmap.h5") in lines[-2]


def test_without_tests_there_are_scores_alone(capsys, tmp_path) -> None:
    print_summary(make_heatmap(), tmp_path)
    header = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("block"))
    assert header.split() == ["block", "layer", "head", "mean", "interference"]
