"""What xarray is told of a heatmap: names, units and words for everything, which netCDF keeps."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import xarray
from influences import heatmap_with_effects
from matrices import made_matrix

from qkov_dist.results.effects import EFFECT_KEYS
from qkov_dist.results.labels import Labels
from qkov_dist.scoring.score_kinds import KINDS

UNIT = "nats per labelled token"


def test_everything_says_what_it_is_in_which_units(tmp_path) -> None:
    data = heatmap_with_effects().to_xarray()
    for name, variable in data.variables.items():
        assert [*variable.attrs] == ["long_name", "units", "description"], name
        assert all(isinstance(text, str) and text for text in variable.attrs.values()), name
    names = [variable.attrs["long_name"] for variable in data.variables.values()]
    assert len({*names}) == len(names)
    assert data["effects_K_change"].dims == ("optimizer", "layer", "kv_head")
    assert data["optimizer"].values.tolist() == ["sgd", "adam"]
    assert {f"effects_V_{key}" for key in EFFECT_KEYS} < {*data.data_vars}
    assert data["loss_a"].attrs["long_name"] == "loss of math"
    assert data["overlap_Q_null_low"].attrs == {
        "long_name": "lower end of the null's band of overlap of Q",
        "units": "1",
        "description": "under exchanged labels",
    }


@pytest.mark.long
def test_netcdf_keeps_all_of_it(tmp_path) -> None:
    heatmap = heatmap_with_effects()
    data, matrix = heatmap.to_xarray(), made_matrix().to_xarray()
    for name, kept in (("heatmap", data), ("matrix", matrix)):
        kept.to_netcdf(tmp_path / f"{name}.nc", engine="h5netcdf")
        with xarray.open_dataset(tmp_path / f"{name}.nc", engine="h5netcdf") as back:
            xarray.testing.assert_identical(back.load(), kept)
    assert all({"long_name", "units", "description"} == {*variable.attrs} for variable in matrix.variables.values())
    assert (data.attrs["model"], data.attrs["score"], data.attrs["num_samples_b"]) == ("", "interference", 3)
    assert (data.attrs["task_a"], data.attrs["task_b"]) == (heatmap.task_a, heatmap.task_b)
    assert json.loads(data.attrs["versions"]) == heatmap.attributes["versions"]
    assert data.attrs["creation_library"] == "qkov-dist"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", data.attrs["created_at"])


@pytest.mark.parametrize(
    ("score", "unit"), [("interference", UNIT), ("signed", "1"), ("symmetric", "1"), ("curvature", f"({UNIT})^2")]
)
def test_units_scale_as_the_quantities_do(score: str, unit: str) -> None:
    """A loss in another unit, c times as large, makes scores c^degree times as large: M is made of g^degree / R."""
    config = {"metric": {"loss_reduction": "mean"}}
    labels = Labels({"score": score, "config": config})
    assert labels.of("heatmap/Q")["units"] == labels.of("statistics/cross_mean/Q/ci_low")["units"] == unit
    maps = {"gradient": lambda g: g, "magnitude": np.abs, "square": np.square}
    kind, (g, h) = KINDS[score], np.array([[0.5, -2.0], [1.5, 3.0]])

    def scored(c: float) -> float:
        fisher = ((c * g) ** 2 + (c * h) ** 2) / 2
        return float(np.sum(maps[kind.left](c * g) * maps[kind.right](c * h) / fisher**kind.power))

    power = round(np.log2(scored(2.0) / scored(1.0)))
    assert unit == {0: "1", 1: UNIT, 2: f"({UNIT})^2"}[power]
    scaled = Labels({"score": score, "config": config, "sample_scale": "unit"})
    assert scaled.of("heatmap/Q")["units"] == scaled.of("fisher/Q/mean")["units"] == "1"
    assert scaled.of("samples/a/loss")["units"] == UNIT
