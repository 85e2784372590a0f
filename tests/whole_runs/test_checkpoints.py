"""`launch/checkpoints.sh`: a run for each checkpoint, taken up where it was, then their comparison."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from running import run_quietly
from samples import mixed_samples, write_task
from zoo import TINY, VOCAB

from qkov_dist import compare_runs

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "checkpoints.sh"


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """Two checkpoints of a tiny model, two tasks, a configuration."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = TINY["llama"].build()
    for name in ("step-1", "step-2"):
        model.save_pretrained(folder / name)
        with torch.no_grad():
            model.model.layers[1].self_attn.o_proj.weight[:, :16] *= 4
    for task, seed in (("a", 1), ("b", 2)):
        write_task(folder / f"{task}.jsonl", mixed_samples(5, VOCAB, seed=seed))
    tasks = [{"name": task, "path": str(folder / f"{task}.jsonl")} for task in ("a", "b")]
    raw = {"model": {"path": "nowhere"}, "tasks": tasks, "statistics": {"permutations": 20}}
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    return folder


def script(*arguments: object, **environment: object) -> subprocess.CompletedProcess[str]:
    known = os.environ | {"OMP_NUM_THREADS": "1", "QKOV_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    known |= {name: str(value) for name, value in environment.items()}
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=known, capture_output=True, text=True, check=False)


@pytest.mark.long
def test_every_checkpoint_is_run_once_and_all_are_compared(job, tmp_path):
    checkpoints = [job / "step-1", job / "step-2"]
    raw = yaml.safe_load((job / "run.yaml").read_text())
    finished = {"model": {"path": str(checkpoints[0])}, "output": {"dir": str(tmp_path / "step-1")}}
    run_quietly({**raw, "metric": {"layers": [1]}, **finished})
    written = (tmp_path / "step-1" / "heatmap.h5").stat().st_mtime_ns
    launcher = tmp_path / "launcher.sh"
    launcher.write_text(f'echo "launched: $*" >&2\nexec {sys.executable} -m "$@"\n')
    starts = f"bash {launcher} qkov_dist run"
    done = script(job / "run.yaml", *checkpoints, "metric.layers=1", OUTPUT=tmp_path, LAUNCHER=starts)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("launched: qkov_dist run") == 2
    assert "is finished already" in done.stderr
    assert (tmp_path / "step-1" / "heatmap.h5").stat().st_mtime_ns == written
    assert (tmp_path / "compare.html").exists()
    comparison = compare_runs([tmp_path / "step-1", tmp_path / "step-2"])
    assert comparison.verdict[0] in " ".join(done.stdout.split())
    assert comparison.paired
    assert comparison.differs[0].startswith("model weights (fingerprints ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "expected a configuration and its checkpoints"),
        (("run.yaml", "output.dir=x"), "expected one checkpoint or more, got none"),
        (("run.yaml", "one/step", "two/step"), "expected checkpoints of different names, got step twice"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(arguments, says):
    refused = script(*arguments)
    assert refused.returncode != 0
    assert says in refused.stderr
    assert refused.stdout == ""
