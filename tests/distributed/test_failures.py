"""A rank that dies, or fails, ends the whole job: a message that names it, no hang, and what was computed is kept.

One is killed under a launcher that watches over its ranks; ranks that fail by themselves need none to end.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import psutil
import pytest
from processes import PATIENCE_S, Started, started, torchrun
from ranks import without_launcher
from running import exit_as_qkov, run_quietly
from samples import mixed_samples
from zoo import TINY, VOCAB

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A job long enough to be hit: a tiny model and many samples."""
    folder = tmp_path_factory.mktemp("faults")
    TINY["llama"].build(num_hidden_layers=12).save_pretrained(folder / "model")
    for task, seed in (("a", 1), ("b", 2)):
        samples = mixed_samples(150, VOCAB, seed=seed, lengths=(20, 50))
        rows = [{"id": s.id, "input_ids": s.input_ids.tolist(), "labels": s.labels.tolist()} for s in samples]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = [{"name": task, "path": str(folder / f"{task}.jsonl")} for task in ("a", "b")]
    raw = {"model": {"path": str(folder / "model")}, "tasks": tasks, "statistics": {"enabled": False}}
    (folder / "run.yaml").write_text(json.dumps(raw))
    return folder / "run.yaml"


def rank_process(launcher: Started, rank: int) -> psutil.Process:
    """The worker of a launcher with this rank, once it is there."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for child in psutil.Process(launcher.pid).children(recursive=True):
            try:
                if child.environ().get("RANK") == str(rank):
                    return child
            except psutil.Error:
                continue
        time.sleep(0.05)
    raise AssertionError("no worker")


def test_a_killed_rank_ends_the_job_and_is_named(config, ranks):
    """Every cut, killed anywhere, is the business of ``kills/``."""
    out = config.parent / "killed"
    words = ["-m", "qkov_dist", "run", config, "--quiet", f"output.dir={out}", "parallel.shard=fsdp"]
    with started(*torchrun(2), *words) as launcher:
        worker = rank_process(launcher, 1)
        launcher.wait_until(lambda: any(out.glob("partial_rank00001.layers/*.h5")))
        worker.kill()
        told = launcher.ended()
    assert told.returncode != 0
    assert "rank 1" in told.stderr or "rank      : 1" in told.stderr, told.stderr[-2000:]
    assert not (out / "heatmap.h5").exists()
    assert any(out.glob("partial_rank0000*.layers/*.h5"))
    raw = json.loads(config.read_text()) | {"output": {"dir": str(out)}, "parallel": {"shard": "fsdp"}}
    assert any("layers are on disk" in line for line in ranks(2).run(run_quietly, raw)[0])
    assert (out / "heatmap.h5").exists()


def test_a_stale_lock_of_an_extensions_build_is_named(config, tmp_path):
    pytest.importorskip("deepspeed")
    lock = tmp_path / "deepspeed_shm_comm" / "lock"  # what DeepSpeed builds first on a CPU
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (0, 0))
    words = ["run", config, "--quiet", f"output.dir={tmp_path / 'out'}", "parallel.shard=zero3"]
    for told in without_launcher(2, exit_as_qkov, *words, TORCH_EXTENSIONS_DIR=str(tmp_path)):
        assert told.returncode == 2
        assert f"{lock}: expected the lock of an extension's build to go" in told.stderr, told.stderr[-2000:]
    assert not (tmp_path / "out").exists()


def test_an_error_on_one_rank_ends_the_job_and_is_named(config, tmp_path):
    """Rank 1 cannot write its partial file: a folder stands where it should go."""
    blocked = tmp_path / "partial_rank00001.layers"
    blocked.write_text("in the way")
    for told in without_launcher(2, exit_as_qkov, "run", config, "--quiet", f"output.dir={tmp_path}"):
        assert told.returncode == 2
        assert "rank 1" in told.stderr, told.stderr[-2000:]
        assert "rank 1: rank 1: " not in told.stderr
        assert blocked.name in told.stderr
    assert blocked.read_text() == "in the way"
