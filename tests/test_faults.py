"""A rank that dies, or fails, ends the whole job: a message that names it, no hang, and what was computed is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from jobs import mixed_samples
from zoo import TINY, VOCAB

pytestmark = pytest.mark.long
TIMEOUT_S = 150


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


def launched(config: Path, out: str, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "qkov_dist", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "QKOV_TIMEOUT_S": "60"}
    return subprocess.Popen(
        [*command, str(config), "--quiet", f"output.dir={config.parent / out}", *overrides],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment,
        start_new_session=True,
    )


def rank_process(launcher: subprocess.Popen, rank: int) -> psutil.Process:
    """The worker of a launcher with this rank, once it is there."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        for child in psutil.Process(launcher.pid).children(recursive=True):
            try:
                if child.environ().get("RANK") == str(rank):
                    return child
            except psutil.Error:
                continue
        time.sleep(0.05)
    raise AssertionError("no worker")


def ended(launcher: subprocess.Popen) -> str:
    """What the job said, once it ended by itself."""
    try:
        return launcher.communicate(timeout=TIMEOUT_S)[1]
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
            raise AssertionError("the job hangs")


@pytest.mark.parametrize("cut", ["ddp", "fsdp"])
def test_a_killed_rank_ends_the_job_and_is_named(config, cut):
    out = config.parent / f"killed-{cut}"
    launcher = launched(config, out.name, f"parallel.shard={cut}")
    worker = rank_process(launcher, 1)
    deadline = time.monotonic() + TIMEOUT_S
    while not any(out.glob("partial_rank00001.layers/*.h5")):
        assert launcher.poll() is None, launcher.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    worker.kill()
    said = ended(launcher)
    assert launcher.returncode != 0
    assert "rank 1" in said or "rank      : 1" in said, said[-2000:]
    assert not (out / "heatmap.h5").exists()
    assert any(out.glob("partial_rank0000*.layers/*.h5"))
    again = launched(config, out.name, f"parallel.shard={cut}")
    assert "layers are on disk" in ended(again)
    assert again.returncode == 0
    assert (out / "heatmap.h5").exists()


def test_an_error_on_one_rank_ends_the_job_and_is_named(config):
    """Rank 1 cannot write its partial file: a folder stands where it should go."""
    out = config.parent / "blocked"
    (out / "partial_rank00001.layers").parent.mkdir()
    (out / "partial_rank00001.layers").write_text("in the way")
    launcher = launched(config, out.name)
    said = ended(launcher)
    assert launcher.returncode != 0
    assert "rank 1" in said, said[-2000:]
    assert "partial_rank00001.layers" in said
    assert (out / "partial_rank00001.layers").read_text() == "in the way"
