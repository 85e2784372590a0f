"""What a finished run prints."""

from __future__ import annotations

import numpy as np
import pytest
from heatmaps import HEADS, LAYERS, make_heatmap, make_statistics

from qkov_dist.report.summary import NUM_SHOWN, print_summary


@pytest.mark.parametrize("deciding", ["cross_mean", "overlap"])
def test_the_strongest_heads_come_with_the_statistic_that_decides(deciding: str, capsys, tmp_path) -> None:
    tests = make_statistics() | {"settings": {"statistic": deciding, "alternative": "two-sided", "fdr_alpha": 0.6}}
    for block, arrays in tests[deciding].items():
        if block in "QKVO":
            arrays["effect_size"] = np.where(arrays["q_value"] > 0.3, -1.0, 1.0)
    heatmap = make_heatmap().with_statistics(tests)
    print_summary(heatmap, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if line.startswith("block"))
    assert header.split() == ["block", "layer", "head", "mean", "interference", deciding, "q", "finding"]
    rows = [line.split() for line in lines if line.startswith("Q ")]
    assert len(rows) == NUM_SHOWN
    layer, head = np.unravel_index(np.nanargmax(heatmap.mean["Q"]), heatmap.mean["Q"].shape)
    arrays = tests[deciding]["Q"]
    expected = [heatmap.mean["Q"], arrays["statistic"], arrays["q_value"]]
    assert [int(number) for number in rows[0][1:3]] == [LAYERS[layer], HEADS[head]]
    assert [float(number) for number in rows[0][3:6]] == pytest.approx([a[layer, head] for a in expected], rel=1e-3)
    above, below = {"overlap": ("contested", "apart"), "cross_mean": ("higher", "lower")}[deciding]
    rows = [line.split() for line in lines if line[:2] in ("Q ", "K ", "V ", "O ")]
    for row in rows:
        q = float(row[5])
        assert row[6] == (above if q <= 0.3 else below if q <= 0.6 else "-")
    assert {row[6] for row in rows} == {above, below, "-"}
    q_values = np.concatenate([tests[deciding][block]["q_value"].ravel() for block in "QKVO"])
    numbers = {above: (q_values <= 0.3).sum(), below: ((q_values > 0.3) & (q_values <= 0.6)).sum()}
    parts = ", ".join(f"{number} {name}" for name, number in numbers.items())
    total, heads = sum(numbers.values()), np.isfinite(q_values).sum()
    assert f"significant: {total} of {heads} heads: {parts} ({deciding}, two-sided, q <= 0.6)" in lines
    assert str(tmp_path / "heatmap.h5") in lines[-2]


def test_beside_the_statistic_stands_its_null(capsys, tmp_path) -> None:
    tests = make_statistics() | {"settings": {"statistic": "overlap", "fdr_alpha": 0.6}}
    for arrays in (tests["overlap"][block] for block in "QKVO"):
        for name, value in (("null_mean", 0.125), ("null_low", -0.25), ("null_high", 0.5)):
            arrays[name] = np.where(np.isnan(arrays["statistic"]), np.nan, value)
    print_summary(make_heatmap().with_statistics(tests), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("block")).split()[5:8] == ["overlap", "its", "null"]
    assert all("0.125 [-0.25, 0.5]" in line for line in lines if line[:2] in ("Q ", "K ", "V ", "O "))


def test_without_tests_there_are_scores_alone(capsys, tmp_path) -> None:
    print_summary(make_heatmap(), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if line.startswith("block"))
    assert header.split() == ["block", "layer", "head", "mean", "interference"]
    assert "significant: not tested" in lines
