"""Each check of a stored heatmap: a file that it refuses, and what would become of that file without it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from heatmaps import ATTRIBUTES, make_heatmap

from qkov_dist.commands.stats import retest
from qkov_dist.errors import QkovError
from qkov_dist.report.figures import draw_blocks
from qkov_dist.report.summary import print_summary
from qkov_dist.report.tables import all_tables
from qkov_dist.report.write import write_page
from qkov_dist.results import heatmap_file as store
from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.heatmap_file import load_heatmap
from qkov_dist.stats.statistics import QKOVStatistics

Lie = Callable[[h5py.File], None]


@pytest.fixture(scope="module")
def as_written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    heatmap = make_heatmap(attributes={**ATTRIBUTES, "estimator": "mean", "scope": "pooled"})
    tests = QKOVStatistics(n_permutations=9).test_heatmap(heatmap)
    path = tmp_path_factory.mktemp("written") / "heatmap.h5"
    heatmap.with_statistics(tests).save(path)
    return path


@pytest.fixture
def saved(as_written: Path, tmp_path: Path) -> Path:
    shutil.copy(as_written, tmp_path)
    return tmp_path


def put(name: str, value: Any) -> Lie:
    """An attribute with another value; its place among those of JSON follows."""

    def change(file: h5py.File) -> None:
        others = [other for other in json.loads(file.attrs["json_attributes"]) if other != name]
        is_json = isinstance(value, dict | list)
        file.attrs[name] = np.bytes_(json.dumps(value)) if is_json else value
        file.attrs["json_attributes"] = np.bytes_(json.dumps([*others, name] if is_json else others))

    return change


def put_inside(*path: str, value: Any) -> Lie:
    """A value inside the attribute ``statistics``."""

    def change(file: h5py.File) -> None:
        tree = json.loads(file.attrs["statistics"])
        inner = tree
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = value
        put("statistics", tree)(file)

    return change


def fill(name: str, value: Any) -> Lie:
    """A dataset with one value everywhere."""
    return lambda file: file[name].__setitem__(..., value)


def reshaped(name: str, dtype: str = "f8", shape: tuple[int, ...] = (1, 1)) -> Lie:
    """A dataset of another shape or type."""

    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, data=np.ones(shape, dtype), fletcher32=True, chunks=shape)

    return change


def without(name: str) -> Lie:
    return lambda file: file.__delitem__(name)


def big_heads(file: h5py.File) -> None:
    del file["head"]
    file.create_dataset("head", data=np.full(6, 2**63, np.uint64), chunks=(6,), fletcher32=True)


def never_tested(file: h5py.File) -> None:
    del file["statistics"]
    put("statistics", "")(file)
    del file.attrs["statistics"]
    put("config", {"statistics": {"permutations": "many"}})(file)


OVERLAP = "statistics/overlap/Q"
SHOWN: dict[str, Lie] = {  # lies that break what shows a heatmap, or tests it again
    "task a": put("task_a", np.array([1, 2])),
    "score": put("score", np.array([1, 2])),
    "scope": put("scope", np.array([1, 2])),
    "estimator": put("estimator", np.array([1, 2])),
    "run id": put("run_id", np.array([1, 2])),
    "config": put("config", {"model": 1}),
    "configured tests": never_tested,
    "seeds": put("seeds", [1]),
    "warnings": put("warnings", 1),
    "notes": put("notes", 1),
    "heads": big_heads,
    "groups": fill("group", 0),
    "statistics": put("statistics", "none"),
    "settings": put_inside("settings", value=[1]),
    "notes of tests": put_inside("notes", value=1),
    "statistic": put_inside("settings", "statistic", value="settings"),
    "alpha": put_inside("settings", "fdr_alpha", value="small"),
    "confidence": put_inside("settings", "confidence", value=float("nan")),
    "power": put_inside("settings", "power", value="high"),
    "permutations": put_inside("settings", "n_permutations", value="many"),
    "seed": put_inside("settings", "seed", value="s"),
    "labellings": put_inside("settings", "n_labellings", value=0),
    "no tests of a block": without(OVERLAP),
    "no q-values": without(f"{OVERLAP}/q_value"),
    "half an interval": without(f"{OVERLAP}/ci_high"),
    "p-values of other heads": reshaped(f"{OVERLAP}/p_value"),
    "true and false": reshaped(f"{OVERLAP}/effect_size", "?", (3, 6)),
}


def show(heatmap: Heatmap, folder: Path) -> None:
    """All that shows a heatmap or tests it again."""
    write_page(heatmap, folder)
    for table in all_tables(heatmap):
        table.to_csv()
        table.to_markdown()
    draw_blocks(heatmap)
    print_summary(heatmap, folder)
    heatmap.to_pandas()
    heatmap.to_xarray()
    retest(folder, {}, lambda _: None)


def test_what_a_run_wrote_is_shown_and_tested_again(saved: Path) -> None:
    show(load_heatmap(saved / "heatmap.h5"), saved)


@pytest.mark.parametrize("lie", SHOWN)
def test_a_lie_is_refused_when_it_is_read(saved: Path, lie: str) -> None:
    with h5py.File(saved / "heatmap.h5", "r+") as file:
        SHOWN[lie](file)
    with pytest.raises(QkovError) as caught:
        load_heatmap(saved / "heatmap.h5")
    assert str(saved / "heatmap.h5") in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lie", sorted(SHOWN.keys() - {"statistics", "run id"}))  # which are refused before the checks
def test_without_the_checks_a_lie_ends_in_a_traceback(saved: Path, monkeypatch, lie: str) -> None:
    with h5py.File(saved / "heatmap.h5", "r+") as file:
        SHOWN[lie](file)
    monkeypatch.setattr(store, "check_stored", lambda heatmap: None)
    failures = (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, IndexError, MemoryError)
    with pytest.raises(failures) as caught:
        show(load_heatmap(saved / "heatmap.h5"), saved)
    assert not isinstance(caught.value, QkovError)
