"""From a run to heads that are held: its file, the command, and training that leaves them; as a user does it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from collecting import collected
from jobs import job_for
from running import interrupt_at, qkov
from training import adamw, moved_slices, train

from qkov_dist import QKOVConfig, QKOVInterferenceMetric, Selection, freeze_heads, load_heatmap


def test_the_most_harmful_heads_of_a_run_are_held(config, entry, tmp_path):
    assert qkov("run", config, "--quiet") == 0
    file = tmp_path / "heads.json"
    assert qkov("heads", tmp_path / "out", "--share", "0.25", "--format", "json", "--output", file) == 0
    heatmap, model = load_heatmap(tmp_path / "out"), entry.build()
    changes = np.concatenate([heatmap.effects[block]["adam"]["change"].ravel() for block in heatmap])
    chosen = Selection.from_json(file)
    assert [head.value for head in chosen.heads] == np.sort(changes)[::-1][: round(changes.size / 4)].tolist()
    with freeze_heads(model, file):
        held, free = moved_slices(model, chosen, lambda: train(model, adamw(model), 3))
    assert held == set()
    assert free


def test_where_heads_lie_comes_through_kills_and_from_python(config, entry, tmp_path, monkeypatch):
    assert qkov("run", config, "--quiet") == 0
    interrupt_at(1, monkeypatch)
    again = f"output.dir={tmp_path}/again"
    assert qkov("run", config, "--quiet", again) == 130
    monkeypatch.undo()
    assert qkov("run", config, "--quiet", again) == 0
    model = entry.build()
    metric = QKOVInterferenceMetric(QKOVConfig.from_model(model), collected(model, job_for(entry)))
    whole, resumed = (load_heatmap(tmp_path / name).select() for name in ("out", "again"))
    assert resumed == whole
    assert all(head.ranges for head in whole.heads)
    ranges = {(head.block, head.layer, head.head): head.ranges for head in whole.heads}
    of_python = metric.compute_heatmap("math", "code", layers=[1]).select("interference")
    assert {head.ranges for head in of_python.heads} == {found for key, found in ranges.items() if key[1] == 1}


@pytest.mark.parametrize("by", ["change_sgd", "curvature", "interference", "overlap", "harm"])
def test_every_criterion_is_in_a_run(config, tmp_path, capsys, by):
    assert qkov("run", config, "--quiet") == 0
    capsys.readouterr()
    step = ["--step", "1e-3"] if by == "harm" else []
    assert qkov("heads", tmp_path / "out", "--by", by, "--format", "json", *step) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["heads"]) == 2 * (4 + 2 + 2 + 4)
    assert all((entry["q_value"] is None) == (by in ("harm", "curvature")) for entry in found["heads"])
