"""Locks of extensions that are being built: who builds is waited for, who was killed is not."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from processes import PATIENCE_S
from torch.utils.file_baton import FileBaton

from qkov_dist.distributed.builds import locks_end
from qkov_dist.errors import QkovError


def test_an_old_lock_is_named_at_once(tmp_path):
    lock = tmp_path / "lock"
    lock.touch()
    os.utime(lock, (0, time.time() - 2 * PATIENCE_S))
    wait = FileBaton.wait
    with pytest.raises(QkovError) as raised, locks_end(PATIENCE_S):
        FileBaton(str(lock)).wait()
    assert raised.value.where == str(lock)
    assert "Remove it if no process is building" in raised.value.remedy
    assert FileBaton.wait is wait
    assert lock.exists()


def test_a_lock_that_does_not_go_is_named_in_the_end(tmp_path):
    """Its time is that of another node, whose clock is ahead."""
    lock = tmp_path / "lock"
    lock.touch()
    os.utime(lock, (0, time.time() + 10**6))
    with pytest.raises(QkovError, match="lock of an extension's build"), locks_end(0.2):
        FileBaton(str(lock), wait_seconds=0.01).wait()


def test_a_build_that_ends_is_waited_for(tmp_path, monkeypatch):
    lock, waited = tmp_path / "lock", threading.Event()
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: (waited.set(), sleep(seconds)))
    lock.touch()

    def build() -> None:
        waited.wait(PATIENCE_S)
        Path(lock).unlink()

    builder = threading.Thread(target=build)
    builder.start()
    with locks_end(PATIENCE_S):
        FileBaton(str(lock), wait_seconds=0.01).wait()
    builder.join()
    assert waited.is_set()


@pytest.mark.parametrize("op", ["pin_memory", "async_io"])
def test_the_locks_of_what_reads_weights_from_nvme_are_named(op, tmp_path, monkeypatch):
    builders = pytest.importorskip("deepspeed.ops.op_builder.cpu")
    builder = {"pin_memory": builders.PinMemoryBuilder, "async_io": builders.AsyncIOBuilder}[op]()
    if not builder.is_compatible():
        pytest.skip("no compiler, or no libaio")
    loaded = {} if op == "pin_memory" else {"pin_memory": None}  # DeepSpeed loads it first
    monkeypatch.setattr(builders.builder.OpBuilder, "_loaded_ops", loaded)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / op / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (0, 0))
    with pytest.raises(QkovError) as raised, locks_end(PATIENCE_S):
        builder.load(verbose=False)
    assert raised.value.where == str(lock)
