"""SIGTERM: the layer in work is recorded, the run ends with 143, and the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import threading
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from processes import Started, forked, started, torchrun
from rounding import passes
from running import exit_as_qkov, qkov, run_quietly
from samples import mixed_samples, write_task
from zoo import TINY, VOCAB

from qkov_dist import load_heatmap
from qkov_dist.distributed.preemption import StoppedError, stoppable
from qkov_dist.distributed.world import Alone

pytestmark = pytest.mark.long
LAYERS = 24


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A job long enough to be told to stop: a tiny model of many layers, and many samples."""
    folder = tmp_path_factory.mktemp("stopping")
    TINY["llama"].build(num_hidden_layers=LAYERS).save_pretrained(folder / "model")
    for task, seed in (("a", 1), ("b", 2)):
        write_task(folder / f"{task}.jsonl", mixed_samples(80, VOCAB, seed=seed, lengths=(20, 50)))
    tasks = [{"name": task, "path": str(folder / f"{task}.jsonl")} for task in ("a", "b")]
    raw = {"model": {"path": str(folder / "model")}, "tasks": tasks, "statistics": {"enabled": False}}
    raw["compute"] = {"batch_tokens": 2048}  # few batches: how others round is not what is tested
    (folder / "run.yaml").write_text(json.dumps(raw))
    return folder / "run.yaml"


def run_of(config: Path, out: Path, ranks: int) -> AbstractContextManager[Started]:
    words = ["run", config, "--quiet", f"output.dir={out}"]
    return started(*torchrun(ranks), "-m", "qkov_dist", *words) if ranks > 1 else forked(exit_as_qkov, *words)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_run_told_to_stop_records_its_layer_and_goes_on_later(config, num_ranks, ranks):
    out = config.parent / f"out{num_ranks}"
    with run_of(config, out, num_ranks) as process:
        process.wait_until((out / "partial_rank00000.layers" / "layer_0000.h5").exists)
        process.send(signal.SIGTERM)
        told = process.ended()
    assert told.returncode not in (0, -signal.SIGTERM) if num_ranks > 1 else told.returncode == 143
    assert "expected to finish, got SIGTERM" in told.stderr, told.stderr[-2000:]
    assert "the same command goes on from there" in told.stderr
    assert not (out / "heatmap.h5").exists()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("partial_rank*.layers/layer_*.h5")}
    assert 0 < len(kept) < LAYERS * num_ranks
    raw = json.loads(config.read_text()) | {"output": {"dir": str(out)}}
    said = ranks(num_ranks).run(run_quietly, raw)[0]
    assert any("layers are on disk" in line for line in said)
    whole = config.parent / "whole"
    if not whole.exists():
        assert qkov("run", config, "--quiet", f"output.dir={whole}") == 0
    found, expected = (load_heatmap(folder / "heatmap.h5") for folder in (out, whole))
    for block in expected.blocks:
        largest = np.abs(expected.cross[block]).max()
        tolerance = 0 if num_ranks == 1 else passes(layers=LAYERS, tokens=50) * largest
        np.testing.assert_allclose(found.cross[block], expected.cross[block], atol=tolerance, rtol=0)


def test_outside_the_main_thread_nobody_is_told_and_nothing_changes():
    before = signal.getsignal(signal.SIGTERM)
    said = []

    def elsewhere() -> None:
        with stoppable(Alone()) as may_stop:
            may_stop()
            said.append("went on")

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert said == ["went on"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_handler_is_put_back():
    before = signal.getsignal(signal.SIGTERM)

    def told() -> None:
        with stoppable(Alone()) as may_stop:
            os.kill(os.getpid(), signal.SIGTERM)
            may_stop()

    with pytest.raises(StoppedError, match="SIGTERM"):
        told()
    assert signal.getsignal(signal.SIGTERM) is before
