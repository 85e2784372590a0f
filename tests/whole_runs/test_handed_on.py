"""Runs that are handed on when they are finished: to a tracker by the configuration, to the hub by a command."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import yaml
from hub import TOKEN, serving
from processes import ran
from running import qkov
from samples import mixed_samples, write_task
from zoo import VOCAB

from qkov_dist import load_heatmap, load_matrix

TASKS = {"math": 5, "code": 3, "law & order": 4}


@pytest.fixture
def many(config, tmp_path):
    """A configuration of three tasks that asks for TensorBoard."""
    raw = yaml.safe_load(config.read_text())
    for seed, num in enumerate(TASKS.values(), start=1):
        write_task(tmp_path / f"{seed}.jsonl", mixed_samples(num, VOCAB, seed=seed))
    raw["tasks"] = [{"name": name, "path": str(tmp_path / f"{n}.jsonl")} for n, name in enumerate(TASKS, start=1)]
    raw["fisher"] = {"estimator": "mean"}
    raw["output"]["report_to"] = "tensorboard"
    config.write_text(yaml.safe_dump(raw))
    return config


@pytest.mark.long
def test_a_run_of_many_tasks_goes_to_tensorboard_once_and_to_the_hub(many, tmp_path, capsys) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert qkov("run", many, "--quiet") == 0
    out = tmp_path / "out"
    assert f"qkov: reported to tensorboard: tensorboard --logdir {out / 'tensorboard'}" in capsys.readouterr().err
    found = EventAccumulator(str(out / "tensorboard"))
    found.Reload()
    numbers = {tag: found.Scalars(tag)[0].value for tag in found.Tags()["scalars"]}
    matrix = load_matrix(out)
    names = ("math", "code", "law _ order")
    for name, values in (("change_adam", matrix.total("change_adam")), ("mean_score", matrix.average("mean"))):
        for row, column in np.ndindex(3, 3):
            logged = numbers[f"{names[row]}__{names[column]}/{name}"]
            assert logged == pytest.approx(values[row, column], rel=1e-5)
    assert set(found.Tags()["images"]) >= {"matrix", "matrix_scores"}
    assert {"seconds/capture", "seconds/scoring", "seconds/combining", "gib/weights", "gib/peak_host"} < {*numbers}
    assert numbers["gib/peak_host"] > numbers["gib/weights"] > 0

    assert qkov("run", many, "--quiet") == 0  # finished already
    assert f"not reported again; to do so: qkov report {out} --report-to tensorboard" in capsys.readouterr().err
    with serving() as hub:
        words = (sys.executable, "-m", "qkov_dist", "push", out, "me/many", "--quiet")
        settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        pushed = ran(*words, **settings)
    assert pushed.returncode == 0, pushed.stderr
    files = hub.files["main"]
    assert "heatmap = load_matrix(hf_hub_download('me/many'" in files["README.md"].decode()
    pages = {name for name in files if name.endswith(".html")}
    assert pages == {
        "report.html",
        *(f"pairs/{pair}.html" for pair in ("math__code", "math__law_order-3", "code__law_order-3")),
    }
    (tmp_path / "back.h5").write_bytes(files["heatmap.h5"])
    back = load_matrix(tmp_path / "back.h5")
    np.testing.assert_array_equal(back.values["Q"]["change_adam"], matrix.values["Q"]["change_adam"])
    pair = ("math", "law & order")
    np.testing.assert_array_equal(back.heatmap(*pair).cross["V"], load_heatmap(out, pair=pair).cross["V"])
    assert str(tmp_path).encode() not in files["heatmap.h5"] + files["config.yaml"]
