"""A finished run handed to trackers: TensorBoard's own reader finds it again; what is missing or fails is said."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from influences import heatmap_with_effects

from qkov_dist.cli import main
from qkov_dist.errors import QkovError
from qkov_dist.report import trackers
from qkov_dist.report.effect_findings import effect_counts
from qkov_dist.report.findings import counts
from qkov_dist.report.page import make_page


@pytest.fixture
def reported(tmp_path: Path):
    """A heatmap with all that can be logged, its page, and what was said when it was handed to TensorBoard."""
    heatmap, said = heatmap_with_effects(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tensorboard's own, of numpy and protobuf
        trackers.report_to(("tensorboard",), heatmap, tmp_path, said.append, {"seconds/capture": 2.5})
    return heatmap, said, tmp_path


def events(folder: Path):
    """All that was written beneath ``tensorboard``, as TensorBoard itself reads it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


@pytest.mark.long
def test_tensorboard_has_numbers_figures_and_the_answer(reported) -> None:
    heatmap, said, folder = reported
    assert said == [f"reported to tensorboard: tensorboard --logdir {folder / 'tensorboard'}"]
    found = events(folder)
    numbers = {tag: found.Scalars(tag)[0].value for tag in found.Tags()["scalars"]}
    assert numbers["seconds/capture"] == 2.5
    for block in "QKVO":
        assert numbers[f"{block}/mean_score"] == pytest.approx(np.nanmean(heatmap.mean[block]), rel=1e-6)
        overlap = heatmap.statistics["overlap"][block]["statistic"]
        assert numbers[f"{block}/overlap"] == pytest.approx(np.nanmean(overlap), rel=1e-6)
        for optimizer in ("sgd", "adam"):
            change = np.nansum(heatmap.effects[block][optimizer]["change"])
            assert numbers[f"{block}/change_{optimizer}"] == pytest.approx(change, rel=1e-5)
    for finding, number in effect_counts(heatmap).items():
        assert sum(numbers[f"{block}/{finding.name}_adam"] for block in "QKVO") == number
    for finding, number in counts(heatmap).items():
        assert sum(numbers[f"{block}/{finding.name}"] for block in "QKVO") == number
    low, high = heatmap.total_effect("adam").interval
    assert (numbers["all/change_low_adam"], numbers["all/change_high_adam"]) == pytest.approx((low, high), rel=1e-5)
    texts = {tag: found.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in found.Tags()["tensors"]}
    assert heatmap.verdict.sentences[0] in texts["answer/text_summary"]
    assert heatmap.attributes["warnings"][0] in texts["answer/text_summary"]
    assert texts["folder/text_summary"] == str(folder)
    (hparams,) = (folder / "tensorboard").rglob("hparams.yml")
    assert "samples.0: 4" in hparams.read_text()
    assert set(found.Tags()["images"]) == {"heatmaps", "blocks", "layers", "changes", "waterfall"}
    from matplotlib.image import imread

    stored = imread(io.BytesIO(found.Images("changes")[0].encoded_image_string), format="png")
    assert stored.shape[0] > 300
    assert stored[0, 0].min() == 1  # on white
    assert stored[..., :3].std() > 0.05


def test_a_process_of_several_reports_as_one_and_leaves_accelerate_as_it_was(monkeypatch) -> None:
    """Its other ranks have ended by then: it must not wait for them."""
    from accelerate.state import PartialState

    launched = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(PartialState, "_shared_state", {})
    with trackers._process_alone():
        assert (PartialState().num_processes, PartialState().is_main_process) == (1, True)
        assert os.environ["WORLD_SIZE"] == "4"
    assert PartialState._shared_state == {}


def test_a_tracker_that_fails_is_a_warning_and_the_next_one_is_served(tmp_path, monkeypatch) -> None:
    heatmap, said = heatmap_with_effects(), []

    def unreachable(handed: trackers.Handed) -> str:
        raise ConnectionError("no route\nto host")

    served = []

    def reachable(handed: trackers.Handed) -> str:
        served.append((handed, handed.page.read_text()))
        return "there"

    known = {"wandb": unreachable, "mlflow": reachable}
    monkeypatch.setattr(trackers, "_TRACKERS", known)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    trackers.report_to(("wandb", "mlflow"), heatmap, tmp_path, said.append)
    assert said == [
        "no figures: matplotlib is not installed. Run: pip install 'qkov-dist[report]'",
        "warning: wandb: the run was not reported (ConnectionError: no route to host). Its results are written; to try "
        f"again: qkov report {tmp_path} --report-to wandb",
        "reported to mlflow: there",
    ]
    ((handed, page),) = served
    assert heatmap.verdict.sentences[1] in page
    assert heatmap.samples_a.ids[1] in page
    assert heatmap.samples_a.texts[1].replace("<", "\\u003c").replace(">", "\\u003e") in make_page(heatmap)
    assert heatmap.samples_a.texts[1].replace("<", "\\u003c").replace(">", "\\u003e") not in page
    assert handed.pictures == {}
    json.dumps([handed.settings, handed.numbers], allow_nan=False)


def test_a_library_that_is_missing_is_named_before_anything_is_loaded(tmp_path, monkeypatch, capsys) -> None:
    """A folder of that name beside the program, as wandb leaves it, is no library."""

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(QkovError, match=r"output\.report_to: expected wandb to be installed.*pip install wandb"):
        trackers.check_installed(["wandb"])
    tasks = "[{name: a, path: a.jsonl}, {name: b, path: b.jsonl}]"
    (tmp_path / "run.yaml").write_text(f"{{model: {{path: nowhere}}, tasks: {tasks}}}")
    assert main(["run", str(tmp_path / "run.yaml"), "output.report_to=mlflow"]) == 2
    assert "Run `pip install mlflow`" in capsys.readouterr().err
    heatmap_with_effects().save(tmp_path / "heatmap.h5")
    assert main(["report", str(tmp_path), "--report-to", "tensorboard"]) == 2
    assert "--report-to: expected tensorboard to be installed" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
